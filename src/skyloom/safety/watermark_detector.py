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
    GRID,
    ID_BITS,
    KEY,
    band_pass,
    carrier_layout,
    codeword,
    dct,
    dct_basis,
    flatten_spectrum,
    luma,
    whiten,
)

THRESHOLD = 9.8  # minimum score of an id in the whole frame and all frames
THRESHOLD_CROPPED = 10.4  # minimum score in a crop or a part of the frames
MAX_CROPS = 256  # crops decoded, best pilot correlation first
_MAX_CANDIDATES = 8  # ids whose checksum is tested
_MIN_CROP = 102  # of 128
_MIN_SIDE = 32
_FIRST_WEIGHT = 7  # of the first frame, which codecs keep best
_WINDOW = 32  # frames decoded separately to find several ids


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


def highest_score(frames: UInt8[Tensor, "t h w c"], key: str = KEY) -> float:
    """Return the best score of any word in whole frames, regardless of its checksum."""
    return float(_words(_gather(frames, _FIRST_WEIGHT), [CropRegion()], key)[1].max())


def detect(
    frames: UInt8[Tensor, "t h w c"], key: str = KEY, crops: bool = True
) -> DetectedWatermark | None:
    """Detect the watermark of a video; `crops=False` tests uncropped frames only (10 times faster).

    The false positive rate is below one in a million (docs/provenance.md).
    """
    if min(frames.shape[1:3]) < _MIN_SIDE:
        return None
    return _search(_gather(frames, _FIRST_WEIGHT), key, crops)


def find_watermarks(
    runs: Iterable[UInt8[Tensor, "t h w c"]], key: str = KEY
) -> list[DetectedWatermark]:
    """Detect the watermarks of a video in batches, in order; several if it was spliced.

    Memory grows by 128 KiB per 32 frames.
    """
    windows, counts = _gather_windows(runs)
    if not windows:
        return []
    whole = torch.stack(windows).sum(0)
    mark = _search(whole, key)
    if len(windows) == 1:
        return [mark] if mark else []
    region = mark.region if mark else _likely_crops(whole, key)[0]
    found = [_read(window, [region], key, THRESHOLD_CROPPED) for window in windows]
    return _merge(found, counts) or ([mark] if mark else [])


def _gather(frames: UInt8[Tensor, "t h w c"], first_weight: int) -> Float[Tensor, "g g"]:
    """Sum the whitened mid frequencies of all frames."""
    parts = [whiten(band_pass(luma(part))).sum(0) for part in frames.split(8)]
    first = whiten(band_pass(luma(frames[0])))
    return torch.stack(parts).sum(0) + (first_weight - 1) * first


def _gather_windows(
    runs: Iterable[UInt8[Tensor, "t h w c"]],
) -> tuple[list[Float[Tensor, "g g"]], list[int]]:
    """Return the sum of every window of 32 frames, and its frame count."""
    windows: list[Tensor] = []
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
    gathered: Float[Tensor, "g g"], key: str, crops: bool = True
) -> DetectedWatermark | None:
    """Detect an id in the whole frame, else in one of the most likely crops."""
    mark = _read(gathered, [CropRegion()], key, THRESHOLD)
    if mark or not crops:
        return mark
    return _read(gathered, _likely_crops(gathered, key), key, THRESHOLD_CROPPED)


def _read(
    gathered: Float[Tensor, "g g"], regions: list[CropRegion], key: str, threshold: float
) -> DetectedWatermark | None:
    """Return the id with the highest score in any region if threshold and checksum match."""
    words, scores = _words(gathered, regions, key)
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
    gathered: Float[Tensor, "g g"], regions: list[CropRegion], key: str
) -> tuple[Int[np.ndarray, "r a n"], Float[Tensor, "r a"]]:
    """Return the most likely words in each region and their scores.

    A score is a sum over the root of the sum of squares: with random signs it has zero mean and
    unit variance for any content.
    """
    layout = carrier_layout(key)
    tall = torch.stack([dct_basis(GRID, region.height, region.top) for region in regions])
    wide = torch.stack([dct_basis(GRID, region.width, region.left) for region in regions])
    votes = layout.votes(flatten_spectrum(tall @ gathered @ wide.mT))[:, ~layout.pilot]
    count = convolution.coded_bits(ID_BITS + CHECK_BITS)
    soft = torch.zeros(len(regions), count, dtype=torch.float64).index_add(
        1, layout.bits[~layout.pilot], votes
    )
    words = convolution.decode(soft.numpy())
    coded = torch.from_numpy(convolution.encode(rearrange(words, "r a n -> (r a) n"))).double()
    agreed = (rearrange(coded, "(r a) m -> r a m", r=len(regions)) * soft[:, None]).sum(2)
    return words, agreed / votes.square().sum(1, keepdim=True).sqrt().clamp(min=1e-12)


def _likely_crops(gathered: Float[Tensor, "g g"], key: str) -> list[CropRegion]:
    """Return the regions with the highest pilot correlation, best first."""
    layout = carrier_layout(key)
    pilot = layout.to_grid(layout.pilot.double())
    sides, seen = _sides()
    agreed = (flatten_spectrum(dct(gathered)).T @ seen @ pilot).flatten(1) @ seen.flatten(1).T
    chosen = [divmod(int(index), len(sides)) for index in agreed.flatten().topk(MAX_CROPS).indices]
    return [
        CropRegion(sides[wide][0], sides[tall][0], sides[wide][1], sides[tall][1])
        for tall, wide in chosen
    ]


@cache
def _sides() -> tuple[list[tuple[float, float]], Float[Tensor, "n f f"]]:
    """Return the crops of one side (share, start) and the DCT basis change of each."""
    sizes = range(_MIN_CROP, GRID + 1)
    sides = [(size / GRID, start / GRID) for size in sizes for start in range(GRID - size + 1)]
    whole = dct_basis(GRID)
    return sides, torch.stack([whole @ dct_basis(GRID, *side).T for side in sides])
