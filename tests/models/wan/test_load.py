"""A Wan model from its files to a video, with tiny random weights in diffusers' layout."""

import dataclasses
import json
import shutil

import pytest
import torch
import wan_models

import skyloom
from skyloom.core.errors import CheckpointError, ConfigError
from skyloom.generate.receipt import weights_digest
from skyloom.generate.request import Request
from skyloom.models.base import ModelBundle
from skyloom.models.registry import find_family, read_model
from skyloom.models.wan.config import NEGATIVE_PROMPT

VARIANTS = ("ti2v-5b", "t2v-1.3b")
REQUEST = Request("a cat on the beach", size="64x64", seconds=0.5, seed=1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Folders in diffusers' layout, by variant."""
    root = tmp_path_factory.mktemp("wan")
    for variant in VARIANTS:
        wan_models.write_parts(root / variant, variant)
    return root


@pytest.fixture
def model(weights, tmp_path):
    """The folder of a model of a variant."""

    def make(kind: str, **values: object):
        folder = tmp_path / "tiny-wan"
        return wan_models.write_model(folder, weights / kind, **{"variant": kind, **values})

    return make


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_prompt_becomes_a_video(model, variant):
    pipeline = skyloom.load(str(model(variant)))
    record = find_family("wan", variant)
    assert (pipeline.info.fps, pipeline.info.schedule) == (record.fps, record.schedule)
    video = pipeline.generate(REQUEST)
    assert video.fps == record.fps
    assert video.frames.shape[1:] == (64, 64, 3)
    assert video.frames.float().std() > 10
    again = pipeline.generate(REQUEST)
    assert torch.equal(again.frames, video.frames)
    other = pipeline.generate(dataclasses.replace(REQUEST, prompt="a red dog at night"))
    assert not torch.equal(other.frames, video.frames)


def test_the_negative_prompt_of_the_family_is_used_and_recorded(model):
    pipeline = skyloom.load(str(model("t2v-1.3b")))
    assert pipeline.plan(REQUEST).request.negative_prompt == NEGATIVE_PROMPT
    own = dataclasses.replace(REQUEST, negative_prompt="rain")
    assert pipeline.plan(own).request.negative_prompt == "rain"
    without_guidance = dataclasses.replace(REQUEST, guidance_scale=1.0)
    assert pipeline.plan(without_guidance).request.negative_prompt == ""
    assert not torch.equal(pipeline.generate(own).frames, pipeline.generate(REQUEST).frames)


def test_a_picture_is_the_first_frame(model, tmp_path):
    pipeline = skyloom.load(str(model("ti2v-5b")))
    picture = pipeline.generate(REQUEST).frames[0]
    path = tmp_path / "first.png"
    from PIL import Image

    Image.fromarray(picture.numpy()).save(path)
    video = pipeline.generate(dataclasses.replace(REQUEST, image=str(path), seed=2))
    free = pipeline.generate(dataclasses.replace(REQUEST, seed=2))
    assert not torch.equal(video.frames, free.frames)


def test_the_autoencoder_of_the_other_kind_is_refused(model, weights):
    folder = model("ti2v-5b")
    manifest = json.loads((folder / "manifest.json").read_text())
    other = json.loads((model("t2v-1.3b") / "manifest.json").read_text())
    manifest["parts"]["autoencoder"] = other["parts"]["autoencoder"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"latents of 48 channels.*reads 16"):
        skyloom.load(str(folder))


def test_a_config_that_contradicts_the_tensors_is_refused(weights, tmp_path):
    copied = tmp_path / "weights"
    shutil.copytree(weights / "t2v-1.3b", copied)
    file = copied / "transformer" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "num_layers": 3}))
    folder = wan_models.write_model(tmp_path / "tiny-wan", copied, "t2v-1.3b")
    with pytest.raises(CheckpointError, match="says width 48 and 3 layers, the tensors have"):
        skyloom.load(str(folder))


def test_unknown_variants_and_half_precision_are_refused(model):
    with pytest.raises(CheckpointError, match="variant must be one of ti2v-5b, t2v-14b"):
        read_model(model("t2v-1.3b", **{"variant": "t2v-99b"}))
    info = read_model(model("t2v-1.3b"))
    with pytest.raises(ConfigError, match="dtype must be bf16 or fp32"):
        ModelBundle.load(info, torch.device("cpu"), torch.float16)


def test_the_receipt_identifies_the_weights_of_all_parts(model, weights, tmp_path):
    info = read_model(model("t2v-1.3b"))
    assert sorted(info.file_hashes) == [
        "autoencoder/0",
        "text_encoder/0",
        "tokenizer/0",
        "transformer/0",
    ]
    receipt = skyloom.load(str(info.folder)).generate(REQUEST).receipt
    assert receipt["weights"] == weights_digest(info.file_hashes)
    assert receipt["weights"] != weights_digest({})
