"""Guidance as deltas: `guided = conditional + cfg_delta(...)`, and deltas of several kinds add up.

A guidance_scale of 1.0 is off and gives a delta of exactly 0. All of them take velocities or clean estimates
alike (`apg_delta` was published on clean estimates); norms and deviations are per sample.
"""

from einops import reduce
from jaxtyping import Float
from torch import Tensor


def cfg_delta(
    conditional: Float[Tensor, "b c t h w"],
    unconditional: Float[Tensor, "b c t h w"],
    guidance_scale: float,
) -> Float[Tensor, "b c t h w"]:
    """Away from the prediction without a prompt (Ho and Salimans 2022, arXiv 2207.12598)."""
    return (guidance_scale - 1) * (conditional - unconditional)


def scale_in_interval(guidance_scale: float, sigma: float, low: float, high: float) -> float:
    """The scale where `low <= sigma <= high`, else 1.0: no second pass needed (Kynkaanniemi et al. 2024,
    arXiv 2404.07724)."""
    return guidance_scale if low <= sigma <= high else 1.0


def rescale_delta(
    conditional: Float[Tensor, "b c t h w"], guided: Float[Tensor, "b c t h w"], amount: float
) -> Float[Tensor, "b c t h w"]:
    """Bring the deviation of a guided prediction back to the conditional one's, by `amount` in [0, 1]
    (Lin et al. 2023, arXiv 2305.08891, section 3.4)."""
    axes = (1, 2, 3, 4)
    ratio = conditional.std(axes, keepdim=True) / guided.std(axes, keepdim=True).clamp(min=1e-8)
    return amount * (ratio - 1) * guided


def apg_delta(
    conditional: Float[Tensor, "b c t h w"],
    difference: Float[Tensor, "b c t h w"],
    guidance_scale: float,
    parallel: float = 0.0,
    max_norm: float | None = None,
) -> Float[Tensor, "b c t h w"]:
    """Adaptive projected guidance: high scales without oversaturation (Sadat et al. 2024, arXiv 2410.02416).

    `difference` is conditional minus unconditional, plain or from `add_momentum`; it is cut to `max_norm`,
    and its part along `conditional` is weighted by `parallel` (1 gives plain cfg).
    """
    if max_norm is not None:
        difference = difference * (max_norm / _norm(difference).clamp(min=1e-8)).clamp(max=1)
    unit = conditional / _norm(conditional).clamp(min=1e-8)
    along = reduce(difference * unit, "b c t h w -> b 1 1 1 1", "sum") * unit
    return (guidance_scale - 1) * (difference - along + parallel * along)


def add_momentum(
    difference: Float[Tensor, "b c t h w"],
    previous: Float[Tensor, "b c t h w"] | None,
    momentum: float = -0.5,
) -> Float[Tensor, "b c t h w"]:
    """The running difference of adaptive projected guidance; keep it for the next step as `previous`."""
    return difference if previous is None else difference + momentum * previous


def _norm(x: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b 1 1 1 1"]:
    return reduce(x.square(), "b c t h w -> b 1 1 1 1", "sum").sqrt()
