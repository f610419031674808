"""The pipeline: reproducible frames, first pictures, refused requests and damaged models."""

import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image

import skyloom
from skyloom.core.errors import CheckpointError, MediaError, RequestError
from skyloom.generate.request import Request
from skyloom.media.frames import cover, to_frames, to_pixels
from skyloom.media.read import read_image
from skyloom.safety.watermark import SpreadSpectrumWatermarker, embed, watermark_id_of_receipt

ASK = Request("a red cat on the beach", seed=7, seconds=0.5)


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    return skyloom.load(str(tiny_model), dtype="bfloat16")


def test_a_prompt_becomes_a_video(pipeline):
    video = pipeline.generate("a cat", seconds=1, seed=3)
    assert video.frames.shape == (17, 32, 32, 3)
    assert video.frames.dtype == torch.uint8
    assert video.fps == 16
    assert video.receipt["request"]["seed"] == 3


def test_same_seed_same_frames_other_seed_other_frames(pipeline):
    first = pipeline.generate(ASK).frames
    assert torch.equal(pipeline.generate(ASK).frames, first)
    assert not torch.equal(pipeline.generate(replace(ASK, seed=8)).frames, first)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_threads_make_the_same_bits(tiny_model, dtype):
    pipe = skyloom.load(str(tiny_model), dtype=dtype)
    first = pipe.generate(ASK).frames
    torch.set_num_threads(2)
    assert torch.equal(pipe.generate(ASK).frames, first)


def test_in_company_is_as_alone(pipeline):
    other = Request("a dog", seed=1, seconds=1)
    together = pipeline.generate_many([other, ASK])
    assert torch.equal(together[1].frames, pipeline.generate(ASK).frames)


def test_the_prompt_and_the_negative_prompt_matter(pipeline):
    first = pipeline.generate(ASK).frames
    assert not torch.equal(pipeline.generate(replace(ASK, prompt="a dog")).frames, first)
    guided = pipeline.generate(replace(ASK, quality="best")).frames
    assert not torch.equal(pipeline.generate(replace(ASK, negative_prompt="a dog")).frames, guided)


def test_the_student_is_used_unless_the_request_needs_guidance(pipeline):
    assert pipeline.plan(ASK).student
    for fields in (
        {"quality": "best"},
        {"guidance_scale": 3.0},
        {"negative_prompt": "a dog"},
        {"num_steps": 3},
    ):
        assert not pipeline.plan(replace(ASK, **fields)).student
    assert pipeline.plan(replace(ASK, num_steps=1, guidance_scale=1.0)).student
    fast, best = (pipeline.generate(replace(ASK, quality=quality)) for quality in ("fast", "best"))
    assert torch.equal(fast.frames, pipeline.generate(ASK).frames)
    assert not torch.equal(fast.frames, best.frames)
    assert (fast.receipt["request"]["quality"], best.receipt["request"]["quality"]) == (
        "fast",
        "best",
    )


def test_a_receipt_makes_the_same_video_again(pipeline):
    video = pipeline.generate("a cat", seconds=0.5)
    again = pipeline.generate(
        replace(Request.from_dict(video.receipt["request"]), model=str(pipeline.info.folder))
    )
    assert torch.equal(video.frames, again.frames)


def test_steps_are_in_order_and_the_stream_can_stop_at_any(pipeline):
    steps = [(step.phase, step.index, step.total) for step in pipeline.stream(ASK)]
    assert steps == [("text", 1, 1), ("denoise", 1, 2), ("denoise", 2, 2), ("decode", 9, 9)]
    for count in range(1, len(steps)):
        stream = pipeline.stream(ASK)
        for _ in range(count):
            next(stream)
        stream.close()
    assert torch.equal(pipeline.generate(ASK).frames, pipeline.generate(ASK).frames)


def test_previews_are_frames(pipeline):
    pictures = [step.preview() for step in pipeline.stream(ASK)]
    assert pictures[0] is None
    assert pictures[1].shape == (32, 32, 3)


def test_the_first_picture_is_the_first_frame(pipeline, tmp_path):
    path = tmp_path / "first.png"
    Image.effect_noise((50, 40), 80).convert("RGB").save(path)
    video = pipeline.generate(replace(ASK, image=str(path)))
    pixels = to_pixels(cover(read_image(path), 32, 32))[None]
    alone = to_frames(pipeline.autoencoder.decode(pipeline.autoencoder.encode(pixels))[0])
    assert (video.frames[0].int() - alone[0].int()).abs().max() <= 1
    assert not torch.equal(video.frames, pipeline.generate(ASK).frames)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "  "}, "prompt must not be empty"),
        ({"prompt": "x" * 10_000}, "prompt must be at most 2,000 characters, got 10,000"),
        ({"size": "30x30"}, "nearest size is 32x32"),
        ({"size": "big"}, "size must be WIDTHxHEIGHT"),
        ({"seconds": 0}, "seconds must be > 0"),
        ({"seconds": 3601}, "seconds must be > 0 and <= 3600, got 3601"),
        ({"fps": 24}, "fps must be one of 16, 8"),
        ({"fps": 5}, "fps must be one of 16, 8, 4, 2, 1 for tiny, got 5"),
        ({"fps": 0.5}, "fps must be one of 16, 8"),
        (
            {"negative_prompt": "x" * 10_000},
            "negative_prompt must be at most 2,000 characters, got 10,000",
        ),
        ({"prompt": "a \udcff"}, "prompt must be valid Unicode"),
        ({"seed": -1}, "seed must be from 0"),
        ({"num_steps": 0}, "num_steps must be from 1 to 500, got 0"),
        ({"quality": "better"}, "quality must be one of fast, best for tiny, got 'better'"),
        (
            {"quality": "fast", "negative_prompt": "a dog"},
            "quality must be best for guidance or a negative prompt, got fast",
        ),
        ({"quality": "fast", "guidance_scale": 2}, "quality must be best for guidance"),
        ({"quality": "fast", "num_steps": 3}, "quality must be best for 3 steps"),
        ({"guidance_scale": -1}, "guidance_scale must be from 0 to 30, got -1"),
    ],
)
def test_invalid_requests_are_refused(pipeline, fields, message):
    with pytest.raises(RequestError, match=message):
        pipeline.stream(replace(ASK, **fields))


