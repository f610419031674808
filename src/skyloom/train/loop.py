"""Training loop: batch, losses, backward, step, average, log, save, resume.

A task (train/setups.py) supplies module, batches and losses. Random numbers come from generators
derived from (seed, step) alone, so a resumed run equals an uninterrupted one, bit for bit on a CPU.
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
from skyloom.train.run_log import RunLog
from skyloom.train.state import STATE_FILE, load_state, save_state

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class LoopConfig:
    """Length and intervals of a run, in steps unless the name has a unit.

    minutes, cpu_minutes: wall time and CPU time after which this process stops; --resume continues.
    precision: "bf16" computes in bf16 with fp32 master weights.
    ema_every: steps between updates of the moving average.
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
    """Module to train with callables: batch of a step, losses, evaluation, export of weights."""

    module: nn.Module
    batch: Callable[[int], Any]
    losses: Callable[[Any, Any, torch.Generator], Losses]
    evaluate: Callable[[Any, Path, int], dict[str, float]]
    export: Callable[[dict[str, Tensor], Path, int], None]


def train(
    task: Task, config: LoopConfig, optimizer_config: OptimizerConfig, folder: Path, *, resume: bool
) -> int:
    """Train until `config.steps` or a time limit; return the total number of steps done."""
    if config.threads:
        torch.set_num_threads(config.threads)
    log = RunLog(folder)
    weights = MasterWeights(task.module, _DTYPES[config.precision])
    module = weights.module
    master = weights.master
    ema = Ema(master, config.ema_decay)
    optimizer = build_optimizer(master, optimizer_config)
    step = _starting_step(folder, master, ema, optimizer, resume=resume)
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
        stop = _out_of_time(config, log)
        if step % config.log_every == 0 or step == 1:
            parts = {name: float(value.detach()) for name, value in losses.parts.items()}
            cpu = round(time.process_time(), 1)
            loss = float(losses.total.detach())
            log.write("step", step, cpu=cpu, loss=loss, norm=norm, **parts)
        if step % config.save_every == 0 or stop or step == config.steps:
            save_state(folder, master, ema, optimizer, step)
            task.export(ema.state_dict(), folder, step)
        if step % config.evaluate_every == 0 or stop or step == config.steps:
            log.write("evaluate", step, **_evaluate_average(task, ema, folder, step))
            weights.publish()
        if stop:
            break
    return step


def _out_of_time(config: LoopConfig, log: RunLog) -> bool:
    """Whether this process has reached its limit of wall or CPU time."""
    wall = config.minutes
    cpu = config.cpu_minutes
    return (wall is not None and log.seconds > 60 * wall) or (
        cpu is not None and time.process_time() > 60 * cpu
    )


def _starting_step(
    folder: Path, module: nn.Module, ema: Ema, optimizer: torch.optim.Optimizer, *, resume: bool
) -> int:
    exists = (folder / STATE_FILE).exists()
    if exists and not resume:
        raise ConfigError(
            f"{folder} already contains a run.", hint="Add --resume, or choose a new --run folder."
        )
    return load_state(folder, module, ema, optimizer) if exists else 0


@torch.no_grad()
def _evaluate_average(task: Task, ema: Ema, folder: Path, step: int) -> dict[str, float]:
    """Evaluate the averaged weights, then restore the training weights exactly."""
    module = task.module
    kept = {name: value.detach().clone() for name, value in module.state_dict().items()}
    module.load_state_dict(ema.state_dict())
    module.eval()
    measured = task.evaluate(module, folder, step)
    module.load_state_dict(kept)
    module.train()
    return measured
