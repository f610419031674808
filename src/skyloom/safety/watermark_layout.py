"""Spread-spectrum layout of the watermark: keyed +-1 chips on mid-frequency DCT coefficients.

The DCT grid is stretched over the frame, so detection is invariant to resizing. Large frames have
a grid and a band of their own, with more carriers and less content. Content is whitened by its
local energy. Cox et al. 1997 (spread spectrum); Cox, Miller & Bloom (pilots, local whitening).
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
ID_BITS = 48
CHECK_BITS = 12
_MIN_LEVEL = 2.0
_LUMA = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)


@dataclass(frozen=True)
class Band:
    """Frequencies of the carriers, in half-cycles per frame, on a DCT grid of `grid` pixels a side.

    Below `low` there is too much content; above `high` nothing survives compression. A share
    `pilot` of the chips, which lie below `pilot_high`, are pilots. `name` enters the key stream.
    """

    name: str
    grid: int
    low: int
    high: int
    pilot: float
    pilot_high: int


SMALL = Band("layout", 128, 18, 48, pilot=0.15, pilot_high=48)
LARGE = Band("layout-large", 256, 48, 112, pilot=0.22, pilot_high=96)
LARGE_SIDE = 400  # pixels of the shorter side from which frames are marked in LARGE


@dataclass(frozen=True, eq=False)
class CarrierLayout:
    """Chips of a key: row and column in the DCT grid, sign, index of the coded bit (-1: pilot)."""

    band: Band
    rows: Tensor
    columns: Tensor
    signs: Float[Tensor, " n"]
    bits: Tensor

    @property
    def pilot(self) -> Tensor:
        """Mask of the pilot chips."""
        return self.bits < 0

    def votes(self, grid: Float[Tensor, "*b f f"]) -> Float[Tensor, "*b n"]:
        """Return the coefficients times the chip signs."""
        return grid[..., self.rows, self.columns] * self.signs

    def carry(self, word: Sequence[int]) -> Float[Tensor, " n"]:
        """Return the value of each chip for a codeword: 1 or -1, and 1 for the pilot."""
        code = np.append(convolution.encode(np.array([word])), 1)
        return torch.from_numpy(code).double()[self.bits]  # index -1, the pilot, is the appended 1

    def to_grid(self, carried: Float[Tensor, " n"]) -> Float[Tensor, "f f"]:
        """Return the DCT grid of chip values."""
        grid = torch.zeros(self.band.high + 1, self.band.high + 1, dtype=torch.float64)
        grid[self.rows, self.columns] = self.signs * carried
        return grid


def codeword(identity: str, key: str) -> list[int]:
    """Return the bits of an id (12 hex digits) and of its checksum, most significant first."""
    digest = hashlib.sha256(f"{key}/check/{identity}".encode()).digest()
    checksum = int.from_bytes(digest[:2]) % 2**CHECK_BITS
    value = int(identity, 16) << CHECK_BITS | checksum
    return [value >> place & 1 for place in reversed(range(ID_BITS + CHECK_BITS))]


@cache
def carrier_layout(key: str, band: Band) -> CarrierLayout:
    """Return the layout of a key in a band."""
    radius, inside = frequencies(band)
    places = inside.nonzero()
    count = len(places)
    stream = hashlib.shake_256(f"{key}/{band.name}".encode()).digest(9 * count)
    order = np.argsort(np.frombuffer(stream[: 8 * count], dtype="<u8"), kind="stable")
    signs = np.where(np.frombuffer(stream[8 * count :], dtype=np.uint8) & 1, -1.0, 1.0)
    pilots = round(band.pilot * count)
    places = places[torch.from_numpy(order)]
    allowed = radius[places[:, 0], places[:, 1]] <= band.pilot_high
    first = allowed & (allowed.cumsum(0) <= pilots)
    places = torch.cat([places[first], places[~first]])
    coded = np.arange(count - pilots) % convolution.coded_bits(ID_BITS + CHECK_BITS)
    bits = np.concatenate([np.full(pilots, -1), coded])
    return CarrierLayout(
        band, places[:, 0], places[:, 1], signs=torch.from_numpy(signs), bits=torch.from_numpy(bits)
    )


@cache
def frequencies(band: Band) -> tuple[Tensor, Tensor]:
    """Return the radius of each coefficient, and the mask of those inside the band."""
    index = torch.arange(band.high + 1, dtype=torch.float64)
    radius = (index[:, None].square() + index[None].square()).sqrt()
    return radius, (radius >= band.low) & (radius <= band.high)


@lru_cache(64)
def dct_basis(
    band: Band, size: int, share: float = 1.0, start: float = 0.0
) -> Float[Tensor, "f n"]:
    """Return the lowest high + 1 DCT rows for `size` pixels that show a `share` from `start`.

    Orthonormal for share 1. Rows above the pixel count are zero.
    """
    position = (torch.arange(size, dtype=torch.float64) + 0.5) / size * share + start
    frequency = torch.arange(band.high + 1, dtype=torch.float64)[:, None]
    rows = torch.cos(math.pi * frequency * position) * math.sqrt(2 / size)
    rows[0] /= math.sqrt(2)
    rows[size:] = 0
    return rows


def dct(band: Band, pictures: Float[Tensor, "*t h w"]) -> Float[Tensor, "*t f f"]:
    """Return DCT coefficients, scaled like those of a picture of the band's grid."""
    height, width = pictures.shape[-2:]
    scale = band.grid / math.sqrt(height * width)
    return dct_basis(band, height) @ pictures @ dct_basis(band, width).T * scale


