"""Exponential moving average of the weights, with a warm-up of the decay."""

import torch
from torch import Tensor, nn


class Ema:
    """Average in fp32: `average = decay * average + (1 - decay) * weights`."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = {
            name: value.detach().clone().float() for name, value in module.state_dict().items()
        }

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Update after optimizer step `step` (counted from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = [value.detach().float() for value in module.state_dict().values()]
        torch._foreach_lerp_(list(self.average.values()), current, 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averaged weights by parameter name."""
        return self.average

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore saved averages."""
        for name, value in self.average.items():
            value.copy_(state[name])
