"""Models without a rollout: long videos, storyboards and every edit verb by known latent frames."""

import json
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from edit_examples import example_edit
from PIL import Image
from uncached_models import copy_without_rollout, diorama_pipeline, wan_pipeline

from skyloom.generate.cards import Card
from skyloom.generate.conditioning import Conditioning
from skyloom.generate.denoiser import Denoiser
from skyloom.generate.edit_spec import Edit
from skyloom.generate.edit_verbs import EDIT_VERBS
from skyloom.generate.memory import MemoryGuard
from skyloom.generate.pipeline import Pipeline
from skyloom.generate.plan import make_plan
from skyloom.generate.request import Request
from skyloom.generate.sampling import WindowScore
from skyloom.generate.timeline import Keep
from skyloom.generate.window_keys import window_keys
from skyloom.media.frames import cover
from skyloom.media.source import open_source
from skyloom.media.video import Video
from skyloom.models.wan.config import FAMILY
from skyloom.safety.watermark import SpreadSpectrumWatermarker

LONG = Request("a red cat on the beach", seed=7, seconds=3, num_steps=2, guidance_scale=1.0)
CARDS = (
    Card("0", "a red cat"),
    Card("1.5", "a dog on the beach"),
    Card("3", "a red dog", cut=True),
)
CHANGE, CUT = 24, 48  # first frames of the second and the third card
BOARD = replace(LONG, prompt="", seconds=4, cards=CARDS)
NOTICE = (
    "tiny was trained on videos of 17 frames (1 s). Longer shots are made in windows that see the "
    "last frames before them; their quality has not been measured."
)
VERBS = [name for name, verb in EDIT_VERBS.items() if verb.uses_model]


@pytest.fixture(scope="module", params=["diorama", "wan"])
def pipeline(request, tiny_model) -> Pipeline:
    """Models without a rollout, each with native windows of five latent frames."""
    make = diorama_pipeline if request.param == "diorama" else wan_pipeline
    return make(tiny_model)


