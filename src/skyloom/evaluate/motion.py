"""Statistics of videos: colour, contrast, sharpness, speed, flicker, drift, seams.

Speed is the normal flow: how fast edges move across themselves, in pixels per frame (Horn and
Schunck 1981, brightness constancy). Flicker is the second difference in time of the means of large
tiles, which moving subjects hardly change. Drift compares the last quarter with the first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

TILE = 16
_EDGE = 0.05  # a slope of grey values per pixel that counts as an edge
_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class MotionStatistics:
    """Motion and drift of one video; grey values in [0, 1].

    speed: pixels per frame. flicker: mean second difference. colour_drift: grey values, mean over
    channels. contrast_drift, sharpness_drift: absolute relative change.
    """

    speed: float
    flicker: float
    colour_drift: float
    contrast_drift: float
    sharpness_drift: float


MOTION_METRICS = ("speed", "flicker", "colour_drift", "contrast_drift", "sharpness_drift")


@dataclass(frozen=True)
class VideoStatistics:
    """Appearance and motion of a run of frames; grey values in [0, 1].

    colour: mean. contrast: standard deviation. sharpness: mean slope. speed: pixels per frame.
    flicker: mean second difference.
    """

    colour: tuple[float, float, float]
    contrast: float
    sharpness: float
    speed: float
    flicker: float


def video_statistics(frames: UInt8[Tensor, "t h w c"]) -> VideoStatistics:
    """Measure a run of at least three frames."""
    colour = frames.float() / 255
    grey = colour @ torch.tensor(_LUMA)
    red, green, blue = colour.mean((0, 1, 2)).tolist()
    return VideoStatistics(
        (red, green, blue), _contrast(grey), _sharpness(grey), _speed(grey), _flicker(grey)
    )


def colour_change(first: VideoStatistics, last: VideoStatistics) -> float:
    """Absolute change of the mean colour in grey values, averaged over channels."""
    changes = [abs(a - b) for a, b in zip(first.colour, last.colour, strict=True)]
    return sum(changes) / len(changes)


def seam_ratio(frames: UInt8[Tensor, "t h w c"], seams: Sequence[int]) -> float:
    """Ratio of the change between frames at `seams` (first frames of windows) to elsewhere."""
    change = (frames[1:].float() - frames[:-1].float()).abs().mean(dim=(1, 2, 3))
    at = torch.zeros(len(change), dtype=torch.bool)
    at[[seam - 1 for seam in seams if 0 < seam < len(frames)]] = True
    return float(change[at].mean() / change[~at].mean().clamp(min=1e-6)) if bool(at.any()) else 1.0


def motion_statistics(frames: UInt8[Tensor, "t h w c"]) -> MotionStatistics:
    """Measure a video of at least three frames."""
    colour = frames.float() / 255
    grey = colour @ torch.tensor(_LUMA)
    quarter = max(1, len(frames) // 4)
    first = colour[:quarter]
    last = colour[-quarter:]
    return MotionStatistics(
        speed=_speed(grey),
        flicker=_flicker(grey),
        colour_drift=float((last.mean((0, 1, 2)) - first.mean((0, 1, 2))).abs().mean()),
        contrast_drift=_change(_contrast(grey[:quarter]), _contrast(grey[-quarter:])),
        sharpness_drift=_change(_sharpness(grey[:quarter]), _sharpness(grey[-quarter:])),
    )


def _speed(grey: Float[Tensor, "t h w"]) -> float:
    """Mean over edges of |change in time| / |slope|."""
    middle = (grey[1:] + grey[:-1]) / 2
    across = (middle[:, 1:-1, 2:] - middle[:, 1:-1, :-2]) / 2
    down = (middle[:, 2:, 1:-1] - middle[:, :-2, 1:-1]) / 2
    slope = (across.square() + down.square()).sqrt()
    change = (grey[1:] - grey[:-1])[:, 1:-1, 1:-1].abs()
    edges = slope > _EDGE
    return (
        float((change[edges] / slope[edges]).clamp(max=TILE).mean()) if bool(edges.any()) else 0.0
    )


def _flicker(grey: Float[Tensor, "t h w"]) -> float:
    """Mean absolute second difference in time of the tiles' means."""
    tiles = F.avg_pool2d(grey[:, None], min(TILE, *grey.shape[1:]))[:, 0]
    return float((tiles[2:] - 2 * tiles[1:-1] + tiles[:-2]).abs().mean())


def _contrast(grey: Float[Tensor, "t h w"]) -> float:
    return float(grey.std(dim=(1, 2)).mean())


def _sharpness(grey: Float[Tensor, "t h w"]) -> float:
    return float(grey.diff(dim=1).abs().mean() + grey.diff(dim=2).abs().mean())


def _change(before: float, after: float) -> float:
    return abs(after / max(before, 1e-6) - 1)
