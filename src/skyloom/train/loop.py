"""The one loop: batch, losses, backward, step, average, log, save, resume.

A task (train/tasks.py) brings the module, its batches and its losses; nothing in here knows what is
being learned. Randomness comes from generators derived from (seed, step) alone, so a run that was
stopped and resumed equals one that was not, bit for bit on a CPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from skyloom.core.errors import ConfigError
from skyloom.core.seeds import generator
from skyloom.train.ema import Ema
from skyloom.train.objectives import Losses
from skyloom.train.optim import OptimizerConfig, build_optimizer, learning_rate, set_learning_rate
from skyloom.train.record import Record
from skyloom.train.state import STATE_FILE, load_state, save_state


@dataclass(frozen=True)
class LoopConfig:
    """How long, how often. `minutes` stops this process early; the same command with --resume goes on."""

    steps: int = 1000
    seed: int = 0
    ema_decay: float = 0.999
    log_every: int = 20
    save_every: int = 200
    evaluate_every: int = 400
    minutes: float | None = None
    threads: int | None = None
    compile: bool = False
    device: str | None = None


@dataclass(frozen=True)
class Task:
    """What is learned: the module, a batch for a step, its losses, and what to measure and keep."""

    module: nn.Module
    batch: Callable[[int], Any]
    losses: Callable[[Any, Any, torch.Generator], Losses]
    evaluate: Callable[[Any, Path, int], dict[str, float]]
    export: Callable[[dict[str, Tensor], Path, int], None]


def train(task: Task, config: LoopConfig, optimizer_config: OptimizerConfig, folder: Path, *, resume: bool) -> int:
    """Run until `config.steps` or `config.minutes`; returns the number of steps done in all."""
    if config.threads:
        torch.set_num_threads(config.threads)
    record = Record(folder)
    module, ema = task.module, Ema(task.module, config.ema_decay)
    optimizer = build_optimizer(module, optimizer_config)
    step = _starting_step(folder, module, ema, optimizer, resume)
    module.train()
    while step < config.steps:
        set_learning_rate(optimizer, learning_rate(optimizer_config, step, config.steps))
        losses = task.losses(module, task.batch(step), generator(config.seed, "step", step))
        optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        norm = nn.utils.clip_grad_norm_(module.parameters(), optimizer_config.clip)
        optimizer.step()
        step += 1
        ema.update(module, step)
        over = config.minutes is not None and record.seconds > 60 * config.minutes
        if step % config.log_every == 0 or step == 1:
            parts = {name: float(value.detach()) for name, value in losses.parts.items()}
            record.write("step", step, loss=float(losses.total.detach()), norm=float(norm), **parts)
        if step % config.save_every == 0 or over or step == config.steps:
            save_state(folder, module, ema, optimizer, step)
            task.export(ema.state_dict(), folder, step)
        if step % config.evaluate_every == 0 or step == config.steps:
            record.write("evaluate", step, **_evaluate_average(task, ema, folder, step))
        if over:
            break
    return step


def _starting_step(folder: Path, module: nn.Module, ema: Ema, optimizer: torch.optim.Optimizer, resume: bool) -> int:
    exists = (folder / STATE_FILE).exists()
    if exists and not resume:
        raise ConfigError(f"{folder} already holds a run.", hint="Add --resume, or name a new --run folder.")
    return load_state(folder, module, ema, optimizer) if exists else 0


@torch.no_grad()
def _evaluate_average(task: Task, ema: Ema, folder: Path, step: int) -> dict[str, float]:
    """Measure the averaged weights, then put the training weights back exactly."""
    module = task.module
    kept = {name: value.detach().clone() for name, value in module.state_dict().items()}
    module.load_state_dict(ema.state_dict())
    module.eval()
    measured = task.evaluate(module, folder, step)
    module.load_state_dict(kept)
    module.train()
    return measured
