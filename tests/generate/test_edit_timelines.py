"""Every verb on the tiny model: kept frames are bit-identical, others follow the request."""

from fractions import Fraction

import pytest
import torch
from PIL import Image

import skyloom
from skyloom.core.errors import MediaError, RequestError
from skyloom.generate.denoiser import Denoiser
from skyloom.generate.edit_spec import Edit
from skyloom.generate.receipt import read_receipt
from skyloom.generate.replay import request_from_receipt
from skyloom.generate.request import Request
from skyloom.media.source import open_source
from skyloom.media.write import write_video

FRAMES, SIDE = 33, 32  # two seconds of the source, and a frame


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    return skyloom.load(str(tiny_model), dtype="float32")


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    """Two lossless videos of the tiny model."""
    folder = tmp_path_factory.mktemp("sources")
    for seed, name in enumerate(("a", "b")):
        pipeline.generate("a red cat", seed=seed, seconds=2, num_steps=1).save(
            folder / f"{name}.mkv"
        )
    return folder


@pytest.fixture
def edit(pipeline, folder):
    """`edit("retake", start="1", stop="2")`: the edited video."""

    def run(verb, prompt="a dog on the beach", *, seed=3, videos=("a",), **parameters):
        paths = [str(folder / f"{name}.mkv") for name in videos]
        edit = Edit(verb, paths, **parameters)
        sampled = {"seed": seed, "num_steps": 1} if edit.needs_model else {}
        return pipeline.generate(Request(prompt, edit=edit, **sampled))

    return run


@pytest.fixture
def frames(folder):
    return [open_source(folder / f"{name}.mkv").read() for name in ("a", "b")]


def spans(video):
    return [tuple(span) for span in video.receipt["notes"]["spans"]]


KEPT = {  # what stays: frames of the result, of which source, from where
    "retake": ({"start": "0.5", "stop": "1"}, [(0, 8, 0, 0), (16, 33, 0, 16)], 33),
    "extend": ({"seconds": "0.5"}, [(0, 33, 0, 0)], 41),
    "recut": ({"start": "0.5", "stop": "1", "seconds": "2"}, [(12, 20, 0, 8)], 33),
    "loop": ({"start": "0.5", "stop": "1.5", "bridge": "0.25"}, [(0, 16, 0, 8)], 20),
    "stitch": ({"videos": ("a", "b"), "morph": "0.25"}, [(0, 33, 0, 0), (37, 70, 1, 0)], 70),
    "blend": ({"videos": ("a", "b"), "seconds": "0.5"}, [(0, 25, 0, 0), (33, 58, 1, 8)], 58),
}


@pytest.mark.parametrize("verb", KEPT)
def test_what_is_kept_is_the_sources_bit_for_bit_in_memory_and_in_a_lossless_file(
    edit, frames, verb, tmp_path
):
    parameters, kept, count = KEPT[verb]
    video = edit(verb, **parameters)
    there = open_source(video.save(tmp_path / "out.mkv")).read()
    assert len(video.frames) == count
    assert torch.equal(there, video.frames)
    for begin, end, source, start in kept:
        assert torch.equal(video.frames[begin:end], frames[source][start : start + end - begin])
    covered = {(begin, end, "kept") for begin, end, _, _ in kept}
    assert {span for span in spans(video) if span[2] == "kept"} == covered
    assert spans(video)[-1][1] == count
    edges = {str(end) for _, end, _ in spans(video)[:-1]}
    assert set(video.receipt["notes"]["seams"]) == edges


def test_extending_backward_ends_with_the_source(edit, frames):
    video = edit("extend", seconds="0.5", backward=True)
    assert torch.equal(video.frames[-FRAMES:], frames[0])
    assert len(video.frames) == FRAMES + 8


@pytest.mark.parametrize("verb", ["remix", "restyle", "retake", "inpaint"])
def test_without_strength_the_source_comes_back(edit, frames, verb):
    parameters = {"restyle": {"style": "at night"}, "inpaint": {"region": "0,0,16,16"}}.get(
        verb, {}
    )
    assert torch.equal(edit(verb, strength=0, **parameters).frames, frames[0])


