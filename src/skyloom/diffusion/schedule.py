"""Noise schedule of a sampler: falling levels from 1 (noise) to 0 (data)."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from skyloom.core.errors import RequestError

TRAINING_TIMESTEPS = 1000
_WAN_FIRST_LEVEL = float(np.float32(0.999))  # the original code keeps its table in fp32
_DIFFUSERS_FIRST_LEVEL = 1 - 1e-6


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


def wan_sigmas(num_steps: int, shift: float) -> Float[Tensor, " n"]:
    """Return the levels of Wan's original UniPC solver in fp64: `num_steps`, and 0.

    FlowUniPCMultistepScheduler in wan/utils/fm_solvers_unipc.py of Wan-Video/Wan2.2. Its DPM++
    solver has the levels of `make_sigmas`.
    """
    return _shifted_to_zero(_WAN_FIRST_LEVEL, 0.0, num_steps, shift)


def diffusers_sigmas(num_steps: int, shift: float) -> Float[Tensor, " n"]:
    """Return the flow levels of diffusers' UniPCMultistepScheduler in fp64: `num_steps`, and 0."""
    sigmas = _shifted_to_zero(1.0, 1 / TRAINING_TIMESTEPS, num_steps, shift)
    sigmas[0] = min(float(sigmas[0]), _DIFFUSERS_FIRST_LEVEL)
    return sigmas


def sigmas_of_timesteps(timesteps: Sequence[float], shift: float) -> Float[Tensor, " n"]:
    """Return the levels of training timesteps in fp64, and 0.

    Each is the nearest of the 1000 shifted levels of training, as in FastVideo's distillation and
    Self-Forcing (arXiv 2506.08009).
    """
    training = torch.arange(TRAINING_TIMESTEPS, 0, -1, dtype=torch.float64) / TRAINING_TIMESTEPS
    table = shift_sigma(training, shift)
    wanted = torch.tensor(timesteps, dtype=torch.float64) / TRAINING_TIMESTEPS
    nearest = (table - wanted[:, None]).abs().argmin(dim=1)
    return torch.cat([table[nearest], torch.zeros(1, dtype=torch.float64)])


def whole_timesteps(sigmas: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Round fp64 levels down to whole training timesteps, which Wan models are told.

    fp32 levels of whole timesteps may be below them: use the levels before they are rounded.
    """
    return (TRAINING_TIMESTEPS * sigmas).floor()


def _shifted_to_zero(
    first: float, last: float, num_steps: int, shift: float
) -> Float[Tensor, " n"]:
    """Shift `num_steps` levels from `first` towards `last`, which is replaced by 0."""
    levels = torch.tensor(list(np.linspace(first, last, num_steps + 1)), dtype=torch.float64)
    sigmas = shift_sigma(levels, shift)
    sigmas[-1] = 0.0
    return sigmas
