"""Prompt attributes: one vector per prompt, read from the text encoder's tokens by a convolution.

A sentence encoder maps "to the left" and "to the right" to nearly the same vector, which a
generator trained on squared error separates very slowly (docs/log.md). This network is trained on
captions and their facts (by projects/diorama), so that its vector varies most in what
matters for a picture.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn


class PromptAttributes(nn.Module):
    """Contexts to vectors of unit scale; each token sees two neighbours on each side."""

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
        """Return one vector per prompt; masked tokens have no effect."""
        real = rearrange(mask, "b m -> b m 1")
        x = self.down(context) * real
        x = (x + F.gelu(self.near(_with_neighbours(x)))) * real
        x = (x + F.gelu(self.far(_with_neighbours(x)))) * real
        mean = x.sum(1) / real.sum(1).clamp(min=1)
        maximum = x.masked_fill(~real, -torch.inf).amax(1)
        y = self.outer(F.gelu(self.inner(torch.cat([mean, maximum], dim=-1))))
        return F.layer_norm(y, y.shape[-1:])


def _with_neighbours(x: Float[Tensor, "b m d"]) -> Float[Tensor, "b m e"]:
    """Concatenate each token's channels with those of both neighbours; zeros beyond the ends."""
    return torch.cat([F.pad(x, (0, 0, 1, 0))[:, :-1], x, F.pad(x, (0, 0, 0, 1))[:, 1:]], dim=-1)
