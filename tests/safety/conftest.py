"""Test videos: panned discs with a little noise; panned textures with a natural spectrum."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


def paint(seed: int, count: int = 24, side: int = 128, pan: float = 0.4) -> Tensor:
    """Draw frames [t h w c]."""
    drawn = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side + 40), indexing="ij")
    picture = torch.full((side, side + 40, 3), 110.0)
    for _ in range(12):
        x, y, size, *colour = torch.rand(6, generator=drawn).tolist()
        inside = (rows - y * side) ** 2 + (columns - x * side) ** 2 < (
            side * (0.05 + 0.2 * size)
        ) ** 2
        picture[inside] = torch.tensor(colour) * 200 + 25
    picture += torch.randn(side, side + 40, 1, generator=drawn) * 2
    cut = [picture[:, round(pan * index) :][:, :side] for index in range(count)]
    return torch.stack(cut).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="session")
def scene() -> Callable[..., Tensor]:
    """Return the function `paint`."""
    return paint


def paint_texture(height: int, width: int, contrast: float = 30, count: int = 9) -> Tensor:
    """Draw frames [t h w c] of 1/f spectrum, as photographs have, panned at 2 pixels a frame."""
    drawn = torch.Generator().manual_seed(0)
    side = (height, width + 2 * count)
    radius = (
        (torch.fft.fftfreq(side[0])[:, None] * side[0] / side[1]).square()
        + torch.fft.rfftfreq(side[1]).square()
    ).sqrt()
    shaped = torch.fft.rfft2(torch.randn(4, *side, generator=drawn))
    shaped = torch.fft.irfft2(shaped / radius.clamp(min=1 / side[1]), s=side)
    shaped /= shaped.std((1, 2), keepdim=True)
    picture = (shaped[:1] + 0.25 * shaped[1:]).permute(1, 2, 0) * contrast + 120
    cut = [picture[:, 2 * index :][:, :width] for index in range(count)]
    noisy = [one + torch.randn(one.shape, generator=drawn) for one in cut]
    return torch.stack(noisy).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="session")
def texture() -> Callable[..., Tensor]:
    """Return the function `paint_texture`."""
    return paint_texture