@pytest.mark.parametrize("verb", ["remix", "restyle"])
def test_with_strength_the_whole_is_made(edit, frames, verb):
    parameters = {"style": "at night"} if verb == "restyle" else {}
    video = edit(verb, **parameters)
    assert video.frames.shape == frames[0].shape
    assert spans(video) == [(0, FRAMES, "generated")]
    assert not torch.equal(video.frames, frames[0])


def test_hardly_any_strength_hardly_moves_what_the_autoencoder_makes_of_the_source(edit):
    little, less, much = (
        edit("remix", strength=strength).frames.float() for strength in (0.02, 0.01, 1.0)
    )
    assert (little - less).abs().mean() < (much - less).abs().mean()


def test_outside_of_a_region_not_a_bit_changes(edit, frames):
    video = edit("inpaint", region="8,8,16,16", feather=2)
    inside = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    inside[8:24, 8:24] = True
    assert torch.equal(video.frames[:, ~inside], frames[0][:, ~inside])
    assert not torch.equal(video.frames[:, inside], frames[0][:, inside])


def test_a_region_may_hold_for_a_while_and_may_move(edit, frames):
    video = edit("inpaint", region="0,0,16,16@0.5-1")
    assert spans(video) == [(0, 8, "kept"), (8, 16, "generated"), (16, FRAMES, "kept")]
    assert torch.equal(video.frames[:, 16:], frames[0][:, 16:])
    moving = edit("inpaint", region="0,0,8,8@0; 24,0,8,8@2")
    assert torch.equal(moving.frames[:, 8:], frames[0][:, 8:])
    assert torch.equal(moving.frames[0, :, 8:], frames[0][0, :, 8:])
    assert torch.equal(moving.frames[-1, :, :24], frames[0][-1, :, :24])


def test_a_mask_may_be_a_picture_or_a_video(edit, frames, tmp_path):
    picture, film = tmp_path / "mask.png", tmp_path / "mask.mkv"
    white = torch.zeros(FRAMES, SIDE, SIDE, 3, dtype=torch.uint8)
    white[:, :, 16:] = 255
    Image.fromarray(white[0].numpy()).save(picture)
    write_video(white, 16, film)
    still = edit("inpaint", mask=str(picture)).frames
    assert torch.equal(still[:, :, :16], frames[0][:, :, :16])
    assert not torch.equal(still, frames[0])
    assert torch.equal(edit("inpaint", mask=str(film)).frames, still)


def test_shares_of_a_blend_follow_its_curve(edit, frames):
    whole = edit("blend", videos=("a", "b"), curve="0:0,0.5:0,1:1,2:1").frames
    assert torch.equal(whole[:9], frames[0][:9])
    assert torch.equal(whole[16:], frames[1][16:])
    borrowed = edit("blend", videos=("a", "b"), curve="0:0,1:1,2:0")
    assert spans(borrowed) == [
        (0, 1, "kept"),
        (1, 16, "generated"),
        (16, 17, "kept"),
        (17, 32, "generated"),
        (32, 33, "kept"),
    ]
    assert torch.equal(borrowed.frames[16], frames[1][16])
    assert torch.equal(borrowed.frames[32], frames[0][32])


def test_a_hard_cut_makes_nothing(edit, frames):
    video = edit("stitch", "", videos=("a", "b", "a"), morph="0")
    assert torch.equal(video.frames, torch.cat([frames[0], frames[1], frames[0]]))
    assert [parent["verb"] for parent in video.receipt["parents"]] == ["stitch"] * 3


def test_a_loop_says_how_it_closes(edit):
    assert edit("loop", bridge="0.5").receipt["notes"]["closure"] > 0


