"""What a prompt says, as one vector: read from the tokens of a text encoder by a small convolution.

A sentence encoder puts "to the left" and "to the right" nearly on top of each other, and a generator that
must tell them apart by squared error alone takes very long to (docs/log.md). This reader is trained on captions
and their facts (train/prompt_attributes.py), so that what matters for a picture is what varies most in its vector.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn


class Meaning(nn.Module):
    """Contexts -> vectors of unit scale. Each token sees two neighbours on each side, so word order counts."""

    def __init__(self, context_width: int, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(context_width, width)
        self.near = nn.Linear(3 * width, width)
        self.far = nn.Linear(3 * width, width)
        self.inner = nn.Linear(2 * width, width)
        self.outer = nn.Linear(width, width)

    def forward(
        self, context: Float[Tensor, "b m k"], mask: Bool[Tensor, "b m"]
    ) -> Float[Tensor, "b d"]:
        """The vector of each prompt; masked tokens count for nothing."""
        real = rearrange(mask, "b m -> b m 1")
        x = self.down(context) * real
        x = (x + F.gelu(self.near(_with_neighbours(x)))) * real
        x = (x + F.gelu(self.far(_with_neighbours(x)))) * real
        mean = x.sum(1) / real.sum(1).clamp(min=1)
        most = x.masked_fill(~real, -torch.inf).amax(1)
        y = self.outer(F.gelu(self.inner(torch.cat([mean, most], dim=-1))))
        return F.layer_norm(y, y.shape[-1:])


def _with_neighbours(x: Float[Tensor, "b m d"]) -> Float[Tensor, "b m e"]:
    """Every token's channels between those of the one before and the one after; zeros beyond the ends."""
    return torch.cat([F.pad(x, (0, 0, 1, 0))[:, :-1], x, F.pad(x, (0, 0, 0, 1))[:, 1:]], dim=-1)
