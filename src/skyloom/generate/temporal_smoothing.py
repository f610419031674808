"""Reduce flicker: small changes between latent frames are damped, large ones pass (coring).

A model's latent frames vary slightly even where nothing moves; renderings do not. Each latent cell
follows the previous one by a share of its change: near 0 for small changes, near 1 for large ones,
as in temporal noise reduction of television pictures. Known latent frames stay unchanged.
"""

from collections.abc import Collection

import torch
from jaxtyping import Float
from torch import Tensor


def smooth_latent(
    latent: Float[Tensor, "b c t h w"],
    before: Float[Tensor, "b c h w"] | None,
    level: float,
    known: Collection[int] = (),
) -> Float[Tensor, "b c t h w"]:
    """Smooth a latent over time, continuing from the smoothed latent frame `before` it, if any.

    A cell that changes by `level` (root mean square over channels) moves half of the way; level 0
    returns the input. Latent frames whose index is in `known` are returned unchanged.
    """
    if level == 0:
        return latent
    smoothed: list[Tensor] = []
    for number, cell in enumerate(latent.unbind(2)):
        if before is None or number in known:
            before = cell
        else:
            change = cell - before
            power = change.square().mean(1, keepdim=True).square()
            before = before + change * (power / (power + level**4))
        smoothed.append(before)
    return torch.stack(smoothed, dim=2)
