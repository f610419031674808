"""Seam metric: frame change at seams relative to the frame change around them.

A ratio of 1 means that a seam is not visible by its change; a hard cut is far above. Frames come in
batches; only the changes of the last second or two are kept.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxtyping import UInt8
from torch import Tensor

_CONTEXT = 8  # changes on either side that a seam is compared with
_EPSILON = 1e-3  # in pixel values, so that still video has ratio 1


@dataclass
class SeamMetric:
    """Measures the seams of a video from its frames in order.

    `seams` are the indices of the first frame after each seam.
    """

    seams: Sequence[int]
    _count: int = 0
    _last: "UInt8[Tensor, 'h w c'] | None" = None
    _first: "UInt8[Tensor, 'h w c'] | None" = None
    _changes: deque[tuple[int, float]] = field(
        default_factory=lambda: deque(maxlen=2 * _CONTEXT + 1)
    )
    _ratios: dict[int, float] = field(default_factory=dict)
    _pending: list[int] = field(default_factory=list)

    def take(self, frames: UInt8[Tensor, "t h w c"]) -> None:
        """Add the next frames."""
        for frame in frames:
            if self._last is not None:
                self._changes.append((self._count, _change(self._last, frame)))
                if self._count in self.seams:
                    self._pending.append(self._count)
            else:
                self._first = frame
            self._last = frame
            while self._pending and self._count >= self._pending[0] + _CONTEXT:
                self._measure_next()
            self._count += 1

    def ratios(self) -> dict[int, float]:
        """Return for each seam its change over the mean change around it; after the last frame."""
        while self._pending:
            self._measure_next()
        return dict(self._ratios)

    def closure(self) -> float:
        """Return the ratio of the step from the last frame to the first (of a loop)."""
        if self._first is None or self._last is None or not self._changes:
            return 1.0
        mean = sum(change for _, change in self._changes) / len(self._changes)
        return _ratio(_change(self._last, self._first), mean)

    def _measure_next(self) -> None:
        seam = self._pending.pop(0)
        at_seam = [change for at, change in self._changes if at == seam]
        around = [change for at, change in self._changes if at != seam and at not in self.seams]
        if at_seam:
            mean = sum(around) / len(around) if around else 0.0
            self._ratios[seam] = _ratio(at_seam[0], mean)


def _change(before: "UInt8[Tensor, 'h w c']", after: "UInt8[Tensor, 'h w c']") -> float:
    """Return the mean absolute difference of pixel values."""
    return float((after.float() - before.float()).abs().mean())


def _ratio(change: float, mean: float) -> float:
    return (change + _EPSILON) / (mean + _EPSILON)
