"""Guidance as deltas: `guided = conditional + cfg_delta(...)`; deltas of several kinds add up."""

from jaxtyping import Float
from torch import Tensor


def cfg_delta(
    conditional: Float[Tensor, "b c t h w"],
    unconditional: Float[Tensor, "b c t h w"],
    guidance_scale: float,
) -> Float[Tensor, "b c t h w"]:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598); exactly 0 at scale 1.0.

    Predictions may be velocities or clean estimates.
    """
    return (guidance_scale - 1) * (conditional - unconditional)