def test_filters_keep_what_was_there(edit, frames):
    smooth = edit("interpolate", "", fps="32")
    assert smooth.fps == Fraction(32)
    assert torch.equal(smooth.frames[::2], frames[0])
    large = edit("upscale", "", size="64x48")
    assert large.frames.shape == (FRAMES, 48, 64, 3)
    assert not {"seed", "num_steps", "guidance_scale", "quality"} & large.receipt["request"].keys()


@pytest.mark.parametrize(
    "setting",
    [
        {"seed": 1},
        {"num_steps": 2},
        {"guidance_scale": 2.0},
        {"quality": "best"},
        {"negative_prompt": "fog"},
    ],
    ids=lambda setting: next(iter(setting)),
)
@pytest.mark.parametrize(
    ("verb", "parameters"),
    [("upscale", {"size": "64x48"}), ("interpolate", {"fps": 32}), ("stitch", {"morph": "0/2"})],
)
def test_where_nothing_is_sampled_no_setting_of_sampling_is_taken(
    pipeline, folder, verb, parameters, setting
):
    videos = [folder / "a.mkv", folder / "b.mkv"] if verb == "stitch" else [folder / "a.mkv"]
    edit = Edit(verb, videos, **parameters)
    with pytest.raises(RequestError, match="must be left out for") as raised:
        pipeline.plan(Request("", edit=edit, **setting))
    assert raised.value.field in setting
    assert pipeline.plan(Request("", edit=edit)).request.seed is None
    if verb == "stitch":
        assert pipeline.plan(Request("", edit=Edit(verb, videos, morph=0.5), **setting))


def test_what_is_made_hangs_neither_on_where_it_lies_nor_on_the_length(
    edit, pipeline, frames, folder
):
    write_video(frames[0].repeat(2, 1, 1, 1)[:-1], 16, folder / "long.mkv")
    write_video(torch.cat([frames[1][:16], frames[0]]), 16, folder / "later.mkv")
    made = edit("retake", start="0.75", stop="1").frames[12:16]
    assert torch.equal(edit("retake", videos=("long",), start="0.75", stop="1").frames[12:16], made)
    assert torch.equal(
        edit("retake", videos=("later",), start="1.75", stop="2").frames[28:32], made
    )
    assert not torch.equal(edit("retake", seed=4, start="0.75", stop="1").frames[12:16], made)


def test_what_was_made_is_not_made_again(pipeline, folder, monkeypatch):
    request = Request(
        "a dog", seed=9, num_steps=1, edit=Edit("extend", (folder / "a.mkv",), seconds="0.5")
    )

    calls = []
    velocity = Denoiser.velocity
    monkeypatch.setattr(Denoiser, "velocity", lambda *given: calls.append(1) or velocity(*given))

    def run():
        calls.clear()
        frames = pipeline.generate(request).frames
        return len(calls), frames

    (first, one), (second, two) = run(), run()
    assert first > 0 == second
    assert torch.equal(one, two)
    monkeypatch.setenv("SKYLOOM_CACHE", "off")
    third, three = run()
    assert third == first
    assert torch.equal(three, one)


def test_sources_of_another_rate_and_size_are_brought_over_or_refused(pipeline, tmp_path):
    foreign = write_video(
        torch.arange(48 * 40 * 56 * 3).reshape(48, 40, 56, 3).to(torch.uint8),
        24,
        tmp_path / "x.mkv",
    )
    video = pipeline.generate(
        Request("a cat", seed=1, num_steps=1, edit=Edit("extend", (foreign,), seconds="0.25"))
    )
    assert video.frames.shape == (32 + 4, SIDE, SIDE, 3)
    assert any("resized" in notice for notice in video.receipt["notes"]["notices"])
    with pytest.raises(RequestError, match="would have to be res"):
        pipeline.plan(Request("a cat", edit=Edit("extend", (foreign,), seconds="1", strict=True)))


