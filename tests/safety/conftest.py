"""Test videos: overlapping discs with a little noise, panning."""

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
