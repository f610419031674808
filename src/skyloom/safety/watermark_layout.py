"""Spread-spectrum layout of the watermark: keyed +-1 chips on mid-frequency DCT coefficients.

The DCT grid of 128x128 is stretched over the frame, so detection is invariant to resizing. Content
is whitened by its local energy. Cox et al. 1997 (spread spectrum); Cox, Miller & Bloom (pilots,
local whitening).
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
GRID = 128
LOW = 18  # half-cycles per frame; lower frequencies carry the content
HIGH = 48  # higher frequencies do not survive compression
_PILOT = 0.15  # share of the chips
_SMOOTHING = 4  # grid pixels
_MIN_LEVEL = 2.0
_LUMA = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class CarrierLayout:
    """Chips of a key: row and column in the DCT grid, sign, index of the coded bit (-1: pilot)."""

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
        grid = torch.zeros(HIGH + 1, HIGH + 1, dtype=torch.float64)
        grid[self.rows, self.columns] = self.signs * carried
        return grid


def codeword(identity: str, key: str) -> list[int]:
    """Return the bits of an id (12 hex digits) and of its checksum, most significant first."""
    digest = hashlib.sha256(f"{key}/check/{identity}".encode()).digest()
    checksum = int.from_bytes(digest[:2]) % 2**CHECK_BITS
    value = int(identity, 16) << CHECK_BITS | checksum
    return [value >> place & 1 for place in reversed(range(ID_BITS + CHECK_BITS))]


@cache
def carrier_layout(key: str) -> CarrierLayout:
    """Return the layout of a key."""
    places = band()[1].nonzero()
    count = len(places)
    stream = hashlib.shake_256(f"{key}/layout".encode()).digest(9 * count)
    order = np.argsort(np.frombuffer(stream[: 8 * count], dtype="<u8"), kind="stable")
    signs = np.where(np.frombuffer(stream[8 * count :], dtype=np.uint8) & 1, -1.0, 1.0)
    pilots = round(_PILOT * count)
    coded = np.arange(count - pilots) % convolution.coded_bits(ID_BITS + CHECK_BITS)
    bits = np.concatenate([np.full(pilots, -1), coded])
    places = places[torch.from_numpy(order)]
    return CarrierLayout(
        places[:, 0], places[:, 1], torch.from_numpy(signs), torch.from_numpy(bits)
    )


@cache
def band() -> tuple[Tensor, Tensor]:
    """Return the radius of each coefficient, and the mask of those between LOW and HIGH."""
    index = torch.arange(HIGH + 1, dtype=torch.float64)
    radius = (index[:, None].square() + index[None].square()).sqrt()
    return radius, (radius >= LOW) & (radius <= HIGH)


@lru_cache(64)
def dct_basis(size: int, share: float = 1.0, start: float = 0.0) -> Float[Tensor, "f n"]:
    """Return the lowest HIGH + 1 DCT rows for `size` pixels that show a `share` from `start`.

    Orthonormal for share 1. Rows above the pixel count are zero.
    """
    position = (torch.arange(size, dtype=torch.float64) + 0.5) / size * share + start
    frequency = torch.arange(HIGH + 1, dtype=torch.float64)[:, None]
    rows = torch.cos(math.pi * frequency * position) * math.sqrt(2 / size)
    rows[0] /= math.sqrt(2)
    rows[size:] = 0
    return rows


def dct(pictures: Float[Tensor, "*t h w"]) -> Float[Tensor, "*t f f"]:
    """Return DCT coefficients, scaled like those of a picture of GRID pixels."""
    height, width = pictures.shape[-2:]
    scale = GRID / math.sqrt(height * width)
    return dct_basis(height) @ pictures @ dct_basis(width).T * scale


def inverse_dct(
    grid: Float[Tensor, "*t f f"], height: int = GRID, width: int = GRID
) -> Float[Tensor, "*t h w"]:
    """Return the picture of a size with these coefficients."""
    scale = math.sqrt(height * width) / GRID
    return dct_basis(height).T @ grid @ dct_basis(width) * scale


def luma(frames: UInt8[Tensor, "t h w c"]) -> Float[Tensor, "t h w"]:
    """Return the luma, 0 to 255."""
    return frames.cpu().double() @ _LUMA


def band_pass(luma: Float[Tensor, "*t h w"]) -> Float[Tensor, "*t g g"]:
    """Return the frequencies LOW to HIGH of pictures, at GRID pixels."""
    return inverse_dct(dct(luma) * band()[1])


def local_energy(middle: Float[Tensor, "*t g g"]) -> Float[Tensor, "*t g g"]:
    """Return the smoothed energy in levels squared, plus a minimum."""
    return _smoothing() @ middle.square() @ _smoothing().T + _MIN_LEVEL**2


def whiten(middle: Float[Tensor, "*t g g"]) -> Float[Tensor, "*t g g"]:
    """Divide band-passed pictures by their local energy."""
    return middle / local_energy(middle)


@cache
def _smoothing() -> Float[Tensor, "g g"]:
    """Return a Gaussian smoothing matrix with mirrored edges."""
    position = torch.arange(GRID, dtype=torch.float64)
    mirrored = (position, -1 - position, 2 * GRID - 1 - position)
    distances = [position[:, None] - other for other in mirrored]
    rows = torch.stack(
        [torch.exp(-distance.square() / (2 * _SMOOTHING**2)) for distance in distances]
    ).sum(0)
    return rows / rows.sum(1, keepdim=True)


def flatten_spectrum(grid: Float[Tensor, "*b f f"]) -> Float[Tensor, "*b f f"]:
    """Normalize each frequency ring by its RMS and clip, to suppress strong content."""
    radius, inside = band()
    ring = radius.round().long()[inside] - LOW
    values = grid[..., inside]
    power = torch.zeros(*values.shape[:-1], HIGH - LOW + 1, dtype=torch.float64)
    power = power.index_add(-1, ring, values.square()) / torch.bincount(ring)
    flat = torch.zeros_like(grid)
    flat[..., inside] = (values / power[..., ring].clamp(min=1e-24).sqrt()).clamp(-1, 1)
    return flat
