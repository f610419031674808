"""A timeline: the ordered spans of a video. Positions are frame indices.

The kind of a span says where its frames come from, in code, plans and receipts: "kept" frames are
copied from a source bit for bit, "filtered" ones computed from it without a model. "generated" ones
are conditioned on the frames before and after them and, at a strength below 1, start from source
frames. A new kind of filter is one subclass of SourceSpan. Importing this does not import torch.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar, Literal

from skyloom.core.errors import RequestError

if TYPE_CHECKING:
    from jaxtyping import UInt8
    from torch import Tensor

    from skyloom.media.source import VideoSource

DEFAULT_FADE = Fraction(1, 2)  # seconds over which the prompt of a shot changes
SpanKind = Literal["kept", "filtered", "generated"]


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
class SourceSpan:
    """Frames that are read from a clip of a source, without a model."""

    clip: SourceClip
    kind: ClassVar[SpanKind] = "filtered"

    @property
    def frames(self) -> int:
        """Number of frames that the span shows."""
        return self.clip.frames

    @property
    def sound_clip(self) -> SourceClip | None:
        """The clip whose sound accompanies the span; None if it is silent."""
        return self.clip

    def range_of(self, start: int, stop: int) -> tuple[int, int]:
        """The frames of the span that show frames [start, stop) of the clip."""
        return start, stop

    def stream(self, source: "VideoSource") -> "Iterator[UInt8[Tensor, 'n h w c']]":
        """Yield the frames in batches. Raises MediaError."""
        return source.stream(self.clip.start, self.clip.stop)


@dataclass(frozen=True)
class Keep(SourceSpan):
    """Frames that are copied unchanged."""

    kind: ClassVar[SpanKind] = "kept"


@dataclass(frozen=True)
class Resize(SourceSpan):
    """A clip resized to `size` (height, width) by Lanczos resampling."""

    size: tuple[int, int]

    def stream(self, source: "VideoSource") -> "Iterator[UInt8[Tensor, 'n h w c']]":
        """Yield the frames in batches. Raises MediaError."""
        from skyloom.media.filters import upscale

        return upscale(super().stream(source), self.size)


@dataclass(frozen=True)
class Interpolate(SourceSpan):
    """A clip at `rate_factor` times its frame rate, by motion interpolation."""

    rate_factor: Fraction

    @property
    def frames(self) -> int:
        """Number of frames after interpolation."""
        return math.ceil(self.clip.frames * self.rate_factor)

    def range_of(self, start: int, stop: int) -> tuple[int, int]:
        """The frames of the span that show frames [start, stop) of the clip."""
        return math.ceil(start * self.rate_factor), math.ceil(stop * self.rate_factor)

    def stream(self, source: "VideoSource") -> "Iterator[UInt8[Tensor, 'n h w c']]":
        """Yield the frames in batches. Raises MediaError."""
        from skyloom.media.filters import interpolate

        return interpolate(super().stream(source), source.fps, source.fps * self.rate_factor)


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
    Such a span may show `media` at its start and have a `seed` of its own. A span that `continues`
    the shot of the span before it, whose prompt is then crossfaded over `fade_frames`, is sampled
    with it; if it has a name, it has that span's name, `before`, `after` and strength.
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
    kind: ClassVar[SpanKind] = "generated"

    def __post_init__(self) -> None:
        assert self.frames > 0
        assert all(clip.frames == self.frames for clip in self.init_clips), (
            "an initial clip has as many frames as the span"
        )
        assert len(self.init_clips) < 2 or len(self.mix_shares) == self.frames  # noqa: PLR2004

    @property
    def sound_clip(self) -> SourceClip | None:
        """The clip whose sound accompanies the span: the one that it starts from."""
        return self.init_clips[0] if len(self.init_clips) == 1 else None


Span = SourceSpan | Generate


@dataclass(frozen=True)
class Timeline:
    """Spans in order, at `fps` frames per second. With `loops`, the end leads back to the start.

    The builder of an edit's timeline sets `fps` and `size` (height, width) only if they are not
    those of its sources. `notices` are sentences for the user about the generated spans: their
    prompts and lengths.
    """

    spans: tuple[Span, ...]
    loops: bool = False
    fps: Fraction = Fraction(0)
    size: tuple[int, int] | None = None
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
            clip = span.sound_clip
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
