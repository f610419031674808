"""Edits resume after a stop at any step, give the same frames and repeat no step."""

import json
from dataclasses import replace

import pytest
import torch
from edit_examples import example_edit
from PIL import Image

import skyloom
from skyloom.core.errors import RequestError
from skyloom.generate.denoiser import Denoiser
from skyloom.generate.edit_spec import Edit
from skyloom.generate.edit_verbs import EDIT_VERBS, VERBS_WITHOUT_MODEL
from skyloom.generate.keyframes import picture_cards
from skyloom.generate.latent_store import clear, read_identity
from skyloom.generate.request import Request

GENERATING = {  # every verb that uses the model, and fields besides those of the example
    **{name: {} for name, verb in EDIT_VERBS.items() if verb.uses_model},
    "extend backward": {"backward": True},
    "recut": {"seconds": "3"},
    "blend": {"curve": "0:0,0.5:1,1:1,1.5:0"},
}
MAX_LIVES = 60


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    return skyloom.load(str(tiny_model), dtype="float32")


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    """Two lossless videos of the tiny model, and two pictures."""
    folder = tmp_path_factory.mktemp("sources")
    for seed, name in enumerate(("a", "b")):
        pipeline.generate("a red cat", seed=seed, seconds=1.75, num_steps=1).save(
            folder / f"{name}.mkv"
        )
        Image.effect_noise((32, 32), 40 + 40 * seed).convert("RGB").save(folder / f"{name}.png")
    return folder


@pytest.fixture(autouse=True)
def nothing_cached(monkeypatch):
    """What is found again is found in the folder to resume from."""
    monkeypatch.setenv("SKYLOOM_CACHE", "off")


@pytest.fixture
def calls(monkeypatch):
    """One entry for each call of the network."""
    calls, velocity = [], Denoiser.velocity
    monkeypatch.setattr(Denoiser, "velocity", lambda *given: calls.append(1) or velocity(*given))
    return calls


def make_request(name, folder, **parameters):
    videos = [str(folder / f"{one}.mkv") for one in ("a", "b", "a")]
    values = example_edit(name.split()[0], *videos, **GENERATING.get(name, {}), **parameters)
    edit = Edit.from_dict(values)
    sampling = {"seed": 3, "num_steps": 2} if edit.needs_model else {}
    return Request("a dog on the beach", edit=edit, **sampling)


def lives(pipeline, request, resume, calls):
    """Stop after every new call of the network until the video is done.

    Returns the frames of the last run and the number of runs.
    """
    for life in range(MAX_LIVES):
        stream, before, frames = pipeline.stream(request, resume=resume), len(calls), []
        for step in stream:
            frames += [] if step.frames is None else [step.frames]
            if len(calls) > before:
                break
        else:
            return torch.cat(frames), step.receipt, life
        stream.close()
    raise AssertionError("it never comes to its end")


@pytest.mark.parametrize("name", GENERATING)
def test_stopped_at_every_step_it_goes_on_to_the_same_frames_and_makes_none_twice(
    pipeline, folder, tmp_path, calls, name
):
    request = make_request(name, folder)
    whole = pipeline.generate(request)
    once = len(calls)
    assert once == len(pipeline.plan(request).windows) * request.num_steps
    frames, receipt, count = lives(pipeline, request, tmp_path / "kept", calls)
    assert torch.equal(frames, whole.frames)
    assert receipt == whole.receipt
    assert (count, len(calls)) == (once, 2 * once)


def test_pictures_set_in_motion_go_on_too(pipeline, folder, tmp_path, calls):
    cards, seconds = picture_cards(folder / "a.png", "a dog", folder / "b.png", [], 1.0)
    request = Request("", cards=cards, seconds=seconds, seed=3, num_steps=2)
    whole = pipeline.generate(request)
    once = len(calls)
    frames, receipt, count = lives(pipeline, request, tmp_path / "kept", calls)
    assert torch.equal(frames, whole.frames)
    assert receipt == whole.receipt
    assert (count, len(calls)) == (once, 2 * once)


