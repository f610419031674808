"""The flow-matching path. sigma 1 is noise, sigma 0 is data; velocity is noise minus data.

No other file writes these formulas. Lipman et al. 2022 (arXiv 2210.02747), Liu et al. 2022
(arXiv 2209.03003). Every latent frame has its own sigma (diffusion forcing, arXiv 2407.01392).
"""

from typing import Literal

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
    """Walk each latent frame along the straight path to its sigma."""
    s = _per_frame(sigma)
    return (1 - s) * latent + s * noise


def velocity_target(
    latent: Float[Tensor, "b c t h w"], noise: Float[Tensor, "b c t h w"]
) -> Float[Tensor, "b c t h w"]:
    """What the network learns: the direction from data to noise."""
    return noise - latent


def denoised_from_velocity(
    noisy: Float[Tensor, "b c t h w"],
    velocity: Float[Tensor, "b c t h w"],
    sigma: Float[Tensor, "b t"],
) -> Float[Tensor, "b c t h w"]:
    """The clean estimate that a velocity points to."""
    return noisy - _per_frame(sigma) * velocity


def velocity_from_denoised(
    noisy: Float[Tensor, "b c t h w"],
    denoised: Float[Tensor, "b c t h w"],
    sigma: Float[Tensor, "b t"],
    floor: float = SIGMA_FLOOR,
) -> Float[Tensor, "b c t h w"]:
    """The velocity of a clean estimate; sigma is kept above `floor` (Li and He 2025, arXiv 2511.13720)."""
    return (noisy - denoised) / _per_frame(sigma).clamp(min=floor)


def velocity_from_angular(
    noisy: Float[Tensor, "b c t h w"],
    angular: Float[Tensor, "b c t h w"],
    sigma: Float[Tensor, "b t"],
) -> Float[Tensor, "b c t h w"]:
    """The velocity of an angular prediction, (sigma data - (1 - sigma) noise) / n with n^2 = sigma^2 + (1 - sigma)^2.

    It is what a network must add to a scaled copy of its input, at unit variance for every sigma when data has
    unit variance: the preconditioning of EDM (Karras et al. 2022, arXiv 2206.00364) on this path.
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
    """A network's raw prediction as a velocity, whichever of the three it predicts."""
    if kind == "velocity":
        return prediction
    return {"denoised": velocity_from_denoised, "angular": velocity_from_angular}[kind](
        noisy, prediction, sigma
    )


def _per_frame(sigma: Float[Tensor, "b t"]) -> Float[Tensor, "b 1 t 1 1"]:
    return rearrange(sigma, "b t -> b 1 t 1 1")
