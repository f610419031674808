"""Reads the watermark: what all frames say together, the whole frame first, then crops that the pilot points at.

An id counts when the signs that carry it agree with the picture better than any of 2^48 ids would by luck; the pilot's
signs, which choose the places to look at, have no part in that. docs/provenance.md has the arithmetic and the figures.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from skyloom.safety import convolution
from skyloom.safety.carriers import (
    GRID,
    ID_BITS,
    KEY,
    cosines,
    flatten,
    layout_of,
    luma_of,
    middle_of,
    transform,
    weigh,
)

SURE, SURE_ELSEWHERE = 9.8, 10.4  # scores that an id must have: in all frames and the whole of them, or in a part
PLACES = 256  # crops that are read, of those that are compared with the pilot
_SMALLEST = 102  # side of a crop, of 128
_MIN_SIDE = 32
_FIRST = 7  # the first frame counts as so many: codecs spend most on it, and in what moves they lose the mark after it
_WINDOW = 32  # frames that are looked at alone when a video may hold several marks


@dataclass(frozen=True)
class Region:
    """What part of the marked frame a frame shows, in shares of its width and height (1, 1, 0, 0: all of it)."""

    width: float = 1.0
    height: float = 1.0
    left: float = 0.0
    top: float = 0.0


@dataclass(frozen=True)
class Mark:
    """An id (12 hex digits) found in a video; `score` is how far it stands out, in standard deviations of luck, `start`
    and `stop` the frames (None: to the end) in which this id is the one that is found."""

    identity: str
    score: float
    region: Region = Region()
    start: int = 0
    stop: int | None = None


def likeliest(frames: UInt8[Tensor, "t h w c"], key: str = KEY) -> Mark:
    """The likeliest id in whole frames, marked or not: what `detect` holds against SURE."""
    return _read(_gather(frames, _FIRST), [Region()], key)


def detect(frames: UInt8[Tensor, "t h w c"], key: str = KEY) -> Mark | None:
    """The mark of a video, or None. It finds one by luck in fewer than one of a million (docs/provenance.md)."""
    return _search(_gather(frames, _FIRST), key) if min(frames.shape[1:3]) >= _MIN_SIDE else None


def find_marks(runs: Iterable[UInt8[Tensor, "t h w c"]], key: str = KEY) -> list[Mark]:
    """The marks of a video that comes in runs of frames, in their order; several where parts were made apart.

    Memory grows by 128 KiB for every two seconds or so.
    """
    windows, counts = _gather_windows(runs)
    if not windows:
        return []
    whole = torch.stack(windows).sum(0)
    mark = _search(whole, key)
    if len(windows) == 1:
        return [mark] if mark else []
    region = mark.region if mark else _places(whole, key)[0]
    found = [_read(window, [region], key) for window in windows]
    return _joined(found, counts) or ([mark] if mark else [])


def _gather(frames: UInt8[Tensor, "t h w c"], first: int) -> Float[Tensor, "g g"]:
    """The sum over frames of their middle frequencies on the grid, weighed down where a picture is busy; the first
    frame counts so many times."""
    summed = torch.stack([weigh(middle_of(luma_of(part))).sum(0) for part in frames.split(8)]).sum(0)
    return summed + (first - 1) * weigh(middle_of(luma_of(frames[0])))


def _gather_windows(runs: Iterable[UInt8[Tensor, "t h w c"]]) -> tuple[list[Float[Tensor, "g g"]], list[int]]:
    """What the detector keeps of every window of frames, and how many frames each has."""
    windows: list[Tensor] = []
    counts: list[int] = []
    for frames in _recut(runs):
        if min(frames.shape[1:3]) >= _MIN_SIDE:
            windows.append(_gather(frames, 1 if windows else _FIRST))
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


def _joined(found: list[Mark], counts: list[int]) -> list[Mark]:
    """Neighbouring windows with the same id as one mark; a window in which none is sure goes with the one before."""
    marks: list[Mark] = []
    frame = 0
    for one, count in zip(found, counts, strict=True):
        start, frame = frame, frame + count
        if one.score < SURE_ELSEWHERE or (marks and marks[-1].identity == one.identity):
            continue
        if marks:
            marks[-1] = replace(marks[-1], stop=start)
        marks.append(replace(one, start=start))
    return marks


def _search(gathered: Float[Tensor, "g g"], key: str) -> Mark | None:
    """The id that stands out in the whole frame, else in one of the likeliest crops."""
    whole = _read(gathered, [Region()], key)
    if whole.score >= SURE:
        return whole
    part = _read(gathered, _places(gathered, key), key)
    return part if part.score >= SURE_ELSEWHERE else None


def _read(gathered: Float[Tensor, "g g"], regions: list[Region], key: str) -> Mark:
    """The id that stands out most in any of the regions.

    Its score is a sum over a root sum of squares: over random signs of zero mean and unit variance, whatever the picture.
    """
    layout = layout_of(key)
    tall = torch.stack([cosines(GRID, region.height, region.top) for region in regions])
    wide = torch.stack([cosines(GRID, region.width, region.left) for region in regions])
    votes = layout.votes(flatten(tall @ gathered @ wide.mT))[:, ~layout.pilot]
    bits = layout.bits[~layout.pilot]
    soft = torch.zeros(len(regions), convolution.coded_bits(ID_BITS), dtype=torch.float64).index_add(1, bits, votes)
    words = convolution.decode(soft.numpy())
    carried = torch.from_numpy(convolution.encode(words)).double()[:, bits]
    scores = (votes * carried).sum(1) / votes.square().sum(1).sqrt().clamp(min=1e-12)
    best = int(scores.argmax())
    identity = int("".join(map(str, words[best])), 2)
    return Mark(f"{identity:0{ID_BITS // 4}x}", float(scores[best]), regions[best])


def _places(gathered: Float[Tensor, "g g"], key: str) -> list[Region]:
    """The regions in which the picture agrees with the pilot most, best first."""
    layout = layout_of(key)
    pilot = layout.grid_of(layout.pilot.double())
    sides, seen = _sides()
    agreed = (flatten(transform(gathered)).T @ seen @ pilot).flatten(1) @ seen.flatten(1).T
    chosen = [divmod(int(index), len(sides)) for index in agreed.flatten().topk(PLACES).indices]
    return [Region(sides[wide][0], sides[tall][0], sides[wide][1], sides[tall][1]) for tall, wide in chosen]


@cache
def _sides() -> tuple[list[tuple[float, float]], Float[Tensor, "n f f"]]:
    """The parts of a side that a crop may leave (share and start), and what each cosine of the side becomes in each."""
    sizes = range(_SMALLEST, GRID + 1)
    sides = [(size / GRID, start / GRID) for size in sizes for start in range(GRID - size + 1)]
    whole = cosines(GRID)
    return sides, torch.stack([whole @ cosines(GRID, *side).T for side in sides])
