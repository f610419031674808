"""The loop and recipes: exact resuming, clear errors, registered setups."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from skyloom.core.errors import CheckpointError, ConfigError
from skyloom.train.loop import LoopConfig, Task, train
from skyloom.train.objectives import Losses
from skyloom.train.optim import OptimizerConfig, learning_rate
from skyloom.train.recipe import load_recipe, run_recipe
from skyloom.train.run_log import RunLog
from skyloom.train.setups import Setup, find_setups, register_setup
from skyloom.train.state import STATE_FILE


@dataclass(frozen=True)
class LineRun:
    """Settings of a linear regression."""

    width: int = 3


def line_task(run: LineRun, loop: LoopConfig) -> Task:
    """Learn the sum of the inputs."""
    torch.manual_seed(loop.seed)

    def losses(module: nn.Module, batch: torch.Tensor, random: torch.Generator) -> Losses:
        noisy = batch + 0.01 * torch.randn(batch.shape, generator=random)
        error = (module(noisy)[:, 0] - batch.sum(1)).square().mean()
        return Losses(error, {"squared": error})

    return Task(
        module=nn.Linear(run.width, 1),
        batch=lambda step: torch.randn(4, run.width, generator=torch.Generator().manual_seed(step)),
        losses=losses,
        evaluate=lambda module, folder, step: {},
        export=lambda weights, folder, step: save_file(weights, folder / "line.safetensors"),
    )


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """Only the setup "line" is registered."""
    monkeypatch.setattr("skyloom.train.setups._SETUPS", {})
    monkeypatch.setattr("skyloom.train.setups.entry_points", lambda group: ())
    register_setup("line", Setup(LineRun, line_task))


def write_recipe(tmp_path: Path, text: str = "[line]\n") -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(f"[loop]\nsteps = 6\nsave_every = 3\nlog_every = 1\n[optimizer]\n{text}")
    return path


def run(tmp_path: Path, folder: str, resume: bool = False, **overrides: str) -> int:
    changes = {f"loop.{name}": value for name, value in overrides.items()}
    return run_recipe(write_recipe(tmp_path), changes, tmp_path / folder, resume=resume)


def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path):
    assert run(tmp_path, "whole") == 6
    while run(tmp_path, "pieces", resume=True, minutes="1e-9") < 6:
        pass
    first, second = (load_file(tmp_path / name / STATE_FILE) for name in ("whole", "pieces"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len(RunLog(tmp_path / "pieces").lines("step")) == 6


def test_the_resolved_recipe_is_stored_and_runs_again(tmp_path):
    run(tmp_path, "first", seed="7")
    stored = tmp_path / "first" / "recipe.toml"
    assert load_recipe(stored, {}).loop.seed == 7
    assert load_recipe(stored, {}).settings == LineRun()
    run_recipe(stored, {}, tmp_path / "second")
    first, second = (load_file(tmp_path / name / STATE_FILE) for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    run(tmp_path, "run", steps="1")
    with pytest.raises(ConfigError, match="already contains a run"):
        run(tmp_path, "run", steps="1")


def test_a_damaged_state_is_refused(tmp_path):
    run(tmp_path, "run", steps="1")
    path = tmp_path / "run" / STATE_FILE
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="does not fit this recipe"):
        run(tmp_path, "run", resume=True)


def test_a_state_of_another_optimizer_is_refused(tmp_path):
    run(tmp_path, "run", steps="1")
    path = tmp_path / "run" / STATE_FILE
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = {
        name.replace("exp_avg_sq", "average"): value for name, value in load_file(path).items()
    }
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(CheckpointError, match="must be AdamW's"):
        run(tmp_path, "run", resume=True)


def test_learning_rate_rises_holds_and_falls():
    config = OptimizerConfig(lr=1.0, warmup=10, decay_share=0.5, floor=0.1)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:50] == [1.0] * 41
    assert rates[75] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.1)


@pytest.mark.parametrize("text", ["", "[line]\n[other]\n"])
def test_a_recipe_has_exactly_one_table_of_a_setup(tmp_path, text):
    register_setup("other", Setup(LineRun, line_task))
    with pytest.raises(ConfigError, match=r"exactly one of the tables \[line\], \[other\]"):
        load_recipe(write_recipe(tmp_path, text), {})


def test_an_installed_package_registers_its_setups(monkeypatch):
    class EntryPoint:
        def load(self):
            return lambda: register_setup("installed", Setup(LineRun, line_task))

    groups = []
    monkeypatch.setattr(
        "skyloom.train.setups.entry_points", lambda group: groups.append(group) or [EntryPoint()]
    )
    assert set(find_setups()) == {"line", "installed"}
    assert groups == ["skyloom.setups"]


def test_recipes_of_version_0_1_are_read_and_their_other_optimizer_is_refused(tmp_path):
    old = '[loop]\n[optimizer]\nmomentum = 0.95\nlr = 0.5\nkind = "{}"\n[line]\n'
    path = tmp_path / "recipe.toml"
    path.write_text(old.format("adamw"))
    assert load_recipe(path, {}).optimizer.lr == 0.5
    path.write_text(old.format("muon"))
    with pytest.raises(ConfigError, match="must be 'adamw', got 'muon'"):
        load_recipe(path, {})


def test_training_lowers_the_loss(tmp_path):
    loop = LoopConfig(steps=200, log_every=1, save_every=200, evaluate_every=200)
    train(line_task(LineRun(), loop), loop, OptimizerConfig(lr=0.05), tmp_path, resume=False)
    losses = [line["loss"] for line in RunLog(tmp_path).lines("step")]
    assert sum(losses[-10:]) < 0.1 * sum(losses[:10])
