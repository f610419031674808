"""Tiling noise textures, hashing of grid cells, and interpolation functions for painting."""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_SIDE = 256
_FALLOFFS = {"soft": 2.1, "cloud": 1.7, "rough": 1.1}


def smoothstep(value: Tensor, low: float, high: float) -> Tensor:
    """Cubic Hermite step: 0 below `low`, 1 above `high`."""
    t = ((value - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def mix(first: Tensor, second: Tensor, share: Tensor | float) -> Tensor:
    """Interpolate linearly from `first` (share 0) to `second` (share 1)."""
    return torch.lerp(first, second, share)


@cache
def _texture(kind: str, device: torch.device) -> Tensor:
    random = np.random.default_rng(sorted(_FALLOFFS).index(kind) + 1)
    frequency = np.fft.fftfreq(_SIDE) * _SIDE
    radius = np.hypot(frequency[:, None], frequency[None])
    radius[0, 0] = 1e9
    field = np.fft.ifft2(
        np.fft.fft2(random.standard_normal((_SIDE, _SIDE))) * radius ** -_FALLOFFS[kind]
    ).real
    field = np.clip((field - field.mean()) / field.std() * 0.2 + 0.5, 0, 1)
    wrapped = np.pad(field, (0, 1), mode="wrap").astype(np.float32)
    return torch.from_numpy(wrapped)[None, None].to(device)


def noise(
    kind: str, x: Float[Tensor, "*shape"], y: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Sample noise in [0, 1] with mean 0.5 and period 1 in x and y; kinds: soft, cloud, rough."""
    x, y = torch.broadcast_tensors(x, y)
    grid = torch.stack([(x - x.floor()) * 2 - 1, (y - y.floor()) * 2 - 1], -1).reshape(1, 1, -1, 2)
    return F.grid_sample(_texture(kind, x.device), grid, align_corners=True).reshape(x.shape)


def hashed(cell: Float[Tensor, "*shape"], salt: float) -> Float[Tensor, "*shape"]:
    """Hash every integer to a fixed pseudorandom number in [0, 1)."""
    return torch.frac(torch.sin(cell * 12.9898 + salt * 78.233).abs() * 4375.85)
