"""Reads the watermark: what all frames say together, the whole frame first, then crops that the pilot points at.

An id counts when the signs that carry it agree with the picture better than any of 2^48 ids would by luck; the pilot's
signs, which choose the places to look at, have no part in that. Check bits keep a half-read id from being told.
docs/provenance.md has the arithmetic and the figures.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from skyloom.safety import convolutional_code as convolution
from skyloom.safety.watermark_layout import (
    CHECK_BITS,
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
    word_of,
)

SURE, SURE_ELSEWHERE = (
    9.8,
    10.4,
)  # scores that an id must have: in all frames and the whole of them, or in a part
PLACES = 256  # crops that are read, of those that are compared with the pilot
_TRIES = 8  # ids that are held against their check bits
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


def highest_score(frames: UInt8[Tensor, "t h w c"], key: str = KEY) -> float:
    """The score of the best word in whole frames, marked or not, whether its check bits agree or not."""
    return float(_words(_gather(frames, _FIRST), [Region()], key)[1].max())


def detect(frames: UInt8[Tensor, "t h w c"], key: str = KEY, crops: bool = True) -> Mark | None:
    """The mark of a video, or None; without `crops` only if it is there whole, which takes a tenth of the time.

    It finds one by luck in fewer than one of a million (docs/provenance.md).
    """
    return (
        _search(_gather(frames, _FIRST), key, crops)
        if min(frames.shape[1:3]) >= _MIN_SIDE
        else None
    )


def find_watermarks(runs: Iterable[UInt8[Tensor, "t h w c"]], key: str = KEY) -> list[Mark]:
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
    found = [_read(window, [region], key, SURE_ELSEWHERE) for window in windows]
    return _joined(found, counts) or ([mark] if mark else [])


def _gather(frames: UInt8[Tensor, "t h w c"], first: int) -> Float[Tensor, "g g"]:
    """The sum over frames of their middle frequencies on the grid, weighed down where a picture is busy; the first
    frame counts so many times."""
    summed = torch.stack([weigh(middle_of(luma_of(part))).sum(0) for part in frames.split(8)]).sum(
        0
    )
    return summed + (first - 1) * weigh(middle_of(luma_of(frames[0])))


def _gather_windows(
    runs: Iterable[UInt8[Tensor, "t h w c"]],
) -> tuple[list[Float[Tensor, "g g"]], list[int]]:
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


def _joined(found: list[Mark | None], counts: list[int]) -> list[Mark]:
    """Neighbouring windows with the same id as one mark; a window in which none is found goes with the one before."""
    marks: list[Mark] = []
    frame = 0
    for one, count in zip(found, counts, strict=True):
        start, frame = frame, frame + count
        if one is None or (marks and marks[-1].identity == one.identity):
            continue
        if marks:
            marks[-1] = replace(marks[-1], stop=start)
        marks.append(replace(one, start=start))
    return marks


def _search(gathered: Float[Tensor, "g g"], key: str, crops: bool = True) -> Mark | None:
    """The id that stands out in the whole frame, else in one of the likeliest crops."""
    mark = _read(gathered, [Region()], key, SURE)
    return (
        mark if mark or not crops else _read(gathered, _places(gathered, key), key, SURE_ELSEWHERE)
    )


def _read(
    gathered: Float[Tensor, "g g"], regions: list[Region], key: str, enough: float
) -> Mark | None:
    """The id that stands out most in any of the regions, by that score at least, and whose check bits agree."""
    words, scores = _words(gathered, regions, key)
    tried: set[str] = set()
    for index in scores.flatten().argsort(descending=True):
        region, detour = divmod(int(index), scores.shape[1])
        if scores[region, detour] < enough or len(tried) == _TRIES:
            break
        word = words[region, detour].tolist()
        identity = f"{int(''.join(map(str, word[:ID_BITS])), 2):0{ID_BITS // 4}x}"
        if word == word_of(identity, key):
            return Mark(identity, float(scores[region, detour]), regions[region])
        tried.add(identity)
    return None


def _words(
    gathered: Float[Tensor, "g g"], regions: list[Region], key: str
) -> tuple[Int[np.ndarray, "r a n"], Float[Tensor, "r a"]]:
    """The likeliest words in each region, and their scores: sums over a root sum of squares, which over random signs
    are of zero mean and unit variance, whatever the picture."""
    layout = layout_of(key)
    tall = torch.stack([cosines(GRID, region.height, region.top) for region in regions])
    wide = torch.stack([cosines(GRID, region.width, region.left) for region in regions])
    votes = layout.votes(flatten(tall @ gathered @ wide.mT))[:, ~layout.pilot]
    count = convolution.coded_bits(ID_BITS + CHECK_BITS)
    soft = torch.zeros(len(regions), count, dtype=torch.float64).index_add(
        1, layout.bits[~layout.pilot], votes
    )
    words = convolution.decode(soft.numpy())
    coded = torch.from_numpy(convolution.encode(rearrange(words, "r a n -> (r a) n"))).double()
    agreed = (rearrange(coded, "(r a) m -> r a m", r=len(regions)) * soft[:, None]).sum(2)
    return words, agreed / votes.square().sum(1, keepdim=True).sqrt().clamp(min=1e-12)


def _places(gathered: Float[Tensor, "g g"], key: str) -> list[Region]:
    """The regions in which the picture agrees with the pilot most, best first."""
    layout = layout_of(key)
    pilot = layout.grid_of(layout.pilot.double())
    sides, seen = _sides()
    agreed = (flatten(transform(gathered)).T @ seen @ pilot).flatten(1) @ seen.flatten(1).T
    chosen = [divmod(int(index), len(sides)) for index in agreed.flatten().topk(PLACES).indices]
    return [
        Region(sides[wide][0], sides[tall][0], sides[wide][1], sides[tall][1])
        for tall, wide in chosen
    ]


@cache
def _sides() -> tuple[list[tuple[float, float]], Float[Tensor, "n f f"]]:
    """The parts of a side that a crop may leave (share and start), and what each cosine of the side becomes in each."""
    sizes = range(_SMALLEST, GRID + 1)
    sides = [(size / GRID, start / GRID) for size in sizes for start in range(GRID - size + 1)]
    whole = cosines(GRID)
    return sides, torch.stack([whole @ cosines(GRID, *side).T for side in sides])
