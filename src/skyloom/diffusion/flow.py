"""The flow-matching path. sigma 1 is noise, sigma 0 is data; velocity is noise minus data.

The only file with these formulas. Lipman et al. 2022 (arXiv 2210.02747), Liu et al. 2022
(arXiv 2209.03003). Every latent frame has its own sigma (diffusion forcing, arXiv 2407.01392).
"""

from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

Prediction = Literal["velocity", "denoised", "angular"]

SIGMA_FLOOR = 0.05


def add_noise(
    latent: Float[Tensor, "b c t h w"],
    noise: Float[Tensor, "b c t h w"],
    sigma: Float[Tensor, "b t"],
) -> Float[Tensor, "b c t h w"]:
    """Interpolate each latent frame linearly between data and noise."""
    s = _per_frame(sigma)
    return (1 - s) * latent + s * noise


def velocity_target(
    latent: Float[Tensor, "b c t h w"], noise: Float[Tensor, "b c t h w"]
) -> Float[Tensor, "b c t h w"]:
    """Training target: the direction from data to noise."""
    return noise - latent


def denoised_from_velocity(
    noisy: Float[Tensor, "b c t h w"],
    velocity: Float[Tensor, "b c t h w"],
    sigma: Float[Tensor, "b t"],
) -> Float[Tensor, "b c t h w"]:
    """Return the clean estimate that a velocity points to."""
    return noisy - _per_frame(sigma) * velocity


def velocity_from_denoised(
    noisy: Float[Tensor, "b c t h w"],
    denoised: Float[Tensor, "b c t h w"],
    sigma: Float[Tensor, "b t"],
    floor: float = SIGMA_FLOOR,
) -> Float[Tensor, "b c t h w"]:
    """Return the velocity towards a clean estimate.

    sigma is clamped to at least `floor` (Li and He 2025, arXiv 2511.13720).
    """
    return (noisy - denoised) / _per_frame(sigma).clamp(min=floor)


def velocity_from_angular(
    noisy: Float[Tensor, "b c t h w"],
    angular: Float[Tensor, "b c t h w"],
    sigma: Float[Tensor, "b t"],
) -> Float[Tensor, "b c t h w"]:
    """Return the velocity of an angular prediction.

    The prediction is (sigma data - (1 - sigma) noise) / n with n^2 = sigma^2 + (1 - sigma)^2. It
    has unit variance at every sigma when the data has: the preconditioning of EDM (Karras et al.
    2022, arXiv 2206.00364) on this path.
    """
    s = _per_frame(sigma)
    square = s**2 + (1 - s) ** 2
    return noisy * (2 * s - 1) / square - angular / square.sqrt()


def to_velocity(
    kind: Prediction,
    prediction: Float[Tensor, "b c t h w"],
    noisy: Float[Tensor, "b c t h w"],
    sigma: Float[Tensor, "b t"],
) -> Float[Tensor, "b c t h w"]:
    """Convert a network's raw prediction to a velocity."""
    if kind == "velocity":
        return prediction
    return {"denoised": velocity_from_denoised, "angular": velocity_from_angular}[kind](
        noisy, prediction, sigma
    )


def mean_velocity(
    start: Float[Tensor, "b c t h w"],
    end: Float[Tensor, "b c t h w"],
    sigma_start: Float[Tensor, "b t"],
    sigma_end: Float[Tensor, "b t"],
) -> Float[Tensor, "b c t h w"]:
    """Return the velocity from `start` to `end` in one step; 0 for frames without a step."""
    span = _per_frame(sigma_start - sigma_end)
    velocity = (start - end) / span.clamp(min=1e-6)
    return torch.where(span > 0, velocity, torch.zeros_like(velocity))


def _per_frame(sigma: Float[Tensor, "b t"]) -> Float[Tensor, "b 1 t 1 1"]:
    return rearrange(sigma, "b t -> b 1 t 1 1")
