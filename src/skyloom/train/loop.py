"""The one loop: batch, losses, backward, step, average, log, save, resume.

A task (train/setups.py) brings the module, its batches and its losses; nothing in here knows what is
being learned. Randomness comes from generators derived from (seed, step) alone, so a run that was
stopped and resumed equals one that was not, bit for bit on a CPU.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from skyloom.core.errors import ConfigError
from skyloom.core.seeds import generator
from skyloom.train.ema import Ema
from skyloom.train.master import MasterWeights
from skyloom.train.objectives import Losses
from skyloom.train.optim import OptimizerConfig, build_optimizer, learning_rate, set_learning_rate
from skyloom.train.run_log import Record
from skyloom.train.state import STATE_FILE, load_state, save_state

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class LoopConfig:
    """Length and intervals of a run, in steps unless named otherwise.

    `minutes` (wall time) and `cpu_minutes` (of this process) stop the process early; --resume continues the run.
    `precision` "bf16" computes in bf16 and keeps fp32 master weights. The moving average is updated every
    `ema_every` steps.
    """

    steps: int = 1000
    seed: int = 0
    ema_decay: float = 0.999
    log_every: int = 20
    save_every: int = 200
    evaluate_every: int = 400
    minutes: float | None = None
    cpu_minutes: float | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    ema_every: int = 1
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


def train(
    task: Task, config: LoopConfig, optimizer_config: OptimizerConfig, folder: Path, *, resume: bool
) -> int:
    """Run until `config.steps` or `config.minutes`; returns the number of steps done in all."""
    if config.threads:
        torch.set_num_threads(config.threads)
    record = Record(folder)
    weights = MasterWeights(task.module, _DTYPES[config.precision])
    module, master = weights.module, weights.master
    ema = Ema(master, config.ema_decay)
    optimizer = build_optimizer(master, optimizer_config)
    step = _starting_step(folder, master, ema, optimizer, resume)
    weights.publish()
    module.train()
    while step < config.steps:
        set_learning_rate(optimizer, learning_rate(optimizer_config, step, config.steps))
        losses = task.losses(module, task.batch(step), generator(config.seed, "step", step))
        module.zero_grad(set_to_none=True)
        losses.total.backward()
        norm = weights.clip_gradients(optimizer_config.clip)
        optimizer.step()
        weights.publish()
        step += 1
        if step % config.ema_every == 0:
            ema.update(master, step)
        over = _is_over(config, record)
        if step % config.log_every == 0 or step == 1:
            parts = {name: float(value.detach()) for name, value in losses.parts.items()}
            spent = round(time.process_time(), 1)
            record.write(
                "step", step, cpu=spent, loss=float(losses.total.detach()), norm=norm, **parts
            )
        if step % config.save_every == 0 or over or step == config.steps:
            save_state(folder, master, ema, optimizer, step)
            task.export(ema.state_dict(), folder, step)
        if step % config.evaluate_every == 0 or over or step == config.steps:
            record.write("evaluate", step, **_evaluate_average(task, ema, folder, step))
            weights.publish()
        if over:
            break
    return step


def _is_over(config: LoopConfig, record: Record) -> bool:
    """Whether this process has used up its minutes."""
    wall, spent = config.minutes, config.cpu_minutes
    return (wall is not None and record.seconds > 60 * wall) or (
        spent is not None and time.process_time() > 60 * spent
    )


def _starting_step(
    folder: Path, module: nn.Module, ema: Ema, optimizer: torch.optim.Optimizer, resume: bool
) -> int:
    exists = (folder / STATE_FILE).exists()
    if exists and not resume:
        raise ConfigError(
            f"{folder} already holds a run.", hint="Add --resume, or name a new --run folder."
        )
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
