"""How much frames change where spans or windows meet, against how much they change everywhere else.

1 is a join that nobody could find by its change alone; a hard cut is far above. Frames come run by run, and only the
changes of a second or two are kept.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxtyping import UInt8
from torch import Tensor

_AROUND = 8  # ordinary changes on either side that a join is held against
_STILL = 1e-3  # a change of pixel values that counts as none


@dataclass
class SeamMetric:
    """Takes a video's frames in order; `joins` are the first frames of what is joined on."""

    joins: Sequence[int]
    _at: int = 0
    _last: "UInt8[Tensor, 'h w c'] | None" = None
    _first: "UInt8[Tensor, 'h w c'] | None" = None
    _changes: deque[tuple[int, float]] = field(
        default_factory=lambda: deque(maxlen=2 * _AROUND + 1)
    )
    _found: dict[int, float] = field(default_factory=dict)
    _waiting: list[int] = field(default_factory=list)

    def take(self, frames: UInt8[Tensor, "t h w c"]) -> None:
        """The next frames."""
        for frame in frames:
            if self._last is not None:
                self._changes.append((self._at, _change(self._last, frame)))
                if self._at in self.joins:
                    self._waiting.append(self._at)
            else:
                self._first = frame
            self._last = frame
            while self._waiting and self._at >= self._waiting[0] + _AROUND:
                self._settle()
            self._at += 1

    def ratios(self) -> dict[int, float]:
        """For each join, its change over the mean change around it; after the last frame."""
        while self._waiting:
            self._settle()
        return dict(self._found)

    def closure(self) -> float:
        """The same of the step from the last frame back to the first."""
        if self._first is None or self._last is None or not self._changes:
            return 1.0
        ordinary = sum(change for _, change in self._changes) / len(self._changes)
        return _ratio(_change(self._last, self._first), ordinary)

    def _settle(self) -> None:
        join = self._waiting.pop(0)
        here = [change for at, change in self._changes if at == join]
        around = [change for at, change in self._changes if at != join and at not in self.joins]
        if here:
            self._found[join] = _ratio(here[0], sum(around) / len(around) if around else 0.0)


def _change(before: "UInt8[Tensor, 'h w c']", after: "UInt8[Tensor, 'h w c']") -> float:
    """Mean absolute difference of pixel values."""
    return float((after.float() - before.float()).abs().mean())


def _ratio(here: float, ordinary: float) -> float:
    return (here + _STILL) / (ordinary + _STILL)
