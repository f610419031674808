"""The registered setups: recipes of every setup, exact resuming, falling losses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diorama.train.autoencoders import AutoencoderRun
from skyloom.models.diorama.v1.autoencoder import VaeConfig
from skyloom.train.loop import LoopConfig, train
from skyloom.train.optim import OptimizerConfig
from skyloom.train.recipe import Recipe, build_task, dump_recipe, load_recipe
from skyloom.train.run_log import RunLog
from skyloom.train.setups import find_setups
from skyloom.train.state import STATE_FILE

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.toml"))
TINY = VaeConfig(latent_channels=4, decoder_widths=(8, 8, 8, 8))


@pytest.fixture
def clips(tmp_path: Path) -> str:
    """Sixteen clips of a bright square moving over a ramp, in the format of skyloom.data.shards."""
    folder = tmp_path / "clips"
    folder.mkdir()
    ramp = np.linspace(40, 160, 32, dtype=np.uint8)
    frames = np.broadcast_to(ramp[None, None, None, :, None], (16, 9, 32, 32, 3)).copy()
    for clip in range(16):
        for frame in range(9):
            frames[clip, frame, clip : clip + 8, frame : frame + 8] = (250, 200, 10 * clip)
    np.save(folder / "clips-00000.npy", frames)
    (folder / "clips-00000.json").write_text(json.dumps([{"captions": {"short": "a square"}}] * 16))
    return str(folder)


def recipe(clips: str, steps: int = 6, **loop) -> Recipe:
    run = AutoencoderRun(
        TINY, folders=(clips,), held_out=clips, batch=2, frames=5, crop=32, patches=200
    )
    every = {"log_every": 1, "save_every": 3, "evaluate_every": 100, "seed": 3}
    return Recipe(
        LoopConfig(steps=steps, **{**every, **loop}),
        OptimizerConfig(warmup=2, slow=("decoder.linear",)),
        "autoencoder",
        run,
    )


def run(config: Recipe, folder: Path, resume: bool = False) -> int:
    return train(build_task(config), config.loop, config.optimizer, folder, resume=resume)


def test_resumed_equals_uninterrupted_bit_for_bit(clips, tmp_path):
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    assert run(recipe(clips), whole) == 6
    while run(recipe(clips, minutes=1e-9), pieces, resume=True) < 6:
        pass
    first, second = load_file(whole / STATE_FILE), load_file(pieces / STATE_FILE)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len(RunLog(pieces).lines("step")) == 6


def test_learning_improves_on_the_linear_start(clips, tmp_path):
    """The first losses are those of principal components: the correction starts at 0."""
    run(recipe(clips, steps=100, save_every=100), tmp_path / "run")
    losses = [line["loss"] for line in RunLog(tmp_path / "run").lines("step")]
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])


def test_the_family_registers_its_setups():
    assert {"autoencoder", "decoder", "flow", "probe"} <= set(find_setups())


@pytest.mark.parametrize(
    "path", [path for path in RECIPES if path.stem != "synonyms"], ids=lambda path: path.stem
)
def test_every_recipe_is_read_and_its_resolved_form_is_equal(path, tmp_path):
    read = load_recipe(path, {})
    (tmp_path / "resolved.toml").write_text(dump_recipe(read))
    assert load_recipe(tmp_path / "resolved.toml", {}) == read
