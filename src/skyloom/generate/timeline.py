"""A timeline: the ordered spans of an edited video. Positions are frame indices.

Kept frames are copied bit for bit. Generated frames are conditioned on the frames before and after
them and, at a strength below 1, start from source frames.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from skyloom.core.errors import RequestError


@dataclass(frozen=True)
class SourceClip:
    """Frames [start, stop) of the edit's source number `source`."""

    source: int
    start: int
    stop: int

    @property
    def frames(self) -> int:
        """Number of frames."""
        return self.stop - self.start


@dataclass(frozen=True)
class Keep:
    """Frames that are copied unchanged."""

    clip: SourceClip

    @property
    def frames(self) -> int:
        """Number of frames."""
        return self.clip.frames


@dataclass(frozen=True)
class Media:
    """A picture, or a video if `moving`, at the start of a span; `strength` is 0 (fixed) to 1."""

    path: str
    moving: bool = False
    strength: float = 0.0


@dataclass(frozen=True)
class Generate:
    """Frames to generate from a prompt, conditioned on the clips `before` and `after`.

    `init_clips` is what they start from: one clip of the same length, or two, mixed with the
    second one's share per frame in `mix_shares`. `strength` is 0 (the initial frames) to 1 (pure
    noise). A `masked` span changes only pixels inside the edit's mask. Spans of the same `name`
    get the same noise.

    Consecutive spans without a name are sampled as one sequence: those of a prompt or storyboard.
    Such a span may show `media` at its start, continue the shot of the span before it, whose prompt
    is then crossfaded over `fade_frames`, and have a `seed` of its own.
    """

    frames: int
    prompt: str
    name: str = ""
    before: SourceClip | None = None
    after: SourceClip | None = None
    init_clips: tuple[SourceClip, ...] = ()
    mix_shares: tuple[float, ...] = ()
    strength: float = 1.0
    masked: bool = False
    continues: bool = False
    fade_frames: int = 0
    seed: int | None = None
    media: Media | None = None

    def __post_init__(self) -> None:
        assert self.frames > 0
        assert all(clip.frames == self.frames for clip in self.init_clips), (
            "an initial clip has as many frames as the span"
        )
        assert len(self.init_clips) < 2 or len(self.mix_shares) == self.frames  # noqa: PLR2004


@dataclass(frozen=True)
class Filter:
    """A clip resized to `size` (height, width), or interpolated to `rate_factor` times the rate."""

    clip: SourceClip
    size: tuple[int, int] | None = None
    rate_factor: Fraction = Fraction(1)

    @property
    def frames(self) -> int:
        """Number of frames after the filter."""
        return math.ceil(self.clip.frames * self.rate_factor)


Span = Keep | Generate | Filter


@dataclass(frozen=True)
class Timeline:
    """Spans in order, at `fps` frames per second. With `loops`, the end leads back to the start.

    `notices` are sentences for the user about its generated spans: their prompts and lengths.
    """

    spans: tuple[Span, ...]
    loops: bool = False
    fps: Fraction = Fraction(0)
    notices: tuple[str, ...] = ()

    def seconds(self, frame: int) -> Fraction:
        """Time at which a frame begins."""
        return frame / self.fps

    @property
    def frames(self) -> int:
        """Total number of frames."""
        return sum(span.frames for span in self.spans)

    @property
    def seams(self) -> tuple[int, ...]:
        """First frame of every span but the first."""
        edges: list[int] = []
        position = 0
        for span in self.spans[:-1]:
            position += span.frames
            edges.append(position)
        return tuple(edges)

    @property
    def generated_spans(self) -> tuple[Generate, ...]:
        """The spans to generate."""
        return tuple(span for span in self.spans if isinstance(span, Generate))

    @property
    def sound_clips(self) -> tuple[tuple[int, SourceClip], ...]:
        """Source clips whose sound is copied, each with its first frame in the edited video."""
        found: list[tuple[int, SourceClip]] = []
        for position, span in zip((0, *self.seams), self.spans, strict=True):
            clip = _sound_clip(span)
            if clip is None:
                continue
            begin, last = found[-1] if found else (0, None)
            if last is not None and begin + last.frames == position and _continues(last, clip):
                found[-1] = (begin, replace(last, stop=clip.stop))
            else:
                found.append((position, clip))
        return tuple(found)


def make_timeline(spans: Sequence[Span | None], *, loops: bool = False) -> Timeline:
    """Build a timeline.

    Drops empty spans, turns spans of strength 0 into kept clips, and merges kept clips that follow
    one another in a source. Raises RequestError if no frame is left.
    """
    joined: list[Span] = []
    for span in _simplified(spans):
        last = joined[-1] if joined else None
        if isinstance(span, Keep) and isinstance(last, Keep) and _continues(last.clip, span.clip):
            joined[-1] = Keep(replace(last.clip, stop=span.clip.stop))
        else:
            joined.append(span)
    if not joined:
        raise RequestError(
            "The edited video must have at least one frame, got 0.",
            hint="Keep or generate at least one frame.",
        )
    return Timeline(tuple(joined), loops)


def nearest_frame(seconds: Fraction, fps: Fraction) -> int:
    """Index of the frame nearest to a time; halves are rounded up."""
    return int(seconds * fps + Fraction(1, 2))


def _sound_clip(span: Span) -> SourceClip | None:
    """The clip whose sound accompanies a span."""
    if isinstance(span, Generate):
        return span.init_clips[0] if len(span.init_clips) == 1 else None
    return span.clip


def _continues(before: SourceClip, after: SourceClip) -> bool:
    return before.source == after.source and before.stop == after.start


def _simplified(spans: Sequence[Span | None]) -> Iterator[Span]:
    for span in spans:
        if span is None or span.frames == 0:
            continue
        if isinstance(span, Generate) and span.strength == 0 and len(span.init_clips) == 1:
            yield Keep(span.init_clips[0])
        else:
            yield span
