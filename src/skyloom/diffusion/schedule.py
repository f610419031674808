"""Noise schedule of a sampler: falling levels from 1 (noise) to 0 (data)."""

import torch
from jaxtyping import Float
from torch import Tensor

from skyloom.core.errors import RequestError


def shift_sigma(sigma: Float[Tensor, "..."], shift: float) -> Float[Tensor, "..."]:
    """Multiply the ratio of noise to signal by `shift` (Esser et al. 2024, arXiv 2403.03206).

    A shift of `1 / shift` is the inverse.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def make_sigmas(num_steps: int, shift: float = 1.0, strength: float = 1.0) -> Float[Tensor, " n"]:
    """Return `num_steps + 1` falling levels from exactly `strength` to exactly 0.

    `strength` in (0, 1] is the noise level that an edit starts from; 1 is pure noise.
    """
    if num_steps < 1:
        raise RequestError(f"num_steps must be >= 1, got {num_steps}.")
    if not shift > 0:
        raise RequestError(f"shift must be > 0, got {shift}.", hint="1 leaves levels unchanged.")
    if not 0 < strength <= 1:
        raise RequestError(f"strength must be in (0, 1], got {strength}.")
    start = shift_sigma(torch.tensor(strength, dtype=torch.float64), 1 / shift)
    levels = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64) * start
    sigmas = shift_sigma(levels, shift).float()
    sigmas[0] = strength
    sigmas[-1] = 0.0
    return sigmas