def inverse_dct(
    band: Band, grid: Float[Tensor, "*t f f"], size: tuple[int, int] | None = None
) -> Float[Tensor, "*t h w"]:
    """Return the picture of a size (height, width; default: the grid) with these coefficients."""
    height, width = size or (band.grid, band.grid)
    scale = math.sqrt(height * width) / band.grid
    return dct_basis(band, height).T @ grid @ dct_basis(band, width) * scale


def luma(frames: UInt8[Tensor, "t h w c"]) -> Float[Tensor, "t h w"]:
    """Return the luma, 0 to 255."""
    return frames.cpu().double() @ _LUMA


def band_pass(band: Band, luma: Float[Tensor, "*t h w"]) -> Float[Tensor, "*t g g"]:
    """Return the frequencies of a band of pictures, at the pixels of its grid."""
    return inverse_dct(band, dct(band, luma) * frequencies(band)[1])


def local_energy(middle: Float[Tensor, "*t g g"]) -> Float[Tensor, "*t g g"]:
    """Return the smoothed energy in levels squared, plus a minimum."""
    smoothing = _smoothing(middle.shape[-1])
    return smoothing @ middle.square() @ smoothing.T + _MIN_LEVEL**2


def whiten(middle: Float[Tensor, "*t g g"]) -> Float[Tensor, "*t g g"]:
    """Divide band-passed pictures by their local energy."""
    return middle / local_energy(middle)


@cache
def _smoothing(grid: int) -> Float[Tensor, "g g"]:
    """Return a Gaussian smoothing matrix with mirrored edges; sigma is 1/32 of the side."""
    position = torch.arange(grid, dtype=torch.float64)
    mirrored = (position, -1 - position, 2 * grid - 1 - position)
    distances = [position[:, None] - other for other in mirrored]
    rows = torch.stack(
        [torch.exp(-distance.square() / (2 * (grid // 32) ** 2)) for distance in distances]
    ).sum(0)
    return rows / rows.sum(1, keepdim=True)


def flatten_spectrum(band: Band, grid: Float[Tensor, "*b f f"]) -> Float[Tensor, "*b f f"]:
    """Normalize each frequency ring by its RMS and clip, to suppress strong content."""
    radius, inside = frequencies(band)
    ring = radius.round().long()[inside] - band.low
    values = grid[..., inside]
    rings = band.high - band.low + 1
    power = torch.zeros(*values.shape[:-1], rings, dtype=torch.float64)
    power = power.index_add(-1, ring, values.square()) / torch.bincount(ring)
    flat = torch.zeros_like(grid)
    flat[..., inside] = (values / power[..., ring].clamp(min=1e-24).sqrt()).clamp(-1, 1)
    return flat
