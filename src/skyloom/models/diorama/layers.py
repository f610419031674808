"""Layers of the diorama's U-Net: residual block, mix of neighbouring frames, attention block."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from skyloom.models.attention import attend, join_heads, split_heads
from skyloom.models.base import TextCondition
from skyloom.models.diorama.config import UNetConfig
from skyloom.models.rope import rotate

_GROUPS = 8


@dataclass(frozen=True)
class FrameLinks:
    """Masks of FrameMix, `[1 t 1 1 1]`: 1 where a frame may read its neighbour, else 0."""

    before: Tensor
    after: Tensor


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions; the embedding scales and shifts between them."""

    def __init__(self, channels: int, embedding: int, *, normalise: bool) -> None:
        super().__init__()
        self.normalise = normalise
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * channels)
        nn.init.kaiming_normal_(self.first.weight, nonlinearity="relu")
        zero(self.second)
        zero(self.modulation)

    def forward(
        self, x: Float[Tensor, "n c h w"], embedded: Float[Tensor, "n e"]
    ) -> Float[Tensor, "n c h w"]:
        """Add the block's output to its input."""
        scale, shift = rearrange(self.modulation(embedded), "n c -> n c 1 1").chunk(2, dim=1)
        y = self.first(F.silu(F.group_norm(x, _GROUPS) if self.normalise else x))
        return x + self.second(F.silu(torch.addcmul(shift, y, 1 + scale)))


class FrameMix(nn.Module):
    """Add a pointwise function of the latent frames before and after; zero-initialised."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(2 * channels, channels, 1, bias=False)
        nn.init.zeros_(self.mix.weight)

    def forward(
        self,
        x: Float[Tensor, "bt c h w"],
        batch: int,
        links: FrameLinks,
        previous: Float[Tensor, "b c h w"] | None,
    ) -> Float[Tensor, "bt c h w"]:
        """Mix frames; previous: the cached frame before the first one, or None."""
        frames = rearrange(x, "(b t) c h w -> b t c h w", b=batch)
        if frames.shape[1] == 1 and previous is None:
            return x
        nothing = torch.zeros_like(frames[:, :1])
        first = nothing if previous is None else previous[:, None].to(x.dtype)
        before = torch.cat([first, frames[:, :-1]], 1) * links.before
        after = torch.cat([frames[:, 1:], nothing], 1) * links.after
        both = channels_last(torch.cat([before, after], 2).flatten(0, 1))
        return x + self.mix(F.silu(both))


class AttentionBlock(nn.Module):
    """Attention over visible latent frames and prompt tokens, parallel to a feed-forward layer."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        width = config.widths[1]
        hidden = 3 * width
        self.width = width
        self.hidden = hidden
        self.heads = config.heads
        self.inner = nn.Linear(width, 3 * width + hidden)
        self.outer = nn.Linear(width + hidden, width)
        self.words = nn.Linear(width, 2 * width)
        self.modulation = nn.Linear(config.embedding, 2 * width)
        zero(self.outer)
        zero(self.modulation)

    def text_keys_and_values(self, projected: Float[Tensor, "b m d"]) -> tuple[Tensor, Tensor]:
        """Return keys (unit scale) and values of the prompt's tokens by head."""
        key, value = (split_heads(part, self.heads) for part in self.words(projected).chunk(2, -1))
        return _normalise(key), value

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        embedded: Float[Tensor, "bt e"],
        text: TextCondition,
        index: int,
        angles: tuple[Float[Tensor, "seen f"], Float[Tensor, "seen f"]],
        bias: Float[Tensor, "..."] | None,
        before: tuple[Tensor, Tensor] | None,
    ) -> tuple[Float[Tensor, "b n d"], Tensor, Tensor]:
        """Return the new tokens, and the window's keys (before rotation) and values."""
        shift, scale = rearrange(self.modulation(embedded), "(b t) c -> b t 1 c", b=len(x)).chunk(
            2, -1
        )
        y = rearrange(_normalise(x), "b (t p) d -> b t p d", t=shift.shape[1])
        y = torch.addcmul(shift, y, 1 + scale).flatten(1, 2)
        qkv, hidden = self.inner(y).split((3 * self.width, self.hidden), -1)
        query, key, value = (split_heads(part, self.heads) for part in qkv.chunk(3, -1))
        query = _normalise(query)
        key = _normalise(key)
        all_keys = key
        all_values = value
        if before is not None:
            all_keys = torch.cat([before[0], key], 2)
            all_values = torch.cat([before[1], value], 2)
        own = (angles[0][-x.shape[1] :], angles[1][-x.shape[1] :])
        all_keys = torch.cat([rotate(all_keys, angles), text.keys[index]], 2)
        all_values = torch.cat([all_values, text.values[index]], 2)
        mixed = join_heads(attend(rotate(query, own), all_keys, all_values, bias))
        return x + self.outer(torch.cat([mixed, F.silu(hidden)], -1)), key, value


def channels_last(x: Tensor) -> Tensor:
    """Lay the channels of a pixel side by side in memory, which convolutions on a CPU prefer."""
    return x.contiguous(memory_format=torch.channels_last)


def _normalise(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def zero(layer: nn.Module) -> None:
    """Set all weights of a layer to zero, so that it adds nothing at first."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
