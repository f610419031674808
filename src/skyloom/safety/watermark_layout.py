"""Where the watermark sits in a frame: keyed signs on middle frequencies, and how much of each a picture has.

Everything is on a cosine grid of 128 by 128 that is stretched over the frame, so that a resized video needs no search.
What a frame says is weighed down where the picture is busy. Cox et al. 1997 (spread spectrum), Cox, Miller & Bloom
(pilots, local whitening).
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from skyloom.safety import convolutional_code as convolution

KEY = "skyloom-1"
ID_BITS, CHECK_BITS = 48, 12
GRID = 128
LOW, HIGH = (
    18,
    48,
)  # half-cycles per frame: what is lower is the picture's own, what is higher does not survive
_PILOT = 0.15
_SPREAD, _FLOOR = 4, 2.0  # pixels of the grid and levels over which what is busy is weighed down
_LUMA = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class CarrierLayout:
    """Where a key puts its signs: row and column of each in the cosine grid, and its coded bit (-1: the pilot)."""

    rows: Tensor
    columns: Tensor
    signs: Float[Tensor, " n"]
    bits: Tensor

    @property
    def pilot(self) -> Tensor:
        return self.bits < 0

    def votes(self, grid: Float[Tensor, "*b f f"]) -> Float[Tensor, "*b n"]:
        """Coefficients as agreement with the signs."""
        return grid[..., self.rows, self.columns] * self.signs

    def carry(self, word: Sequence[int]) -> Float[Tensor, " n"]:
        """What each sign carries for the bits of a word: 1 or -1, and 1 for the pilot."""
        code = np.append(convolution.encode(np.array([word])), 1)
        return torch.from_numpy(code).double()[self.bits]  # -1, the pilot, is the last

    def grid_of(self, carried: Float[Tensor, " n"]) -> Float[Tensor, "f f"]:
        """Signs times what they carry, in their places."""
        grid = torch.zeros(HIGH + 1, HIGH + 1, dtype=torch.float64)
        grid[self.rows, self.columns] = self.signs * carried
        return grid


def word_of(identity: str, key: str) -> list[int]:
    """The bits of an id (12 hex digits) and its check, highest first."""
    check = (
        int.from_bytes(hashlib.sha256(f"{key}/check/{identity}".encode()).digest()[:2])
        % 2**CHECK_BITS
    )
    value = int(identity, 16) << CHECK_BITS | check
    return [value >> place & 1 for place in reversed(range(ID_BITS + CHECK_BITS))]


@cache
def layout_of(key: str) -> CarrierLayout:
    """The layout that goes with a key."""
    places = used()[1].nonzero()
    count = len(places)
    stream = np.frombuffer(
        hashlib.shake_256(f"{key}/layout".encode()).digest(9 * count), dtype=np.uint8
    )
    order = np.argsort(
        stream[: 8 * count].reshape(count, 8).copy().view("<u8")[:, 0], kind="stable"
    )
    signs = np.where(stream[8 * count :] & 1, -1.0, 1.0)
    pilots = round(_PILOT * count)
    carried = np.arange(count - pilots) % convolution.coded_bits(ID_BITS + CHECK_BITS)
    bits = np.concatenate([np.full(pilots, -1), carried])
    places = places[torch.from_numpy(order)]
    return CarrierLayout(
        places[:, 0], places[:, 1], torch.from_numpy(signs), torch.from_numpy(bits)
    )


@cache
def used() -> tuple[Tensor, Tensor]:
    """Distance of each cosine from the constant one, and which of them are used."""
    index = torch.arange(HIGH + 1, dtype=torch.float64)
    radius = (index[:, None].square() + index[None].square()).sqrt()
    return radius, (radius >= LOW) & (radius <= HIGH)


@lru_cache(64)
def cosines(size: int, share: float = 1.0, start: float = 0.0) -> Float[Tensor, "f n"]:
    """The lowest cosines of a frame of which `size` pixels show a share, from `start` on; orthonormal for all of it.

    They are zero where so few pixels have none.
    """
    place = (torch.arange(size, dtype=torch.float64) + 0.5) / size * share + start
    rows = torch.cos(
        math.pi * torch.arange(HIGH + 1, dtype=torch.float64)[:, None] * place
    ) * math.sqrt(2 / size)
    rows[0] /= math.sqrt(2)
    rows[size:] = 0
    return rows


def transform(pictures: Float[Tensor, "*t h w"]) -> Float[Tensor, "*t f f"]:
    """Cosine coefficients, as those of a picture of the grid's size."""
    height, width = pictures.shape[-2:]
    scale = GRID / math.sqrt(height * width)
    return cosines(height) @ pictures @ cosines(width).T * scale


def picture_of(
    grid: Float[Tensor, "*t f f"], height: int = GRID, width: int = GRID
) -> Float[Tensor, "*t h w"]:
    """The picture of that size that has these coefficients."""
    scale = math.sqrt(height * width) / GRID
    return cosines(height).T @ grid @ cosines(width) * scale


def luma_of(frames: UInt8[Tensor, "t h w c"]) -> Float[Tensor, "t h w"]:
    """Brightness, 0 to 255."""
    return frames.cpu().double() @ _LUMA


def middle_of(luma: Float[Tensor, "*t h w"]) -> Float[Tensor, "*t g g"]:
    """The used frequencies of pictures, on the grid."""
    return picture_of(transform(luma) * used()[1])


def activity_of(middle: Float[Tensor, "*t g g"]) -> Float[Tensor, "*t g g"]:
    """How busy the picture is around each place of the grid, in levels squared; never less than a floor."""
    return _smoothing() @ middle.square() @ _smoothing().T + _FLOOR**2


def weigh(middle: Float[Tensor, "*t g g"]) -> Float[Tensor, "*t g g"]:
    """Middle frequencies, weighed down where the picture is busy."""
    return middle / activity_of(middle)


@cache
def _smoothing() -> Float[Tensor, "g g"]:
    """A Gaussian mean of the neighbourhood along one side, mirrored at the edges."""
    place = torch.arange(GRID, dtype=torch.float64)
    distances = [place[:, None] - other for other in (place, -1 - place, 2 * GRID - 1 - place)]
    rows = torch.stack(
        [torch.exp(-distance.square() / (2 * _SPREAD**2)) for distance in distances]
    ).sum(0)
    return rows / rows.sum(1, keepdim=True)


def flatten(grid: Float[Tensor, "*b f f"]) -> Float[Tensor, "*b f f"]:
    """Divide by the root mean square of the ring and cut what is above it: pictures have more of the low frequencies,
    and a few coefficients of theirs stand out."""
    radius, inside = used()
    ring = radius.round().long()[inside] - LOW
    values = grid[..., inside]
    power = torch.zeros(*values.shape[:-1], HIGH - LOW + 1, dtype=torch.float64)
    power = power.index_add(-1, ring, values.square()) / torch.bincount(ring)
    flat = torch.zeros_like(grid)
    flat[..., inside] = (values / power[..., ring].clamp(min=1e-24).sqrt()).clamp(-1, 1)
    return flat
