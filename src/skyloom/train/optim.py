"""The optimizer and its learning-rate curve: linear warm-up, plateau, linear decay to a floor."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. `slow` names parameters (by prefix) that learn at `slow_rate` times the rate, undecayed."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    warmup: int = 100
    decay_share: float = 0.3
    floor: float = 0.02
    clip: float = 1.0
    slow: tuple[str, ...] = ()
    slow_rate: float = 0.02


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Matrices are decayed, vectors are not, slow parameters are their own group."""
    slow, matrices, vectors = [], [], []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if any(part in name for part in config.slow):
            slow.append(parameter)
        else:
            (matrices if parameter.ndim > 1 else vectors).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay, "rate": 1.0},
        {"params": vectors, "weight_decay": 0.0, "rate": 1.0},
        {"params": slow, "weight_decay": 0.0, "rate": config.slow_rate},
    ]
    used = [group for group in groups if group["params"]]
    return torch.optim.AdamW(used, lr=config.lr, betas=config.betas, fused=True)


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate for optimizer step `step` (from 0) of `steps`."""
    rise = min(1.0, (step + 1) / max(1, config.warmup))
    fall = min(1.0, (steps - step) / max(1.0, config.decay_share * steps))
    return config.lr * rise * max(config.floor, fall)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of the rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate"]
