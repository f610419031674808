"""Decoder training on noisy latents; encoder and components are frozen."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from diorama.train.autoencoders import (
    DecoderRun,
    load_autoencoder,
    load_encoder,
    measure_decoder,
    save_components,
)
from skyloom.models.diorama.config import AutoencoderConfig
from skyloom.train.loop import LoopConfig, train
from skyloom.train.optim import OptimizerConfig
from skyloom.train.recipe import Recipe, build_task

CONFIG = AutoencoderConfig(channels=6, widths=(8, 8), blocks=(1, 1))


def write_clips(folder: Path, frames: int, size: int) -> None:
    """Twelve clips of a bright square that moves over a ramp."""
    folder.mkdir()
    ramp = np.linspace(40, 160, size, dtype=np.uint8)
    clips = np.broadcast_to(ramp[None, None, None, :, None], (12, frames, size, size, 3)).copy()
    for clip in range(12):
        for frame in range(frames):
            clips[clip, frame, clip : clip + 16, 2 * frame : 2 * frame + 16] = (250, 200, 20 * clip)
    np.save(folder / "clips-00000.npy", clips)
    (folder / "clips-00000.json").write_text(json.dumps([{"captions": {"short": "a square"}}] * 12))


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    write_clips(tmp_path / "clips", 9, 64)
    write_clips(tmp_path / "stills", 1, 64)
    write_clips(tmp_path / "small", 9, 32)
    save_components(tmp_path / "components", CONFIG, [tmp_path / "small"], 800)
    return tmp_path


def recipe(folders: Path, steps: int) -> Recipe:
    run = DecoderRun(
        init=str(folders / "components"),
        clips=(str(folders / "clips"),),
        stills=(str(folders / "stills"),),
        held_out=str(folders / "clips"),
        batch=2,
        frames=5,
        crop=32,
    )
    loop = LoopConfig(steps=steps, log_every=1, save_every=10, evaluate_every=1000, ema_decay=0.9)
    return Recipe(loop, OptimizerConfig(lr=5e-3, warmup=2), "decoder", run)


def test_training_improves_what_is_decoded_and_leaves_the_components(folders: Path):
    wanted = recipe(folders, 60)
    train(build_task(wanted), wanted.loop, wanted.optimizer, folders / "run", resume=False)
    before, after = load_autoencoder(folders / "components"), load_autoencoder(folders / "run")
    decibels = [measure_decoder(one, folders / "clips")["psnr@0.2"] for one in (before, after)]
    assert decibels[1] > decibels[0] + 0.3
    assert torch.equal(before.components.weight.bfloat16(), after.components.weight.bfloat16())


def test_a_resumed_run_equals_an_uninterrupted_one(folders: Path):
    whole, half = recipe(folders, 6), recipe(folders, 3)
    train(
        build_task(whole),
        whole.loop,
        OptimizerConfig(decay_share=0.0),
        folders / "whole",
        resume=False,
    )
    train(
        build_task(half),
        half.loop,
        OptimizerConfig(decay_share=0.0),
        folders / "halves",
        resume=False,
    )
    train(
        build_task(whole),
        whole.loop,
        OptimizerConfig(decay_share=0.0),
        folders / "halves",
        resume=True,
    )
    states = [load_autoencoder(folders / name).state_dict() for name in ("whole", "halves")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_renders_are_encoded_at_the_encoders_resolution(folders: Path):
    encode, device = load_encoder(folders / "components", "cpu")
    with torch.no_grad():
        assert encode(torch.zeros(1, 3, 9, 32, 32, device=device)).shape == (1, 6, 3, 4, 4)
