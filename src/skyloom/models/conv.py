"""Causal convolutions over folded frames, with an explicit cache.

Frames are folded into the batch as `[(b t) c h w]` and convolved in two dimensions. Information
passes in time only through `shift_channels`, which takes a share of the channels from the frame
before (temporal shift module, Lin et al. 2018, arXiv 1811.08383). The cache holds the last frame of
a window, so a video decoded in windows equals the video decoded whole.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

SHIFTED_SHARE = 4


@dataclass(frozen=True)
class DecoderCache:
    """Features of the last frame of a window, one tensor per block."""

    features: tuple[Tensor, ...]


def shift_channels(
    x: Float[Tensor, "bt c h w"], batch: int, previous: Float[Tensor, "b s h w"] | None
) -> tuple[Float[Tensor, "bt c h w"], Float[Tensor, "b s h w"]]:
    """Replace a quarter of the channels by those of the frame before.

    previous: those channels of the last frame of the previous window; None for the first window,
    whose first frame takes its own. Returns the result and the next `previous`.
    """
    shifted = x.shape[1] // SHIFTED_SHARE
    now = rearrange(x[:, :shifted], "(b t) s h w -> b t s h w", b=batch)
    before = now[:, :1] if previous is None else previous.unsqueeze(1).to(now.dtype)
    late = rearrange(torch.cat([before, now[:, :-1]], dim=1), "b t s h w -> (b t) s h w")
    return torch.cat([late, x[:, shifted:]], dim=1), now[:, -1]


class ShiftBlock(nn.Module):
    """Residual block of two 3x3 convolutions; reads one frame into the past."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        assert self.conv_out.bias is not None
        nn.init.zeros_(self.conv_out.bias)

    def forward(
        self, x: Float[Tensor, "bt c h w"], batch: int, previous: Float[Tensor, "b s h w"] | None
    ) -> tuple[Float[Tensor, "bt c h w"], Float[Tensor, "b s h w"]]:
        """Return the block's output and the cache for the next window."""
        shifted, last = shift_channels(x, batch, previous)
        return x + self.conv_out(F.silu(self.conv_in(F.silu(shifted)))), last


def split_frames(x: Float[Tensor, "bt c h w"]) -> Float[Tensor, "b2 c2 h w"]:
    """Split each frame into two by halves of its channels."""
    frames = rearrange(x, "n (two c) h w -> (n two) c h w", two=2)
    return frames.contiguous(memory_format=torch.channels_last)
