"""Rotary position embedding in three dimensions (Su et al. 2021, arXiv 2104.09864).

Wan's split: 1/3 of a head's channels for width, 1/3 for height, the rest for time (rounded to
pairs). Pairs are (i, i + half), so a rotation is two slices; wan/state_dict.py reorders weights
that use neighbouring pairs.
"""

from functools import lru_cache

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor

Angles = tuple[Float[Tensor, "n f"], Float[Tensor, "n f"]]


def axis_widths(head_width: int) -> tuple[int, int, int]:
    """Number of channels of a head for time, height and width."""
    space = 2 * (head_width // 6)
    return head_width - 2 * space, space, space


def rope_angles(
    frames: Float[Tensor, " t"], height: int, width: int, head_width: int, theta: float = 10000.0
) -> Angles:
    """Return cosines and sines for the tokens of `t x height x width`, in that order.

    frames: positions in time, relative to the first visible latent frame.
    """
    device = frames.device
    lengths = (
        frames.float(),
        torch.arange(height, device=device),
        torch.arange(width, device=device),
    )
    parts: list[Tensor] = []
    for positions, channels in zip(lengths, axis_widths(head_width), strict=True):
        exponents = torch.arange(0, channels, 2, device=device, dtype=torch.float64) / channels
        parts.append(positions.double()[:, None] * torch.pow(theta, -exponents))
    count = len(frames)
    angles = torch.cat(
        [
            repeat(parts[0], "t f -> (t h w) f", h=height, w=width),
            repeat(parts[1], "h f -> (t h w) f", t=count, w=width),
            repeat(parts[2], "w f -> (t h w) f", t=count, h=height),
        ],
        dim=1,
    )
    return angles.cos().float(), angles.sin().float()


@lru_cache(maxsize=64)
def window_angles(
    frames: int,
    rows: int,
    columns: int,
    head_width: int,
    theta: float,
    device: torch.device,
    dtype: torch.dtype,
) -> Angles:
    """Rotary angles of the cached frames and a window; cached because few shapes occur."""
    positions = torch.arange(frames, device=device, dtype=torch.float32)
    cosine, sine = rope_angles(positions, rows, columns, head_width, theta)
    return cosine.to(dtype), sine.to(dtype)


def rotate(x: Float[Tensor, "b heads n c"], angles: Angles) -> Float[Tensor, "b heads n c"]:
    """Rotate every pair of channels by its token's angle, in the higher of both precisions."""
    cosine, sine = angles
    first, second = x.chunk(2, dim=-1)
    rotated = [first * cosine - second * sine, first * sine + second * cosine]
    return torch.cat(rotated, dim=-1).to(x.dtype)