@pytest.fixture(scope="module")
def sources(pipeline, tmp_path_factory) -> dict[str, str]:
    """Two lossless videos of 29 frames of the model's size, with different textures."""
    folder = tmp_path_factory.mktemp("sources")
    paths = {}
    for seed, name in enumerate(("a", "b")):
        generator = torch.Generator().manual_seed(seed)
        texture = torch.rand(1, 4, 8, 3, generator=generator) * 255
        moving = [torch.roll(texture, frame // 4, dims=2) for frame in range(29)]
        frames = cover(torch.cat(moving).to(torch.uint8), 32, 64)
        paths[name] = str(folder / f"{name}.mkv")
        Video(frames, fps=16).save(paths[name])
    return paths


@pytest.fixture(autouse=True)
def without_watermark(monkeypatch):
    """Frames differ by what the model makes, not by the id of the request."""
    monkeypatch.setattr(SpreadSpectrumWatermarker, "mark", lambda self, frames, where=None: frames)


@pytest.fixture
def calls(monkeypatch):
    """The noise levels of each call of the network."""
    calls, velocity = [], Denoiser.velocity

    def record(self, latent, sigma, span):
        calls.append(sigma[0].tolist())
        return velocity(self, latent, sigma, span)

    monkeypatch.setattr(Denoiser, "velocity", record)
    return calls


def frames_of(steps):
    return torch.cat([step.frames for step in steps if step.frames is not None])


def test_a_long_video_is_made_in_windows_that_see_clean_frames(pipeline, calls):
    plan = pipeline.plan(LONG)
    windows = [(one.start, one.stop, one.generated) for one in plan.windows]
    assert windows == [
        (0, 5, (0, 5)),
        (3, 8, (5, 8)),
        (6, 11, (8, 11)),
        (9, 13, (11, 13)),
    ]
    video = pipeline.generate(LONG)
    assert video.frames.shape == (49, 32, 64, 3)
    assert [levels[:2] for levels in calls[2:]] == [[0.0, 0.0]] * 6
    assert all(level > 0 for levels in calls for level in levels[2:])
    assert video.receipt["notes"]["notices"] == [NOTICE]
    assert plan.notices == (NOTICE,)


def test_the_plan_has_the_notice(tiny_model, skyloom, tmp_path):
    folder = copy_without_rollout(tiny_model, tmp_path / "model")
    command = ("plan", "a cat", "--model", folder, "--seconds", 3)
    assert f"note     {NOTICE}" in skyloom(*command).out
    assert json.loads(skyloom(*command, "--json").out)["notices"] == [NOTICE]
    short = json.loads(skyloom(*command[:-1], 1, "--json").out)
    assert "notices" not in short


def test_a_short_video_is_the_beginning_and_has_no_notice(pipeline):
    short = pipeline.generate(replace(LONG, seconds=1))
    assert torch.equal(short.frames, pipeline.generate(LONG).frames[:17])
    assert "notices" not in short.receipt.get("notes", {})


def test_the_known_frames_determine_the_next_window(pipeline, monkeypatch):
    whole = pipeline.generate(LONG).frames
    add = Conditioning.add_known

    def darken(self, first, latent, shot=0, strength=0.0):
        add(self, first, latent - 1 if first == 5 else latent, shot, strength)

    monkeypatch.setattr(Conditioning, "add_known", darken)
    other = pipeline.generate(LONG).frames
    assert torch.equal(other[:29], whole[:29])
    assert not torch.equal(other[29:41], whole[29:41])


def test_memory_does_not_grow_with_the_length(pipeline, monkeypatch):
    held = []
    forget = Conditioning.forget_before

    def record(self, index):
        forget(self, index)
        held.append(len(self.known))

    monkeypatch.setattr(Conditioning, "forget_before", record)
    for step in pipeline.stream(replace(LONG, seconds=6, num_steps=1), collect=False):
        assert step.video is None
    assert held == [2] * 7 + [0]


@pytest.mark.parametrize("request_", [LONG, BOARD], ids=["prompt", "storyboard"])
def test_it_is_stopped_at_every_step_and_goes_on(pipeline, calls, tmp_path, monkeypatch, request_):
    monkeypatch.setenv("SKYLOOM_CACHE", "off")
    whole = pipeline.generate(request_)
    once = len(calls)
    frames = []
    while len(frames) <= once:
        before = len(calls)
        stream = pipeline.stream(request_, resume=tmp_path / "kept")
        steps = []
        for step in stream:
            steps.append(step)
            if len(calls) > before:
                break
        frames.append(steps)
        stream.close()
        if len(calls) == before:
            break
    assert len(calls) == 2 * once
    assert torch.equal(frames_of(frames[-1]), whole.frames)
    assert frames[-1][-1].receipt == whole.receipt


def test_a_storyboard_carries_frames_over_a_change_but_not_over_a_cut(pipeline):
    (run,) = pipeline.plan(BOARD).runs
    assert [(one.shot, one.span) for one in run.windows] == [
        *[(0, 0)] * 2,
        *[(0, 1)] * 3,
        *[(1, 2)] * 1,
    ]
    whole = pipeline.generate(BOARD).frames
    first = replace(CARDS[0], prompt="a dog")
    other = pipeline.generate(replace(BOARD, cards=(first, *CARDS[1:]))).frames
    assert not torch.equal(other[CHANGE + 8 : CUT], whole[CHANGE + 8 : CUT])
    assert torch.equal(other[CUT:], whole[CUT:])
    hard = replace(CARDS[1], morph="0")
    other = pipeline.generate(replace(BOARD, cards=(CARDS[0], hard, CARDS[2]))).frames
    assert torch.equal(other[:CHANGE], whole[:CHANGE])
    assert not torch.equal(other[CHANGE:CUT], whole[CHANGE:CUT])


def test_a_changed_card_has_new_keys_from_there_to_the_next_cut(pipeline):
    changed = replace(BOARD, cards=(CARDS[0], replace(CARDS[1], prompt="a cat"), CARDS[2]))
    found = []
    for request in (BOARD, changed):
        (run,) = (plan := pipeline.plan(request)).runs
        keys = window_keys(plan, run, pipeline.info, pipeline.device, pipeline.dtype)
        found.append(keys)
    same = [one == other for one, other in zip(*found, strict=True)]
    assert same == [True, True, False, False, False, True]


def test_pictures_are_pinned_where_their_cards_begin(pipeline, tmp_path):
    Image.new("RGB", (64, 32), (250, 20, 60)).save(tmp_path / "red.png")
    picture = str(tmp_path / "red.png")
    cards = (
        Card("0", "a cat", image=picture),
        Card("1.8125", "a dog", morph="0", image=picture),  # frame 29, where latent frame 8 begins
    )
    request = replace(BOARD, cards=cards)
    (run,) = (plan := pipeline.plan(request)).runs
    conditioning = pipeline._conditioning(
        plan, run, MemoryGuard(pipeline.bundle, pipeline.executor)
    )
    assert conditioning.fixed == {(0, 0), (0, 8)}
    steps = [step for step in pipeline.stream(request) if step.phase == "denoise"]
    finished = zip(run.windows, steps[1::2], strict=True)
    pinned = {
        cell: step.latent[:, cell - window.start]
        for window, step in finished
        for cell in (0, 8)
        if window.generated[0] <= cell < window.generated[1]
    }
    for cell, latent in pinned.items():
        assert torch.equal(latent, conditioning.known[0, cell].latent)
    assert pinned.keys() == {0, 8}
    free = tuple(replace(card, strength=1.0) for card in cards)
    whole = pipeline.generate(request).frames
    other = pipeline.generate(replace(request, cards=free)).frames
    assert not torch.equal(whole[0], other[0])
    assert not torch.equal(whole[29], other[29])


@dataclass
class Strict:
    """Fails every take of a window, by the sum of its frames; the lowest take is kept."""

    bounds: ClassVar[dict[str, float]] = {"sum": 1.0}

    def __call__(self, frames, first, before):
        value = 2 + int(frames.long().sum()) % 97 / 97
        return WindowScore(value, {"sum": value})


def test_failing_windows_are_sampled_again(pipeline):
    video = pipeline.generate(LONG, critic=Strict(), retakes=2)
    windows = video.receipt["notes"]["critic"]["windows"]
    assert [len(one["takes"]) for one in windows] == [3] * 4
    assert video.receipt["notes"]["notices"] == [NOTICE]
    for one in windows:
        values = [take["score"] for take in one["takes"]]
        assert values[one["kept"]] == min(values)


def edit_request(verb, sources, reverse=False, **fields):
    """An edit with strength 0.7 where the verb has one."""
    first, second = reversed(sources.values()) if reverse else sources.values()
    values = example_edit(verb, first, second, **fields)
    if EDIT_VERBS[verb].field("strength") and "strength" not in fields:
        values["strength"] = 0.7
    edit = Edit.from_dict(values)
    return Request("a dog on the beach", edit=edit, seed=3, num_steps=2, guidance_scale=1.0)


def generated_frames(plan, frames):
    """The generated pixels of an edited video; of a masked span, those without a soft edge."""
    parts, position = [], 0
    for span in plan.timeline.spans:
        part = frames[position : position + span.frames]
        position += span.frames
        if isinstance(span, Keep):
            continue
        if span.masked:
            clip = span.init_clips[0]
            part = part[plan.sources.soft_mask(clip.start, clip.stop) == 1]
        parts.append(part.flatten())
    return torch.cat(parts)


@pytest.mark.parametrize("verb", VERBS)
def test_an_edit_verb_keeps_what_is_known_and_depends_on_its_inputs(pipeline, sources, verb):
    request = edit_request(verb, sources)
    plan = pipeline.plan(request)
    frames = pipeline.generate(request).frames
    position = 0
    for span in plan.timeline.spans:
        if isinstance(span, Keep):
            clip = span.clip
            known = plan.sources.sources[clip.source].read(clip.start, clip.stop)
            assert torch.equal(frames[position : position + span.frames], known)
        elif span.masked:
            clip = span.init_clips[0]
            free = plan.sources.soft_mask(clip.start, clip.stop) > 0
            assert free.any() and not free.all()
            source = plan.sources.sources[clip.source].read(clip.start, clip.stop)
            made = frames[position : position + span.frames]
            assert torch.equal(made[~free], source[~free])
            assert not torch.equal(made[free], source[free])
        position += span.frames
    made = generated_frames(plan, frames)
    others = {
        "prompt": replace(request, prompt="a red cat"),
        "seed": replace(request, seed=4),
        "reference": edit_request(verb, sources, reverse=True),
    }
    if EDIT_VERBS[verb].field("strength"):
        others["strength"] = edit_request(verb, sources, strength=0.9)
    if EDIT_VERBS[verb].field("region"):
        others["mask"] = edit_request(verb, sources, region="16,8,16,16@0.5-1")
    for name, other in others.items():
        changed = generated_frames(plan, pipeline.generate(other).frames)
        assert made.shape == changed.shape
        assert not torch.equal(made, changed), name


def test_a_model_of_one_noise_level_noises_its_known_frames(pipeline, calls, monkeypatch):
    family = replace(pipeline.info.record, frame_levels=False)
    monkeypatch.setattr(type(pipeline.info), "record", property(lambda self: family))
    frames = pipeline.generate(LONG).frames
    assert all(len(set(levels)) == 1 for levels in calls)
    assert len(frames) == 49


def test_an_edit_is_made_at_the_size_nearest_to_its_source(pipeline, sources, tmp_path):
    upright = cover(open_source(sources["a"]).read(), 108, 60)
    Video(upright, fps=16).save(tmp_path / "upright.mkv")
    edit = Edit("retake", [str(tmp_path / "upright.mkv")], start="0.5", stop="1")
    request = replace(LONG, seconds=None, edit=edit)
    plan = pipeline.plan(request)
    assert plan.shape.size == "64x96"
    assert plan.notices[0].endswith("resized from 60x108 to 64x96, cropped to fill it.")
    asked = pipeline.plan(replace(request, size="32x64"))
    assert asked.shape.size == "32x64"


@pytest.mark.parametrize(
    ("size", "made"), [((1080, 1920), "1280x704"), ((1920, 1080), "704x1280"), ((480, 640), None)]
)
def test_sources_of_real_sizes_on_a_model_of_720p(pipeline, tmp_path, size, made):
    height, width = size
    Video(torch.zeros(9, height, width, 3, dtype=torch.uint8), fps=16).save(tmp_path / "a.mkv")
    edit = {"verb": "remix", "videos": [str(tmp_path / "a.mkv")]}
    info = replace(pipeline.info, size_rule=FAMILY.sizes)
    plan = make_plan(replace(LONG, seconds=None, edit=edit), info, pipeline.autoencoder.scale)
    assert plan.shape.size == (made or f"{width}x{height}")
    resized = [notice for notice in plan.notices if "resized" in notice]
    ending = f"resized from {width}x{height} to {made}, cropped to fill it."
    assert [notice.endswith(ending) for notice in resized] == [True] * (made is not None)