def test_invalid_pictures_are_refused(pipeline, tmp_path):
    path = tmp_path / "text.png"
    path.write_text("not a picture")
    with pytest.raises(MediaError, match=r"text\.png cannot be read"):
        pipeline.stream(replace(ASK, image=str(path)))
    with pytest.raises(MediaError, match="does not exist"):
        pipeline.stream(replace(ASK, image=str(tmp_path / "none.png")))


def test_unknown_models_name_the_nearest(monkeypatch, tiny_model):
    from skyloom.models import registry

    with pytest.raises(RequestError, match="Did you mean tiny"):
        registry.find_model("tinny", root=_shelf(tiny_model))


def _shelf(model):
    shelf = model.parent / "shelf"
    if not shelf.exists():
        shutil.copytree(model, shelf / "tiny")
    return shelf


@pytest.mark.parametrize("name", ["dit.safetensors", "vae.safetensors", "text.safetensors"])
def test_damaged_weights_are_named(tiny_model, tmp_path, name):
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_model, folder)
    path = folder / name
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match=name):
        skyloom.load(str(folder))
    with pytest.raises(CheckpointError, match=name):
        skyloom.load(str(folder), verify=False)
    path.unlink()
    with pytest.raises(CheckpointError):
        skyloom.load(str(folder))


def test_fields_given_beside_a_request_take_effect(pipeline):
    first = pipeline.generate(ASK).frames
    assert torch.equal(pipeline.generate(replace(ASK, seed=1), seed=7).frames, first)
    assert torch.equal(
        pipeline.generate(ASK.prompt, seed=7, seconds=0.5, num_steps=None).frames, first
    )
    with pytest.raises(RequestError, match="Did you mean 'seconds'"):
        pipeline.stream("a cat", secnods=1)


def test_a_request_for_another_model_is_refused(pipeline):
    with pytest.raises(RequestError, match=r"model must be tiny, .* got diorama"):
        pipeline.stream(replace(ASK, model="diorama"))
    pipeline.stream(replace(ASK, model="tiny"))
    pipeline.stream(replace(ASK, model=str(pipeline.info.folder)))


def test_a_slower_rate_keeps_some_of_the_same_frames(pipeline):
    whole = pipeline.generate(ASK)
    slower = pipeline.generate(ASK, fps=4)
    assert torch.equal(slower.frames, whole.frames[::4])
    assert slower.fps == 4
    assert slower.receipt["request"] == {**whole.receipt["request"], "fps": 4.0}
    assert "one in 4 is kept" in next(pipeline.stream(ASK, fps=4)).notice


def test_truncated_prompts_give_a_notice(pipeline):
    assert next(pipeline.stream(ASK)).notice is None
    notice = next(pipeline.stream(ASK, prompt="a cat " * 20, negative_prompt="dog " * 40)).notice
    assert "prompt is too long: its last" in notice
    assert "negative prompt is too long: its last 30 tokens" in notice


def test_a_notice_quotes_the_first_dropped_words(pipeline, monkeypatch):
    encode = pipeline.text_encoder.encode

    def encode_cut(prompts):
        text = encode(prompts)
        return replace(text, truncated=(3, 0), truncated_text=("by the sea", ""))

    monkeypatch.setattr(pipeline.text_encoder, "encode", encode_cut)
    expected = 'The prompt is too long: its last 3 tokens were ignored, from "by the sea" on.'
    assert next(pipeline.stream(ASK)).notice == expected


def test_a_picture_of_any_aspect_ratio_is_accepted(pipeline, tmp_path):
    path = tmp_path / "line.png"
    Image.new("RGB", (60_000, 1), "red").save(path)
    assert pipeline.generate(ASK, image=path).frames.shape == (9, 32, 32, 3)


@pytest.mark.parametrize("fps", [16, 8])
def test_every_frame_is_watermarked_with_the_id_of_its_receipt(pipeline, monkeypatch, fps):
    request = Request("a cat", size="64x64", seed=3, fps=fps)
    video = pipeline.generate(request)
    monkeypatch.setattr(SpreadSpectrumWatermarker, "mark", lambda self, frames, mask: frames)
    plain = pipeline.generate(request)
    monkeypatch.undo()
    assert torch.equal(video.frames, embed(plain.frames, watermark_id_of_receipt(video.receipt)))
    assert not torch.equal(video.frames, plain.frames)
