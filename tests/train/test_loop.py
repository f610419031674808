"""The loop: exact resuming, clear errors, falling losses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from skyloom.core.config import load_config
from skyloom.core.errors import CheckpointError, ConfigError
from skyloom.models.diorama.v1.autoencoder import VaeConfig
from skyloom.train.loop import LoopConfig, train
from skyloom.train.optim import OptimizerConfig, learning_rate
from skyloom.train.recipe import AutoencoderRun, Recipe, build_task
from skyloom.train.run_log import RunLog
from skyloom.train.state import STATE_FILE

TINY = VaeConfig(latent_channels=4, decoder_widths=(8, 8, 8, 8))


@pytest.fixture
def clips(tmp_path: Path) -> str:
    """Sixteen clips of a bright square moving over a ramp, in the format of data/clips.py."""
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
        autoencoder=run,
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


def test_a_folder_with_a_run_is_not_overwritten(clips, tmp_path):
    run(recipe(clips, steps=1), tmp_path / "run")
    with pytest.raises(ConfigError, match="already contains a run"):
        run(recipe(clips, steps=1), tmp_path / "run")


def test_a_damaged_state_is_refused(clips, tmp_path):
    run(recipe(clips, steps=1), tmp_path / "run")
    path = tmp_path / "run" / STATE_FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="does not fit this recipe"):
        run(recipe(clips, steps=2), tmp_path / "run", resume=True)


def test_learning_improves_on_the_linear_start(clips, tmp_path):
    """The first losses are those of principal components: the correction starts at 0."""
    run(recipe(clips, steps=100, save_every=100), tmp_path / "run")
    losses = [line["loss"] for line in RunLog(tmp_path / "run").lines("step")]
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])


def test_learning_rate_rises_holds_and_falls():
    config = OptimizerConfig(lr=1.0, warmup=10, decay_share=0.5, floor=0.1)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:50] == [1.0] * 41
    assert rates[75] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.1)


def test_a_recipe_needs_exactly_one_objective():
    with pytest.raises(ConfigError, match="exactly one"):
        build_task(Recipe(LoopConfig(), OptimizerConfig()))


def test_recipes_of_version_0_1_are_read_and_their_other_optimizer_is_refused(tmp_path):
    path = tmp_path / "recipe.toml"
    optimizer = '[loop]\n[optimizer]\nmomentum = 0.95\nlr = 0.5\nkind = "{}"\n'
    path.write_text(optimizer.format("adamw"))
    assert load_config(path, Recipe).optimizer.lr == 0.5
    path.write_text(optimizer.format("muon"))
    with pytest.raises(ConfigError, match="must be 'adamw', got 'muon'"):
        load_config(path, Recipe)


def test_a_state_of_another_optimizer_is_refused(clips, tmp_path):
    run(recipe(clips, steps=1), tmp_path / "run")
    path = tmp_path / "run" / STATE_FILE
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = {
        name.replace("exp_avg_sq", "average"): value for name, value in load_file(path).items()
    }
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(CheckpointError, match="must be AdamW's"):
        run(recipe(clips, steps=2), tmp_path / "run", resume=True)
