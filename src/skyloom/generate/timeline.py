"""A timeline: the spans that a video is put together of, in order. Every verb of editing is one.

What is kept is copied bit for bit; what is made knows the frames before and after it and, with a strength below 1, what
it starts from. Positions are frames; nothing here touches pixels.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from skyloom.core.errors import RequestError


@dataclass(frozen=True)
class Clip:
    """Frames `start` to `stop`, without `stop`, of one of an edit's sources."""

    source: int
    start: int
    stop: int

    @property
    def frames(self) -> int:
        """How many."""
        return self.stop - self.start


@dataclass(frozen=True)
class Keep:
    """Frames that stay as they are."""

    clip: Clip

    @property
    def frames(self) -> int:
        """How many."""
        return self.clip.frames


@dataclass(frozen=True)
class Make:
    """Frames to be made of a prompt, between what comes `before` and `after`.

    `under` is what they start from, as far as `strength` leaves it (0: not at all; 1: nothing of it): one clip of the
    same length, or two, of which the second has a share in each frame. Where it is `masked`, only the edit's mask is
    made. `seen` frames before and after it are looked at, at most. Spans of one `name` get the same noise.
    """

    frames: int
    prompt: str
    name: str
    before: Clip | None = None
    after: Clip | None = None
    under: tuple[Clip, ...] = ()
    shares: tuple[float, ...] = ()
    strength: float = 1.0
    masked: bool = False

    def __post_init__(self) -> None:
        assert self.frames > 0
        assert all(clip.frames == self.frames for clip in self.under), (
            "what lies under a span is as long"
        )
        assert len(self.under) < 2 or len(self.shares) == self.frames  # noqa: PLR2004


@dataclass(frozen=True)
class Filter:
    """A clip gone over by a filter that invents nothing: to a `size` (height, width), or to `times` as many frames."""

    clip: Clip
    size: tuple[int, int] | None = None
    times: Fraction = Fraction(1)

    @property
    def frames(self) -> int:
        """How many come out."""
        return math.ceil(self.clip.frames * self.times)


Span = Keep | Make | Filter


@dataclass(frozen=True)
class Timeline:
    """Spans in order; a loop's end meets its beginning."""

    spans: tuple[Span, ...]
    loops: bool = False

    @property
    def frames(self) -> int:
        """Of the whole video."""
        return sum(span.frames for span in self.spans)

    @property
    def joins(self) -> tuple[int, ...]:
        """The first frames of all spans but the first."""
        edges, at = [], 0
        for span in self.spans[:-1]:
            at += span.frames
            edges.append(at)
        return tuple(edges)

    @property
    def made(self) -> tuple[Make, ...]:
        """What is made."""
        return tuple(span for span in self.spans if isinstance(span, Make))

    @property
    def runs(self) -> tuple[tuple[int, Clip], ...]:
        """Where the time of a source goes by, and its sound with it: the first frames, and the clips."""
        found: list[tuple[int, Clip]] = []
        for at, span in zip((0, *self.joins), self.spans, strict=True):
            clip = span.under[0] if isinstance(span, Make) and len(span.under) == 1 else None
            clip = clip if isinstance(span, Make) else span.clip
            if clip is None:
                continue
            begin, last = found[-1] if found else (0, None)
            if last is not None and begin + last.frames == at and _follows(last, clip):
                found[-1] = (begin, replace(last, stop=clip.stop))
            else:
                found.append((at, clip))
        return tuple(found)


def make_timeline(spans: Sequence[Span | None], *, loops: bool = False) -> Timeline:
    """A timeline of what is there: empty spans are left out, what may not move from its source is kept, and clips that
    follow one another in one source are one. Raises RequestError where nothing is there."""
    joined: list[Span] = []
    for span in _settled(spans):
        last = joined[-1] if joined else None
        if isinstance(span, Keep) and isinstance(last, Keep) and _follows(last.clip, span.clip):
            joined[-1] = Keep(replace(last.clip, stop=span.clip.stop))
        else:
            joined.append(span)
    if not joined:
        raise RequestError("Nothing is left of the video.", hint="Keep or make at least one frame.")
    return Timeline(tuple(joined), loops)


def _follows(before: Clip, after: Clip) -> bool:
    return before.source == after.source and before.stop == after.start


def _settled(spans: Sequence[Span | None]) -> Iterator[Span]:
    for span in spans:
        if span is None or span.frames == 0:
            continue
        if isinstance(span, Make) and span.strength == 0 and len(span.under) == 1:
            yield Keep(span.under[0])
        else:
            yield span