@pytest.mark.parametrize("name", VERBS_WITHOUT_MODEL)
def test_without_a_model_they_take_a_folder_and_begin_again(pipeline, folder, tmp_path, name):
    request = make_request(name, folder)
    whole = pipeline.generate(request).frames
    next(pipeline.stream(request, resume=tmp_path / "kept"))
    assert torch.equal(pipeline.generate(request, resume=tmp_path / "kept").frames, whole)


def test_a_span_that_the_cache_has_is_shown_with_the_bits_that_it_was_made_with(
    pipeline, folder, tmp_path, calls, monkeypatch
):
    """The first span comes from the cache, the second resumes from the folder."""
    request = make_request("recut", folder)
    whole = pipeline.generate(request).frames
    once = len(calls)
    monkeypatch.setenv("SKYLOOM_CACHE", str(tmp_path / "cache"))
    frames, _, _ = lives(pipeline, request, tmp_path / "kept", calls)
    assert list((tmp_path / "cache").rglob("*.state"))
    assert torch.equal(frames, whole)
    assert len(calls) == 2 * once


def test_progress_goes_on_where_it_was(pipeline, folder, tmp_path):
    request = make_request("recut", folder)
    stream = pipeline.stream(request, resume=tmp_path / "kept")
    steps = [step for step in stream if step.phase == "denoise"]
    assert [step.index for step in steps] == list(range(1, steps[-1].total + 1))
    again = [
        step.index
        for step in pipeline.stream(request, resume=tmp_path / "kept")
        if step.phase == "denoise"
    ]
    assert again == [step.index for step in steps if step.index % request.num_steps == 0]


@pytest.mark.parametrize("cut", [slice(0, -9), slice(0, 0)])
def test_torn_states_of_a_span_are_made_again(pipeline, folder, tmp_path, cut):
    request = make_request("recut", folder)
    whole = pipeline.generate(request, resume=tmp_path / "kept")
    states = sorted((tmp_path / "kept").glob("span-*/window-*.state"))
    assert len({path.parent for path in states}) == 2
    for path in states[::2]:
        path.write_bytes(path.read_bytes()[cut])
    again = pipeline.generate(request, resume=tmp_path / "kept")
    assert torch.equal(again.frames, whole.frames)


def test_the_state_of_one_span_is_not_taken_for_another(pipeline, folder, tmp_path, calls):
    request = make_request("stitch", folder)
    whole = pipeline.generate(request, resume=tmp_path / "kept")
    once = len(calls)
    first, second = (
        tmp_path / "kept" / f"span-00{number}" / "window-000000.state" for number in (0, 1)
    )
    second.write_bytes(first.read_bytes())
    again = pipeline.generate(request, resume=tmp_path / "kept")
    assert torch.equal(again.frames, whole.frames)
    assert len(calls) == once + request.num_steps


def test_another_edit_or_a_changed_source_is_refused(pipeline, folder, tmp_path):
    (folder / "c.mkv").write_bytes((folder / "a.mkv").read_bytes())
    edit = Edit("retake", (str(folder / "c.mkv"),), start="0.5", stop="1")
    request = Request("a dog", seed=3, num_steps=1, edit=edit)
    pipeline.generate(request, resume=tmp_path / "kept")
    with pytest.raises(RequestError, match="belongs to another video: its `edit`"):
        pipeline.stream(replace(request, edit=replace(edit, stop="1.25")), resume=tmp_path / "kept")
    (folder / "c.mkv").write_bytes((folder / "b.mkv").read_bytes())
    with pytest.raises(RequestError, match="belongs to another video: its `parents`"):
        pipeline.stream(request, resume=tmp_path / "kept")


def test_clearing_takes_the_spans_along(pipeline, folder, tmp_path):
    pipeline.generate(make_request("recut", folder), resume=tmp_path / "kept")
    assert read_identity(tmp_path / "kept")["request"]["seed"] == 3
    clear(tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_a_damaged_span_identity_is_refused_before_any_work(pipeline, folder, tmp_path, calls):
    request = make_request("retake", folder)
    pipeline.generate(request, resume=tmp_path / "kept")
    words = tmp_path / "kept" / "span-000" / "asked.json"
    words.write_text(json.dumps({"asked": {}, "sha256": ""}))
    with pytest.raises(RequestError, match="damaged"):
        pipeline.stream(request, resume=tmp_path / "kept")
