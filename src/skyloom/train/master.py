"""Training in bf16 with fp32 master weights.

The working module computes in bf16. An fp32 copy of it receives gradients, optimizer updates and
the moving average, because bf16 cannot represent small updates. After every step the working
weights are rounded from the copy.
"""

import copy

import torch
from torch import nn


class MasterWeights:
    """A working module and its fp32 master copy; the same object when training in fp32."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self.module = module
        self.master = module if dtype == torch.float32 else copy.deepcopy(module)
        if self.master is not module:
            module.to(dtype)

    @torch.no_grad()
    def clip_gradients(self, limit: float) -> float:
        """Move gradients to the master weights, clip their norm to `limit`, return the norm."""
        if self.master is self.module:
            return float(nn.utils.clip_grad_norm_(self.module.parameters(), limit))
        working = [
            parameter for parameter in self.module.parameters() if parameter.grad is not None
        ]
        norm = float(
            nn.utils.get_total_norm(
                [parameter.grad for parameter in working if parameter.grad is not None]
            )
        )
        scale = min(1.0, limit / (norm + 1e-6))
        for parameter, master in zip(
            self.module.parameters(), self.master.parameters(), strict=True
        ):
            master.grad = None if parameter.grad is None else parameter.grad.float().mul_(scale)
            parameter.grad = None
        return norm

    @torch.no_grad()
    def publish(self) -> None:
        """Round the master weights to the working module."""
        if self.master is not self.module:
            torch._foreach_copy_(list(self.module.parameters()), list(self.master.parameters()))
