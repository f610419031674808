"""The noise levels that a sampler visits, from 1 (noise) to 0 (data)."""

import torch
from jaxtyping import Float
from torch import Tensor

from skyloom.core.errors import RequestError


def shift_sigma(sigma: Float[Tensor, "..."], shift: float) -> Float[Tensor, "..."]:
    """Move levels towards noise by a factor of signal to noise (Esser et al. 2024, arXiv 2403.03206).

    A shift of `1 / shift` moves them back.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def make_sigmas(num_steps: int, shift: float = 1.0, strength: float = 1.0) -> Float[Tensor, " n"]:
    """`num_steps + 1` falling levels from exactly `strength` to exactly 0.

    `strength` in (0, 1] is how far an edit may move from its source: 1 starts from noise alone.
    """
    if num_steps < 1:
        raise RequestError(f"{num_steps} steps make nothing.", hint="Use 1 step or more.")
    if not shift > 0:
        raise RequestError(
            f"A shift of {shift} is not a factor.", hint="Use a number above 0; 1 shifts nothing."
        )
    if not 0 < strength <= 1:
        raise RequestError(
            f"A strength of {strength} is out of range.", hint="Use a number above 0, up to 1."
        )
    start = shift_sigma(torch.tensor(strength, dtype=torch.float64), 1 / shift)
    levels = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64) * start
    sigmas = shift_sigma(levels, shift).float()
    sigmas[0], sigmas[-1] = strength, 0.0
    return sigmas
