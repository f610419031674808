"""Place a generated span on latent frames and divide it into windows.

A latent frame begins at the span's first video frame. The span's last latent frame may cover kept
frames after it, which are shown unchanged. A short span is one window that sees both sides. A
longer span without frames after it is a rollout with a cache; with frames after it, each window
sees the latent frames next to it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from skyloom.core.types import ScaleFactors
from skyloom.generate.rollout import Window, make_windows
from skyloom.generate.timeline import Generate
from skyloom.models.registry import Rollout

MAX_KNOWN = 3  # known latent frames per side of a window
_MIN_KNOWN = 2  # known latent frames per side, where that saves a second window
_MIN_NATIVE = 3  # one known latent frame, one to generate, one known


@dataclass(frozen=True)
class SpanLayout:
    """A span on latent frames: `known_before`, then `generated`, then `known_after`.

    `lead_frames` is the number of video frames before the span's first one. Window i generates the
    latent frames `generated_ranges[i]`. With `uses_cache`, later windows attend to cached ones;
    otherwise each window sees only the latent frames inside it.
    """

    known_before: int
    generated: int
    known_after: int
    lead_frames: int
    windows: tuple[Window, ...]
    generated_ranges: tuple[tuple[int, int], ...]
    uses_cache: bool

    @property
    def latent_frames(self) -> int:
        """Total number of latent frames."""
        return self.known_before + self.generated + self.known_after


def layout_span(
    span: Generate, scale: ScaleFactors, native: int, rollout: Rollout | None
) -> SpanLayout:
    """The layout of a span, for a model that samples `native` (>= 3) latent frames at once."""
    assert native >= _MIN_NATIVE
    max_known = min(MAX_KNOWN, (native - 1) // 2)
    before = 0 if span.before is None else span.before.frames
    after = 0 if span.after is None else span.after.frames
    continues = before > 0 and after == 0 and rollout is not None
    known_before = 0
    if before:
        known_before = min(native if continues else max_known, (before - 1) // scale.time + 1)
    if known_before:
        generated = -(-span.frames // scale.time)
        covered = generated * scale.time
    else:
        generated = latent_frames_for(span.frames, scale)
        covered = scale.video_frames(generated)
    beyond = after - (covered - span.frames)
    known_after = 0 if beyond <= 0 else min(max_known, max(1, beyond // scale.time))
    if known_before and known_after:
        known_before, known_after = _fit_known(known_before, generated, known_after, native)
    lead = scale.video_frames(known_before) if known_before else 0
    if not known_before and not known_after and (generated <= native or rollout is not None):
        windows = make_windows(generated, native, rollout)
        ranges = tuple((one.start, one.stop) for one in windows)
        return SpanLayout(
            known_before=0,
            generated=generated,
            known_after=0,
            lead_frames=0,
            windows=windows,
            generated_ranges=ranges,
            uses_cache=True,
        )
    fits_one_window = known_before + generated + known_after <= native
    if continues and not (fits_one_window and known_before <= max_known):
        assert rollout is not None
        return _rollout_layout(known_before, generated, lead, rollout)
    if known_after and not known_before:
        runs = list(_backward(generated, known_after, native))
    else:
        runs = list(_forward(known_before, generated, known_after, native))
    windows = tuple(
        Window(index, start, stop, decode_until=stop, cache_until=stop, shot=index)
        for index, ((start, stop), _) in enumerate(runs)
    )
    return SpanLayout(
        known_before,
        generated,
        known_after,
        lead_frames=lead,
        windows=windows,
        generated_ranges=tuple(target for _, target in runs),
        uses_cache=False,
    )


def latent_frames_for(frames: int, scale: ScaleFactors) -> int:
    """Number of latent frames that hold the first `frames` frames of a video."""
    return -(-(frames - 1) // scale.time) + 1


def _rollout_layout(known_before: int, generated: int, lead: int, rollout: Rollout) -> SpanLayout:
    """Windows that continue from cached latent frames."""
    end = known_before + generated
    count = -(-generated // rollout.window)
    edges = [known_before + rollout.window * index for index in range(count + 1)]
    windows = tuple(
        Window(index, start, stop, decode_until=min(stop, end), cache_until=stop)
        for index, (start, stop) in enumerate(pairwise(edges))
    )
    return SpanLayout(
        known_before,
        generated,
        known_after=0,
        lead_frames=lead,
        windows=windows,
        generated_ranges=tuple((one.start, one.stop) for one in windows),
        uses_cache=True,
    )


def _fit_known(known_before: int, generated: int, known_after: int, native: int) -> tuple[int, int]:
    """Fewer known latent frames, where that makes one window of two."""
    total = known_before + generated + known_after
    for before, after in (
        (known_before, min(known_after, _MIN_KNOWN)),
        (min(known_before, _MIN_KNOWN), min(known_after, _MIN_KNOWN)),
    ):
        if total > native >= before + generated + after:
            return before, after
    return known_before, known_after


Run = tuple[tuple[int, int], tuple[int, int]]  # range that a window sees, range that it generates


def _forward(known_before: int, generated: int, known_after: int, native: int) -> Iterator[Run]:
    """Windows in order of time; the last one sees the known latent frames after the span."""
    position = known_before
    end = known_before + generated
    max_known = min(MAX_KNOWN, (native - 1) // 2)
    while position < end:
        seen = min(max_known, position)
        room = native - seen
        rest = end - position
        if rest + known_after <= room:
            yield (position - seen, end + known_after), (position, end)
            return
        step = room if rest > room else max(1, rest - (native - max_known - known_after))
        yield (position - seen, position + step), (position, position + step)
        position += step


def _backward(generated: int, known_after: int, native: int) -> Iterator[Run]:
    """Windows from the end of the span to its start."""
    end = generated
    max_known = min(MAX_KNOWN, (native - 1) // 2)
    while end > 0:
        seen = min(max_known, generated + known_after - end)
        start = max(0, end - (native - seen))
        yield (start, end + seen), (start, end)
        end = start