def test_an_edit_is_made_again_from_the_very_files(edit, folder, pipeline, tmp_path):
    (folder / "c.mkv").write_bytes((folder / "a.mkv").read_bytes())
    video = edit("retake", videos=("c",), start="1", stop="1.25")
    receipt = read_receipt(video.save(tmp_path / "out.mkv"))
    assert torch.equal(pipeline.generate(request_from_receipt(receipt)).frames, video.frames)
    (folder / "c.mkv").write_bytes((folder / "b.mkv").read_bytes())
    with pytest.raises(RequestError, match=r"c\.mkv is not the file that was edited"):
        request_from_receipt(receipt)
    (folder / "c.mkv").unlink()
    with pytest.raises(MediaError, match=r"c\.mkv cannot be read"):
        request_from_receipt(receipt)


@pytest.mark.parametrize(
    ("verb", "parameters", "message"),
    [
        ("retake", {"start": "3", "stop": "4"}, "start must be <"),
        ("retake", {"start": "1", "stop": "2:00"}, "stop must be <="),
        ("retake", {"start": "1", "stop": "1"}, "at least one frame after start"),
        ("recut", {"start": "0", "stop": "2", "seconds": "1"}, "seconds must be >= 1.94"),
        ("extend", {"seconds": "0"}, "at least one frame"),
        ("extend", {"seconds": "9:00:00"}, "seconds must be <= 3600"),
        ("extend", {"seconds": "3600"}, "at most 3600 seconds long, got 3602"),
        ("inpaint", {"region": "0,0,8,8@5-6"}, "must overlap the video"),
        ("inpaint", {"region": "100,100,8,8"}, "must overlap the video"),
        ("interpolate", {"fps": "16"}, "fps must be > 16"),
        ("interpolate", {"fps": "many"}, "fps must be a number"),
        ("upscale", {"size": "big"}, "size must be WIDTHxHEIGHT"),
        ("upscale", {"size": "16x16"}, "size must be larger than the video"),
        ("blend", {"videos": ("a", "b"), "curve": "wild"}, "curve must be"),
        (
            "blend",
            {"videos": ("a", "b"), "curve": "mix", "seconds": "1"},
            "seconds must be left out for the curve",
        ),
    ],
)
def test_impossible_edits_are_refused_by_the_plan(pipeline, folder, verb, parameters, message):
    videos = [folder / f"{name}.mkv" for name in parameters.pop("videos", ("a",))]
    with pytest.raises((RequestError, MediaError), match=message):
        pipeline.plan(Request("a cat", edit=Edit(verb, videos, **parameters)))


def test_invalid_videos_and_masks_are_refused(pipeline, folder, tmp_path):
    text, black, small = tmp_path / "text.mp4", tmp_path / "black.png", tmp_path / "small.png"
    text.write_text("not a video")
    Image.new("RGB", (SIDE, SIDE)).save(black)
    Image.new("RGB", (8, 8), "white").save(small)
    short = write_video(
        torch.full((4, SIDE, SIDE, 3), 255, dtype=torch.uint8), 16, tmp_path / "short.mkv"
    )
    video = folder / "a.mkv"
    for edit, message in {
        Edit("remix", (text,)): r"text\.mp4",
        Edit("remix", (tmp_path / "none.mp4",)): r"none\.mp4",
        Edit("inpaint", (video,), mask=str(black)): "empty",
        Edit("inpaint", (video,), mask=str(small)): "must be 32x32 like the video, got 8x8",
        Edit("inpaint", (video,), mask=str(short)): "must have 33 frames like the video, got 4",
    }.items():
        with pytest.raises((RequestError, MediaError), match=message):
            pipeline.plan(Request("a cat", edit=edit))


@pytest.mark.parametrize(
    "fields",
    [
        {"seconds": 3},
        {"fps": 8},
        {"image": "a.png"},
        {"retakes": 1},
        {"cards": ({"at": "0", "prompt": "a"},)},
    ],
)
def test_fields_that_an_edit_takes_from_its_videos_are_refused(pipeline, folder, fields):
    with pytest.raises(RequestError, match="must be left out for an edit"):
        pipeline.plan(Request("a cat", edit=Edit("remix", (folder / "a.mkv",)), **fields))
