"""The optimizers and their learning-rate curve: linear warm-up, plateau, linear decay to a floor.

AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101) for everything, or Muon for the matrices inside the
transformer's blocks (Jordan et al. 2024; step scaled as in Liu et al. 2025, arXiv 2502.16982) and AdamW
for the rest.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5
_ADAMW_RMS = 0.2  # the usual size of an AdamW update: both kinds then share one learning rate


@dataclass(frozen=True)
class OptimizerConfig:
    """`slow` names parameters (by part of their name) that learn at `slow_rate` times the rate, undecayed."""

    kind: Literal["adamw", "muon"] = "adamw"
    momentum: float = 0.95
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
    slow, matrices, vectors, hidden = [], [], [], []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if any(part in name for part in config.slow):
            slow.append(parameter)
        elif parameter.ndim <= 1:
            vectors.append(parameter)
        elif config.kind == "muon" and "blocks." in name and name.endswith(".weight"):
            hidden.append(parameter)
        else:
            matrices.append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": config.weight_decay, "rate": 1.0},
        {"params": vectors, "weight_decay": 0.0, "rate": 1.0},
        {"params": slow, "weight_decay": 0.0, "rate": config.slow_rate},
        {
            "params": hidden,
            "weight_decay": config.weight_decay,
            "rate": 1.0,
            "momentum": config.momentum,
        },
    ]
    used = [group for group in groups if group["params"]]
    make = Muon if hidden else torch.optim.AdamW
    return make(used, lr=config.lr, betas=config.betas, fused=True)


class Muon(torch.optim.AdamW):
    """Groups with a `momentum` take orthogonal steps; all others are AdamW's.

    One optimizer and not two, so that its state is saved and found again as any other's.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            if group.get("momentum") is not None:
                self._orthogonal_step(group)
        return super().step(closure)

    def _orthogonal_step(self, group: dict[str, Any]) -> None:
        """Matrices of one shape are orthogonalised together; their gradients are used up."""
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape.setdefault(parameter.shape, []).append(parameter)
        for shape, parameters in by_shape.items():
            updates = []
            for parameter in parameters:
                gradient = parameter.grad
                assert gradient is not None
                state = self.state[parameter]
                average = state.setdefault("average", torch.zeros_like(parameter))
                state.setdefault("step", torch.zeros(())).add_(
                    1
                )  # AdamW looks for it when a state comes back
                average.lerp_(gradient, 1 - group["momentum"])
                updates.append(gradient.lerp(average, group["momentum"]))
            length = group["lr"] * _ADAMW_RMS * max(shape) ** 0.5
            for parameter, update in zip(
                parameters, orthogonalise(torch.stack(updates)), strict=True
            ):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.to(parameter.dtype), alpha=-length)
                parameter.grad = None


def orthogonalise(matrices: Float[Tensor, "n i j"]) -> Float[Tensor, "n i j"]:
    """Bring all singular values near 1 (0.7 to 1.2) by five Newton-Schulz steps in bf16; none is ever computed."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).bfloat16()
    first, second, third = _NEWTON_SCHULZ
    for _ in range(_NEWTON_SCHULZ_STEPS):
        square = x @ x.mT
        x = first * x + (second * square + third * (square @ square)) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate for optimizer step `step` (from 0) of `steps`."""
    rise = min(1.0, (step + 1) / max(1, config.warmup))
    fall = min(1.0, (steps - step) / max(1.0, config.decay_share * steps))
    return config.lr * rise * max(config.floor, fall)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of the rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate"]
