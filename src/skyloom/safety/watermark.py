"""The invisible mark: a 48-bit id in the luma of every made frame, by spread spectrum, without any network.

A mark is one constant pattern per id and size: keyed signs on the middle frequencies of a cosine grid that is
stretched over the frame, so that a resized video needs no search. A part of the signs (the pilot) is the same for all
ids and finds the place of a crop; the others carry id and check bits behind a convolutional code. Being constant in
time, marking can be cut anywhere. Cox et al. 1997 (spread spectrum), Cox, Miller & Bloom (pilots, local whitening).

It is a label, not a lock: who knows the key can remove or forge it. docs/provenance.md has its figures.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int16, UInt8
from torch import Tensor

from skyloom.safety import convolution

KEY = "skyloom-1"
ID_BITS, CHECK_BITS = 48, 20
MIN_SIDE = 64
SURE, SURE_OF_CROP = 1.5, 5.0  # the pilot's score that the whole frame must have, and any other region
PLACES = 40_000  # regions that are looked at, at most
_GRID = 128
_LOW, _HIGH = 18, 46  # half-cycles per frame: what is lower is the picture's own, what is higher does not survive
_PILOT = 0.15
_STRENGTH = 2.0  # root mean square of the pattern in a frame of 128 pixels, of 255: 42.1 dB
_SPREAD, _FLOOR = 5, 3.0  # pixels and levels over which the detector weighs down what is busy
_SMALLEST, _SCALE_STEP = 0.84, 0.01
_WINDOW = 32  # frames that are looked at alone when a video may hold several marks
_BESIDE = 1  # pixels of the grid
_CROPS = 24  # regions that are decoded
_LUMA = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
_REFIT = 64  # frames
_SHARES = (0.5, 2.0)


@dataclass(frozen=True)
class Region:
    """What part of the marked frame a frame shows, in shares of its width and height (1, 1, 0, 0: all of it)."""

    width: float = 1.0
    height: float = 1.0
    left: float = 0.0
    top: float = 0.0


@dataclass(frozen=True)
class Mark:
    """An id (12 hex digits) found in a video; `score` is the pilot's z-score, `start` and `stop` the frames (None: to
    the end) in which this id is the one that is found."""

    identity: str
    score: float
    region: Region = Region()
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True, eq=False)
class _Layout:
    """Where a key puts its signs: row and column of each in the cosine grid, and its coded bit (-1: the pilot)."""

    rows: Tensor
    columns: Tensor
    signs: Float[Tensor, " n"]
    bits: Tensor

    @property
    def pilot(self) -> Tensor:
        return self.bits < 0


def identity_of(text: str) -> str:
    """The id of whatever a text describes: 12 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()[: ID_BITS // 4]


def identity_of_making(receipt: Mapping[str, Any]) -> str:
    """The id of the video that a receipt (Receipt.to_dict) tells of: the same wherever and whenever it is made again,
    so without paths, versions and device."""
    asked = {key: value for key, value in (receipt.get("request") or {}).items() if key != "image"}
    edit = asked.get("edit")
    if edit:
        asked["edit"] = {key: value for key, value in edit.items() if key not in ("videos", "mask")}
    asked["cards"] = [
        {key: value for key, value in card.items() if key not in ("image", "video")} for card in asked.get("cards", [])
    ]
    said = [asked, receipt.get("weights"), receipt.get("image"), receipt.get("parents")]
    return identity_of(json.dumps(said, sort_keys=True))


class Marker:
    """Marks the made frames of one video, in order, some at a time, with an id of 12 hex digits.

    Every 64 frames the pattern is fitted to the frame that comes: what the picture itself says against the id is made
    up for, at the same strength. So the same video, id and key give the same bits, however it is cut into runs.
    """

    def __init__(self, identity: str, key: str = KEY) -> None:
        self.identity, self._key, self._count = identity, key, 0
        self._pattern: Tensor | None = None

    def mark(
        self, frames: UInt8[Tensor, "t h w c"], where: Bool[Tensor, "t h w"] | None = None
    ) -> UInt8[Tensor, "t h w c"]:
        """The next frames, marked. `where` is True for what was made; everything else stays bit for bit.

        Frames with a side of less than 64 pixels hold no mark and come back as they are.
        """
        if not len(frames) or min(frames.shape[1:3]) < MIN_SIDE:
            return frames
        marked: list[Tensor] = []
        for begin, end in self._spans(len(frames)):
            if self._pattern is None or self._count % _REFIT == 0:
                self._pattern = _fitted(frames[begin], self.identity, self._key)
            added = self._pattern[None] if where is None else self._pattern[None] * where[begin:end]
            marked.append(frames[begin:end].to(torch.int16) + rearrange(added, "t h w -> t h w 1"))
            self._count += end - begin
        return torch.cat(marked).clamp(0, 255).to(torch.uint8)

    def _spans(self, count: int) -> Iterator[tuple[int, int]]:
        """Runs of the next frames that have one pattern."""
        begin = 0
        while begin < count:
            end = min(count, begin + _REFIT - self._count % _REFIT)
            yield begin, end
            begin = end


def embed(frames: UInt8[Tensor, "t h w c"], identity: str, key: str = KEY) -> UInt8[Tensor, "t h w c"]:
    """A whole video, marked."""
    return Marker(identity, key).mark(frames)


def check_of(identity: str, key: str = KEY) -> int:
    """The check bits that go with an id."""
    return int(hashlib.sha256(f"{key}/check/{identity}".encode()).hexdigest()[: CHECK_BITS // 4], 16)


def read_word(frames: UInt8[Tensor, "t h w c"], key: str = KEY) -> tuple[str, int]:
    """The likeliest id and check bits in whole frames, marked or not: what `detect` compares with `check_of`."""
    layout = _layout(key)
    return _word_in(_votes(_coefficients(_gather(frames), Region()), layout), layout)


def detect(frames: UInt8[Tensor, "t h w c"], key: str = KEY) -> Mark | None:
    """The mark of a video, or None. It finds one by luck in fewer than one of a million (docs/provenance.md)."""
    return _read(_gather(frames), key) if min(frames.shape[1:3]) >= MIN_SIDE // 2 else None


def find_marks(runs: Iterable[UInt8[Tensor, "t h w c"]], key: str = KEY) -> list[Mark]:
    """The marks of a video that comes in runs of frames, in their order; several where parts were made apart.

    Memory grows by 64 KiB for every two seconds or so.
    """
    windows, counts = _gather_windows(runs)
    if not windows:
        return []
    whole = torch.stack(windows).sum(0)
    mark = _read(whole, key)
    if len(windows) == 1:
        return [mark] if mark else []
    region, score = (mark.region, mark.score) if mark else _likeliest(whole, key)
    if score < SURE_OF_CROP:
        return [mark] if mark else []
    found = [_decode(_coefficients(window, region), key, SURE) for window in windows]
    return _joined(found, counts, region) or ([mark] if mark else [])


def _gather_windows(runs: Iterable[UInt8[Tensor, "t h w c"]]) -> tuple[list[Float[Tensor, "g g"]], list[int]]:
    """What the detector keeps of every window of frames, and how many frames each has."""
    windows: list[Tensor] = []
    counts: list[int] = []
    for frames in _recut(runs):
        if min(frames.shape[1:3]) >= MIN_SIDE // 2:
            windows.append(_gather(frames))
            counts.append(len(frames))
    return windows, counts


def _recut(runs: Iterable[UInt8[Tensor, "t h w c"]]) -> Iterator[UInt8[Tensor, "t h w c"]]:
    """Runs of any length as runs of one window."""
    held: list[Tensor] = []
    for run in runs:
        held.append(run)
        while sum(map(len, held)) >= _WINDOW:
            joined = torch.cat(held)
            yield joined[:_WINDOW]
            held = [joined[_WINDOW:]]
    if sum(map(len, held)):
        yield torch.cat(held)


def _joined(found: list[tuple[str, float] | None], counts: list[int], region: Region) -> list[Mark]:
    """Neighbouring windows with the same id as one mark; a window in which none is found goes with the one before."""
    marks: list[Mark] = []
    frame = 0
    for one, count in zip(found, counts, strict=True):
        start, frame = frame, frame + count
        if one is None or (marks and marks[-1].identity == one[0]):
            continue
        if marks:
            marks[-1] = Mark(marks[-1].identity, marks[-1].score, region, marks[-1].start, start)
        marks.append(Mark(one[0], one[1], region, start))
    return marks


@cache
def _grid() -> tuple[Tensor, Tensor]:
    """Distance of each cosine from the constant one, and which of them are used."""
    index = torch.arange(_HIGH + 1, dtype=torch.float64)
    radius = (index[:, None].square() + index[None].square()).sqrt()
    return radius, (radius >= _LOW) & (radius <= _HIGH)


@cache
def _cosines(size: int) -> Float[Tensor, "f n"]:
    """The lowest rows of an orthonormal cosine transform over `size` pixels."""
    place = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    rows = torch.cos(math.pi * torch.arange(_HIGH + 1, dtype=torch.float64)[:, None] * place) * math.sqrt(2 / size)
    rows[0] /= math.sqrt(2)
    return rows


@cache
def _layout(key: str) -> _Layout:
    places = _grid()[1].nonzero()
    count = len(places)
    stream = np.frombuffer(hashlib.shake_256(f"{key}/layout".encode()).digest(9 * count), dtype=np.uint8)
    order = np.argsort(stream[: 8 * count].reshape(count, 8).copy().view("<u8")[:, 0], kind="stable")
    signs = np.where(stream[8 * count :] & 1, -1.0, 1.0)
    pilots = round(_PILOT * count)
    carried = np.arange(count - pilots) % convolution.coded_bits(ID_BITS + CHECK_BITS)
    bits = np.concatenate([np.full(pilots, -1), carried])
    places = places[torch.from_numpy(order)]
    return _Layout(places[:, 0], places[:, 1], torch.from_numpy(signs), torch.from_numpy(bits))


def _fitted(frame: UInt8[Tensor, "h w c"], identity: str, key: str) -> Int16[Tensor, "h w"]:
    """What is added to the luma of a frame and of those after it: an even pattern, with more of what the frame itself
    votes against and less of what it votes for."""
    layout = _layout(key)
    code = torch.from_numpy(convolution.encode(_word(identity, key))).double()
    wanted = torch.cat([code, torch.ones(1).double()])[layout.bits]  # -1, the pilot, is the last
    even = _pattern(layout, wanted, frame.shape[0], frame.shape[1])
    luma = _luma(frame[None].cpu())
    weights = 1 / (_blur(_middle(luma + even).square()) + _FLOOR**2)
    own = _votes(_transform((_middle(luma) * weights)[0]), layout) * wanted
    added = _votes(_transform((_middle(even[None]) * weights)[0]), layout) * wanted
    group = torch.where(layout.pilot, layout.bits.max() + 1, layout.bits)
    votes = _mean_by(own, group) / added.mean()
    sizes = torch.bincount(group)
    low, high = 0.0, 8.0
    for _ in range(40):
        level = (low + high) / 2
        power = ((level - votes).clamp(*_SHARES).square() * sizes).sum() / len(group)
        low, high = (level, high) if power < 1 else (low, level)
    shares = (low - votes).clamp(*_SHARES)[group]
    return _pattern(layout, wanted * shares, frame.shape[0], frame.shape[1]).round().to(torch.int16)


def _mean_by(values: Float[Tensor, " n"], group: Tensor) -> Float[Tensor, " g"]:
    count = torch.bincount(group)
    return torch.zeros(len(count), dtype=values.dtype).index_add(0, group, values) / count


def _pattern(layout: _Layout, carried: Float[Tensor, " n"], height: int, width: int) -> Float[Tensor, "h w"]:
    """Signs times what they carry, as a picture of a strength that goes with its size."""
    grid = torch.zeros(_HIGH + 1, _HIGH + 1, dtype=torch.float64)
    grid[layout.rows, layout.columns] = layout.signs * carried
    pattern = _cosines(height).T @ grid @ _cosines(width)
    strength = _STRENGTH * (_GRID / max(_GRID, min(height, width))) ** 0.25
    return pattern * strength / pattern.square().mean().sqrt()


def _word(identity: str, key: str) -> list[int]:
    """The bits of an id and its check, highest first."""
    value = (int(identity, 16) << CHECK_BITS) | check_of(identity, key)
    return [value >> place & 1 for place in reversed(range(ID_BITS + CHECK_BITS))]


def _gather(frames: UInt8[Tensor, "t h w c"]) -> Float[Tensor, "g g"]:
    """The sum over frames of their middle frequencies on the grid, weighed down where a picture is busy."""
    middle = _middle(_luma(frames.cpu()))
    return (middle / (_blur(middle.square()) + _FLOOR**2)).sum(0)


def _luma(frames: UInt8[Tensor, "t h w c"]) -> Float[Tensor, "t h w"]:
    return frames.double() @ _LUMA


def _middle(luma: Float[Tensor, "t h w"]) -> Float[Tensor, "t g g"]:
    """The used frequencies of frames, on the grid."""
    small = F.interpolate(luma[:, None], (_GRID, _GRID), mode="bicubic", antialias=True, align_corners=False)[:, 0]
    cosines = _cosines(_GRID)
    return cosines.T @ (_transform(small) * _grid()[1]) @ cosines


def _transform(pictures: Float[Tensor, "*t g g"]) -> Float[Tensor, "*t f f"]:
    return _cosines(_GRID) @ pictures @ _cosines(_GRID).T


def _blur(values: Float[Tensor, "t g g"]) -> Float[Tensor, "t g g"]:
    """A Gaussian mean of the neighbourhood."""
    reach = 3 * _SPREAD
    kernel = torch.exp(-torch.arange(-reach, reach + 1, dtype=torch.float64).square() / (2 * _SPREAD**2))
    kernel = kernel / kernel.sum()
    padded = F.pad(values[:, None], (reach,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel[None, None, :, None]), kernel[None, None, None])[:, 0]


def _read(gathered: Float[Tensor, "g g"], key: str) -> Mark | None:
    """The first id that checks out, the whole frame first, then the likeliest crops."""
    for region in (Region(), *_regions(gathered, key)):
        found = _decode(_coefficients(gathered, region), key, SURE if region == Region() else SURE_OF_CROP)
        if found is not None:
            return Mark(found[0], found[1], region)
    return None


def _likeliest(gathered: Float[Tensor, "g g"], key: str) -> tuple[Region, float]:
    """The region whose pilot stands out most, and its z-score."""
    layout = _layout(key)
    regions = [Region(), *_regions(gathered, key)]
    scored = [(_pilot_score(_votes(_coefficients(gathered, one), layout), layout), one) for one in regions]
    score, region = max(scored, key=lambda pair: pair[0])
    return region, score


def _coefficients(gathered: Float[Tensor, "g g"], region: Region) -> Float[Tensor, "f f"]:
    """The cosine coefficients of a frame of which `region` is known, flattened so that each ring weighs the same."""
    canvas = torch.zeros(_GRID, _GRID, dtype=torch.float64)
    height, width = round(_GRID * region.height), round(_GRID * region.width)
    top, left = round(_GRID * region.top), round(_GRID * region.left)
    canvas[top : top + height, left : left + width] = _shrink(gathered, height, width)
    return _flatten(_transform(canvas))


def _flatten(grid: Float[Tensor, "f f"]) -> Float[Tensor, "f f"]:
    """Divide by the root mean square of the ring: pictures have more of the low frequencies."""
    radius, used = _grid()
    ring = radius.round().long()[used]
    size = _HIGH + 2
    power = torch.zeros(size, dtype=torch.float64).index_add(0, ring, grid[used].square())
    power /= torch.zeros(size, dtype=torch.float64).index_add(0, ring, torch.ones(len(ring)).double()).clamp(min=1)
    smooth = F.avg_pool1d(F.pad(power[None, None], (2, 2), mode="replicate"), 5, 1)[0, 0]
    flat = torch.zeros_like(grid)
    flat[used] = grid[used] / smooth[ring].clamp(min=1e-12).sqrt()
    return flat


def _shrink(picture: Tensor, height: int, width: int) -> Tensor:
    if picture.shape == (height, width):
        return picture
    return F.interpolate(picture[None, None], (height, width), mode="bicubic", antialias=True)[0, 0]


def _votes(grid: Float[Tensor, "f f"], layout: _Layout) -> Float[Tensor, " n"]:
    return grid[layout.rows, layout.columns] * layout.signs


def _pilot_score(signed: Float[Tensor, " n"], layout: _Layout) -> float:
    """Sum over root sum of squares: over random keys of zero mean and unit variance, whatever the picture."""
    pilot = signed[layout.pilot]
    return float(pilot.sum() / pilot.square().sum().sqrt().clamp(min=1e-12))


def _decode(grid: Float[Tensor, "f f"], key: str, enough: float) -> tuple[str, float] | None:
    """The id in the coefficients and the pilot's score, if that is enough and the check bits agree."""
    layout = _layout(key)
    votes = _votes(grid, layout)
    score = _pilot_score(votes, layout)
    if score < enough:
        return None
    identity, check = _word_in(votes, layout)
    return (identity, score) if check == check_of(identity, key) else None


def _word_in(votes: Float[Tensor, " n"], layout: _Layout) -> tuple[str, int]:
    """The likeliest id and check bits."""
    carriers = ~layout.pilot
    soft = torch.zeros(convolution.coded_bits(ID_BITS + CHECK_BITS), dtype=torch.float64)
    soft = soft.index_add(0, layout.bits[carriers], votes[carriers])
    value = int("".join(map(str, convolution.decode(soft.numpy()))), 2)
    return f"{value >> CHECK_BITS:0{ID_BITS // 4}x}", value & (2**CHECK_BITS - 1)


def _regions(gathered: Float[Tensor, "g g"], key: str) -> Iterator[Region]:
    """The likeliest crops, by the pilot's correlation at all scales and places, none right beside another."""
    spectrum = _pilot_spectrum(key)
    even = _cosines(_GRID).T @ _flatten(_transform(gathered)) @ _cosines(_GRID)
    sizes = [round(_GRID * (1 - _SCALE_STEP * step)) for step in range(int((1 - _SMALLEST) / _SCALE_STEP) + 1)]
    found: list[tuple[float, tuple[int, int, int, int]]] = []
    for height in sizes:
        band = _shrink(even, height, _GRID)
        for width in sizes:
            part = _shrink(band, height, width)
            moved = torch.fft.irfft2(spectrum * torch.fft.rfft2(part, (2 * _GRID, 2 * _GRID)).conj())
            scores = moved[: _GRID - height + 1, : _GRID - width + 1] / part.norm().clamp(min=1e-12)
            best, place = scores.flatten().max(0)
            top, left = divmod(int(place), _GRID - width + 1)
            found.append((float(best), (width, height, left, top)))
    found.sort(reverse=True)
    chosen: list[tuple[int, int, int, int]] = []
    for _, one in found:
        if all(max(abs(a - b) for a, b in zip(one, other, strict=True)) > _BESIDE for other in chosen):
            chosen.append(one)
    return (Region(*(side / _GRID for side in one)) for one in chosen[:_CROPS])


@cache
def _pilot_spectrum(key: str) -> Tensor:
    layout = _layout(key)
    grid = torch.zeros(_HIGH + 1, _HIGH + 1, dtype=torch.float64)
    grid[layout.rows[layout.pilot], layout.columns[layout.pilot]] = layout.signs[layout.pilot]
    pilot = _cosines(_GRID).T @ grid @ _cosines(_GRID)
    return torch.fft.rfft2(pilot, (2 * _GRID, 2 * _GRID))
