"""Watermark detector: sums the evidence of all frames, tests the whole frame, then likely crops.

An id is accepted if its correlation is above what the best of 2^48 random ids reaches, and its
checksum matches. Pilot chips select the crops and do not count towards the score.
docs/provenance.md has the derivation and the figures.
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
    ID_BITS,
    KEY,
    LARGE,
    SMALL,
    Band,
    band_pass,
    carrier_layout,
    codeword,
    dct,
    dct_basis,
    flatten_spectrum,
    luma,
    whiten,
)

_MAX_CANDIDATES = 8  # ids whose checksum is tested
_MIN_SIDE = 32
_FIRST_WEIGHT = 7  # of the first frame, which codecs keep best
_BATCH_PIXELS = 2**20  # converted to 64-bit luma at once
_WINDOW = 32  # frames decoded separately to find several ids
_STEPS = 128  # positions of a crop's edges that are searched, per side of the frame


@dataclass(frozen=True)
class BandSearch:
    """How the watermark in one band is searched for.

    `threshold` is the minimum score of an id in the whole frame and all frames, `cropped` that in a
    crop or a part of the frames. Crops of sides >= `min_crop` (of 128) are ranked by pilot
    correlation; the first `max_crops` are decoded, after a finer search of their edges if `refine`.
    """

    band: Band
    threshold: float
    cropped: float
    min_crop: int
    max_crops: int
    refine: bool


SEARCHES = (
    BandSearch(SMALL, 9.8, 10.4, min_crop=102, max_crops=256, refine=False),
    BandSearch(LARGE, 10.0, 10.6, min_crop=89, max_crops=64, refine=True),
)


@dataclass(frozen=True)
class CropRegion:
    """The part of the marked frame that is shown, in shares of its width and height."""

    width: float = 1.0
    height: float = 1.0
    left: float = 0.0
    top: float = 0.0


@dataclass(frozen=True)
class DetectedWatermark:
    """A detected id (12 hex digits) in frames [start, stop); stop None is the end.

    `score` is the correlation in standard deviations of random signs.
    """

    identity: str
    score: float
    region: CropRegion = CropRegion()
    start: int = 0
    stop: int | None = None


def highest_scores(frames: UInt8[Tensor, "t h w c"], key: str = KEY) -> list[float]:
    """Return the best score of any word in whole frames per search, regardless of its checksum."""
    sums = _gather(frames, _FIRST_WEIGHT)
    return [
        float(_words(search.band, gathered, [CropRegion()], key)[1].max())
        for search, gathered in zip(SEARCHES, sums, strict=True)
    ]


def detect(
    frames: UInt8[Tensor, "t h w c"], key: str = KEY, crops: bool = True
) -> DetectedWatermark | None:
    """Detect the watermark of a video; `crops=False` tests uncropped frames only (10 times faster).

    The false positive rate is below one in a million (docs/provenance.md).
    """
    if min(frames.shape[1:3]) < _MIN_SIDE:
        return None
    found = _search(_gather(frames, _FIRST_WEIGHT), key, crops)
    return None if found is None else found[1]


def find_watermarks(
    runs: Iterable[UInt8[Tensor, "t h w c"]], key: str = KEY
) -> list[DetectedWatermark]:
    """Detect the watermarks of a video in batches, in order; several if it was spliced.

    Memory grows by 640 KiB per 32 frames.
    """
    windows, counts = _gather_windows(runs)
    if not windows:
        return []
    wholes = [torch.stack(parts).sum(0) for parts in zip(*windows, strict=True)]
    whole = _search(wholes, key)
    mark = None if whole is None else whole[1]
    if len(windows) == 1:
        return [mark] if mark else []
    marks: list[DetectedWatermark | None] = [None] * len(windows)
    for index, search in enumerate(SEARCHES):
        if whole is not None and whole[0] == index:
            region = whole[1].region
        else:
            region = _likely_crops(search, wholes[index], key)[0]
        for number, sums in enumerate(windows):
            marks[number] = marks[number] or _read(
                search.band, sums[index], [region], key, threshold=search.cropped
            )
    return _merge(marks, counts) or ([mark] if mark else [])


def _gather(frames: UInt8[Tensor, "t h w c"], first_weight: int) -> list[Float[Tensor, "g g"]]:
    """Return the sum of the whitened frequencies of all frames, in the band of each search."""
    batch = max(1, min(8, _BATCH_PIXELS // (frames.shape[1] * frames.shape[2])))
    sums: list[list[Tensor]] = [[] for _ in SEARCHES]
    for number, part in enumerate(frames.split(batch)):
        lumas = luma(part)
        for search, parts in zip(SEARCHES, sums, strict=True):
            whitened = whiten(band_pass(search.band, lumas))
            if number == 0:
                parts.append((first_weight - 1) * whitened[0])
            parts.append(whitened.sum(0))
    return [torch.stack([*parts[1:]]).sum(0) + parts[0] for parts in sums]


def _gather_windows(
    runs: Iterable[UInt8[Tensor, "t h w c"]],
) -> tuple[list[list[Float[Tensor, "g g"]]], list[int]]:
    """Return the sums of every window of 32 frames, and its frame count."""
    windows: list[list[Tensor]] = []
    counts: list[int] = []
    for frames in _rebatch(runs):
        if min(frames.shape[1:3]) >= _MIN_SIDE:
            windows.append(_gather(frames, 1 if windows else _FIRST_WEIGHT))
            counts.append(len(frames))
    return windows, counts


def _rebatch(runs: Iterable[UInt8[Tensor, "t h w c"]]) -> Iterator[UInt8[Tensor, "t h w c"]]:
    """Regroup batches of any length into windows."""
    held: list[Tensor] = []
    for run in runs:
        held.append(run)
        while sum(map(len, held)) >= _WINDOW:
            joined = torch.cat(held)
            yield joined[:_WINDOW]
            held = [joined[_WINDOW:]]
    if sum(map(len, held)):
        yield torch.cat(held)


def _merge(found: list[DetectedWatermark | None], counts: list[int]) -> list[DetectedWatermark]:
    """Merge neighbouring windows with the same id; a window without one joins the one before."""
    marks: list[DetectedWatermark] = []
    frame = 0
    for one, count in zip(found, counts, strict=True):
        start = frame
        frame += count
        if one is None or (marks and marks[-1].identity == one.identity):
            continue
        if marks:
            marks[-1] = replace(marks[-1], stop=start)
        marks.append(replace(one, start=start))
    return marks


def _search(
    sums: list[Float[Tensor, "g g"]], key: str, crops: bool = True
) -> tuple[int, DetectedWatermark] | None:
    """Detect an id in the whole frame, else in a likely crop; return the search that found it."""
    for index, (search, gathered) in enumerate(zip(SEARCHES, sums, strict=True)):
        mark = _read(search.band, gathered, [CropRegion()], key, threshold=search.threshold)
        if mark:
            return index, mark
    for index, (search, gathered) in enumerate(zip(SEARCHES, sums, strict=True)):
        regions = _likely_crops(search, gathered, key) if crops else []
        mark = _read(search.band, gathered, regions, key, threshold=search.cropped)
        if mark:
            return index, mark
    return None


def _read(
    band: Band,
    gathered: Float[Tensor, "g g"],
    regions: list[CropRegion],
    key: str,
    *,
    threshold: float,
) -> DetectedWatermark | None:
    """Return the id with the highest score in any region if threshold and checksum match."""
    if not regions:
        return None
    words, scores = _words(band, gathered, regions, key)
    tried: set[str] = set()
    for index in scores.flatten().argsort(descending=True):
        region, detour = divmod(int(index), scores.shape[1])
        if scores[region, detour] < threshold or len(tried) == _MAX_CANDIDATES:
            break
        word = words[region, detour].tolist()
        identity = f"{int(''.join(map(str, word[:ID_BITS])), 2):0{ID_BITS // 4}x}"
        if word == codeword(identity, key):
            return DetectedWatermark(identity, float(scores[region, detour]), regions[region])
        tried.add(identity)
    return None


def _words(
    band: Band, gathered: Float[Tensor, "g g"], regions: list[CropRegion], key: str
) -> tuple[Int[np.ndarray, "r a n"], Float[Tensor, "r a"]]:
    """Return the most likely words in each region and their scores.

    A score is a sum over the root of the sum of squares: with random signs it has zero mean and
    unit variance for any content.
    """
    layout = carrier_layout(key, band)
    votes = layout.votes(_spectrum(band, gathered, regions))[:, ~layout.pilot]
    count = convolution.coded_bits(ID_BITS + CHECK_BITS)
    soft = torch.zeros(len(regions), count, dtype=torch.float64).index_add(
        1, layout.bits[~layout.pilot], votes
    )
    words = convolution.decode(soft.numpy())
    coded = torch.from_numpy(convolution.encode(rearrange(words, "r a n -> (r a) n"))).double()
    agreed = (rearrange(coded, "(r a) m -> r a m", r=len(regions)) * soft[:, None]).sum(2)
    return words, agreed / votes.square().sum(1, keepdim=True).sqrt().clamp(min=1e-12)


def _spectrum(
    band: Band, gathered: Float[Tensor, "g g"], regions: list[CropRegion]
) -> Float[Tensor, "r f f"]:
    """Return the flat spectrum of the marked frame, as far as each region shows it."""
    tall = torch.stack(
        [dct_basis(band, band.grid, region.height, region.top) for region in regions]
    )
    wide = torch.stack(
        [dct_basis(band, band.grid, region.width, region.left) for region in regions]
    )
    return flatten_spectrum(band, tall @ gathered @ wide.mT)


def _likely_crops(search: BandSearch, gathered: Float[Tensor, "g g"], key: str) -> list[CropRegion]:
    """Return the regions with the highest pilot correlation, best first."""
    band = search.band
    layout = carrier_layout(key, band)
    size = band.pilot_high + 1
    pilot = layout.to_grid(layout.pilot.double())[:size, :size]
    flat = flatten_spectrum(band, dct(band, gathered))[:size, :size]
    sides, seen = _sides(band, search.min_crop)
    agreed = (flat.T @ seen @ pilot).flatten(1) @ seen.flatten(1).T
    best = agreed.flatten().topk(search.max_crops).indices
    regions = [
        CropRegion(sides[wide][0], sides[tall][0], sides[wide][1], sides[tall][1])
        for tall, wide in (divmod(int(index), len(sides)) for index in best)
    ]
    if not search.refine:
        return regions
    return [_refine(band, gathered, region, key) for region in regions]


def _refine(band: Band, gathered: Float[Tensor, "g g"], region: CropRegion, key: str) -> CropRegion:
    """Move the edges of a region by up to half a step to the highest pilot correlation."""
    layout = carrier_layout(key, band)
    for side, start in (("width", "left"), ("height", "top")):
        moved = [
            replace(region, **{side: getattr(region, side) + grow, start: begin})
            for shift in (-0.5, 0.0, 0.5)
            for grow in (-0.5 / _STEPS, 0.0, 0.5 / _STEPS)
            if (begin := getattr(region, start) + shift / _STEPS) >= 0
        ]
        votes = layout.votes(_spectrum(band, gathered, moved))[:, layout.pilot]
        region = moved[int(votes.sum(1).argmax())]
    return region


@cache
def _sides(band: Band, smallest: int) -> tuple[list[tuple[float, float]], Float[Tensor, "n f f"]]:
    """Return the crops of one side (share, start) and the DCT basis change of each."""
    sizes = range(smallest, _STEPS + 1)
    sides = [
        (size / _STEPS, start / _STEPS) for size in sizes for start in range(_STEPS - size + 1)
    ]
    size = band.pilot_high + 1
    whole = dct_basis(band, band.grid)[:size]
    return sides, torch.stack(
        [whole @ dct_basis(band, band.grid, *side)[:size].T for side in sides]
    )
