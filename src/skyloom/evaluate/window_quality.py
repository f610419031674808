"""Critic of long videos: compares each window with the first one and checks its seam.

The default bounds are quantiles over the windows of ten videos of the bundled model and of real
renders of the same scenes, measured by `diorama evaluate windows` (docs/log.md).
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from skyloom.core.errors import RequestError
from skyloom.evaluate.motion import VideoStatistics, colour_change, seam_ratio, video_statistics
from skyloom.generate.sampling import WindowScore
from skyloom.models.base import ClipReader, load_clip_reader
from skyloom.models.registry import ModelInfo

_MIN_FRAMES = 3  # for statistics of motion
_DIGITS = 4
# smallest values that are compared: pixels per frame, flicker, contrast and sharpness
_MIN_SPEED = 0.05
_MIN_FLICKER = 0.005
_MIN_CONTRAST = 0.01


@dataclass(frozen=True)
class Bounds:
    """Largest differences of a window from the first one.

    colour: change of the mean colour in grey values of [0, 1].
    contrast, sharpness: factor up or down. flicker: factor up. motion: smallest ratio of speeds.
    seam: ratio of the change at the seam to elsewhere.
    identity: cosine distance of the subject's probe features.
    """

    colour: float = 0.04
    contrast: float = 1.27
    sharpness: float = 1.16
    flicker: float = 1.17
    motion: float = 0.39
    seam: float = 2.5
    identity: float = 0.17


_NAMES = tuple(one.name for one in fields(Bounds))
_EXCLUSIVE_MINIMUM = {"contrast": 1.0, "sharpness": 1.0}


@dataclass(frozen=True)
class WindowCritic:
    """Compares windows by frame statistics and probe features.

    Measures are rounded, so that the last bits of a sum have no effect.
    """

    probe: ClipReader
    limits: Bounds = field(default_factory=Bounds)

    @property
    def bounds(self) -> Mapping[str, float]:
        """The bound of every measure."""
        return asdict(self.limits)

    def __call__(
        self,
        frames: UInt8[Tensor, "t h w c"],
        first: UInt8[Tensor, "t1 h w c"] | None,
        before: UInt8[Tensor, "t0 h w c"],
    ) -> WindowScore:
        """Compare frames with the first window and with the frames right before them."""
        measures = measure_window(frames, first, before, self.probe)
        relative = [
            _relative_to_bound(name, value, self.bounds[name]) for name, value in measures.items()
        ]
        return WindowScore(round(max(relative, default=0.0), _DIGITS), measures)


def load_critic(
    model: ModelInfo | None = None, bounds: Mapping[str, object] | None = None
) -> WindowCritic:
    """Load the critic of a model, by default with the default model's clip reader and bounds.

    bounds: other ones, such as those of a receipt. Raises CheckpointError for a damaged clip
    reader, RequestError for invalid bounds.
    """
    values: dict[str, Any] = dict(bounds or {})
    wrong = [
        name
        for name, value in values.items()
        if name not in _NAMES or not _above(value, _EXCLUSIVE_MINIMUM.get(name, 0.0))
    ]
    if wrong:
        raise RequestError(
            f"Bounds of the critic must be numbers > 0 (contrast, sharpness: > 1) for "
            f"{', '.join(_NAMES)}; got {', '.join(f'{name} = {values[name]!r}' for name in wrong)}."
        )
    return WindowCritic(load_clip_reader(model), Bounds(**values))


def measure_window(
    frames: UInt8[Tensor, "t h w c"],
    first: UInt8[Tensor, "t1 h w c"] | None,
    before: UInt8[Tensor, "t0 h w c"],
    probe: ClipReader,
) -> dict[str, float]:
    """Return the measures of `Bounds` that the given frames allow."""
    measures: dict[str, float] = {}
    if first is not None and min(len(first), len(frames)) >= _MIN_FRAMES:
        base, base_features = _first_window(first, probe)
        here, features = _window(frames, probe)
        similarity = torch.cosine_similarity(base_features, features, dim=0)
        measures["colour"] = colour_change(base, here)
        measures["contrast"] = _ratio(here.contrast, base.contrast, _MIN_CONTRAST)
        measures["sharpness"] = _ratio(here.sharpness, base.sharpness, _MIN_CONTRAST)
        measures["flicker"] = _ratio(here.flicker, base.flicker, _MIN_FLICKER)
        measures["motion"] = _ratio(here.speed, base.speed, _MIN_SPEED)
        measures["identity"] = 1 - float(similarity)
    if len(before) and len(frames) + len(before) >= _MIN_FRAMES:
        both = torch.cat([before, frames])
        measures["seam"] = seam_ratio(both, [len(before)]) if len(frames) else 1.0
    return {name: round(value, _DIGITS) for name, value in measures.items()}


def _ratio(value: float, base: float, minimum: float) -> float:
    return max(value, minimum) / max(base, minimum)


def _window(frames: Tensor, probe: ClipReader) -> tuple[VideoStatistics, Tensor]:
    return video_statistics(frames), probe.features(frames).mean(0)


_first_window = lru_cache(maxsize=1)(_window)  # all windows are compared with the same frames


def _above(value: object, minimum: float) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and value > minimum
    )


def _relative_to_bound(name: str, value: float, bound: float) -> float:
    """Scale a measure so that 1 is at its bound."""
    if name in ("contrast", "sharpness"):
        return abs(math.log(value)) / math.log(bound)
    if name == "motion":
        return bound / value
    return value / bound
