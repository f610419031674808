"""AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101) and its learning-rate schedule."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from skyloom.core.errors import ConfigError


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and a schedule of linear warm-up, plateau and linear decay to a floor.

    warmup: steps. decay_share: share of all steps. floor: final rate relative to `lr`.
    clip: maximum total gradient norm.
    slow: parameters (by part of their name) that learn at `slow_rate` times the rate, undecayed.
    kind, momentum: written by recipes of version 0.1; AdamW ignores them.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    warmup: int = 100
    decay_share: float = 0.3
    floor: float = 0.02
    clip: float = 1.0
    slow: tuple[str, ...] = ()
    slow_rate: float = 0.02
    kind: str | None = None
    momentum: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in (None, "adamw"):
            raise ConfigError(
                f"optimizer.kind must be 'adamw', got {self.kind!r}.",
                hint="Other optimizers were removed: delete the key and start a new --run.",
            )


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Group parameters: matrices with weight decay, vectors and slow parameters without."""
    slow: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if any(part in name for part in config.slow):
            slow.append(parameter)
        elif parameter.ndim <= 1:
            vectors.append(parameter)
        else:
            matrices.append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": config.weight_decay, "rate": 1.0},
        {"params": vectors, "weight_decay": 0.0, "rate": 1.0},
        {"params": slow, "weight_decay": 0.0, "rate": config.slow_rate},
    ]
    used = [group for group in groups if group["params"]]
    return torch.optim.AdamW(used, lr=config.lr, betas=config.betas, fused=True)


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Return the rate for step `step` (from 0) of `steps`."""
    rise = min(1.0, (step + 1) / max(1, config.warmup))
    fall = min(1.0, (steps - step) / max(1.0, config.decay_share * steps))
    return config.lr * rise * max(config.floor, fall)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of every group, scaled by the group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate"]
