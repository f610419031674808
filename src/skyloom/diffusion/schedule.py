"""The noise levels that a sampler visits, from 1 (noise) to 0 (data)."""

import torch
from jaxtyping import Float
from torch import Tensor

from skyloom.core.errors import RequestError


def shift_sigma(sigma: Float[Tensor, "..."], shift: float) -> Float[Tensor, "..."]:
    """Move levels towards noise by a factor of signal to noise (Esser et al. 2024, arXiv 2403.03206)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def make_sigmas(num_steps: int, shift: float = 1.0) -> Float[Tensor, " n"]:
    """`num_steps + 1` falling levels from exactly 1 to exactly 0."""
    if num_steps < 1:
        raise RequestError(f"{num_steps} steps make nothing.", hint="Use 1 step or more.")
    return shift_sigma(torch.linspace(1, 0, num_steps + 1), shift)
