"""Less flicker: what hardly changes from one latent frame to the next is held still, what moves passes.

A model's latent frames jitter a little around what they show, also where nothing moves; real renders do not. Each cell
follows the one before it by a share of its change: nearly none of a small change, nearly all of a large one (coring, as
in temporal noise reduction of television pictures). What is known is no jitter: it stays as it is.
"""

from collections.abc import Collection

import torch
from jaxtyping import Float
from torch import Tensor


def steady(
    latent: Float[Tensor, "b c t h w"],
    before: Float[Tensor, "b c h w"] | None,
    level: float,
    known: Collection[int] = (),
) -> Float[Tensor, "b c t h w"]:
    """The latent held steady, going on from the steadied latent frame `before` it (None: it begins).

    A cell that changes by `level` (root mean square over channels) goes half of the way. A level of 0 changes nothing.
    Latent frames that are `known`, by number, stay as they are, and those after them go on from that.
    """
    if level == 0:
        return latent
    held = list[Tensor]()
    for number, cell in enumerate(latent.unbind(2)):
        if before is None or number in known:
            before = cell
        else:
            change = cell - before
            power = change.square().mean(1, keepdim=True).square()
            before = before + change * (power / (power + level**4))
        held.append(before)
    return torch.stack(held, dim=2)
