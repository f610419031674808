"""The window planner: lay generated spans on latent frames and divide them into windows.

A run is what is sampled as one sequence of windows: a span of an edit with those that continue it,
or all spans of a prompt or storyboard, whose spans have no name. Positions are counted from the
start of a shot.

A model with a rollout continues a shot from a cache. Without one, each later window sees the last
latent frames before it as known frames (diffusion forcing: Chen et al. 2024, arXiv 2407.01392).

A span between kept frames: a latent frame begins at the span's first video frame, and its last
latent frame may cover kept frames after it, which are shown unchanged. A short span is one window
that sees both sides. A longer span without frames after it continues from a cache; with frames
after it, each window sees the latent frames next to it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from skyloom.core.errors import RequestError
from skyloom.core.types import ScaleFactors
from skyloom.generate.timeline import Generate, Timeline
from skyloom.models.registry import Rollout

DECODE_FRAMES = 3  # latent frames per call of the decoder
MAX_KNOWN = 3  # known latent frames per side of a window
_MIN_KNOWN = 2  # known latent frames per side, where that saves a second window
_MIN_NATIVE = 3  # one known latent frame, one to generate, one known


@dataclass(frozen=True)
class Window:
    """Latent frames [start, stop) of a shot, sampled together.

    Latent frames before `decode_until` are decoded; those before `cache_until` are final, the
    others are sampled again by the next window. `display_range` is the (first, end) video frames of
    the shot to output. `generated` is the range of latent frames that the window generates; the
    others in it are known. `span` is the index of the span in its run; `prompt_fade` is the weight
    of the previous span's prompt per latent frame.
    """

    index: int
    start: int
    stop: int
    decode_until: int
    cache_until: int
    display_range: tuple[int, int]
    generated: tuple[int, int]
    shot: int = 0
    span: int = 0
    prompt_fade: tuple[float, ...] = ()

    @property
    def decode_chunks(self) -> tuple[tuple[int, int], ...]:
        """Ranges of latent frames per decoder call; none mixes cached and uncached frames."""
        first = self.generated[0]
        cached = max(first, min(self.cache_until, self.decode_until))
        runs = ((first, cached), (cached, self.decode_until))
        return tuple(
            (begin, min(begin + DECODE_FRAMES, end))
            for start, end in runs
            for begin in range(start, end, DECODE_FRAMES)
        )


@dataclass(frozen=True)
class RunPlan:
    """Consecutive generated spans that are sampled as one sequence of windows.

    On latent frames: `known_before`, then `generated`, then `known_after`. `lead_frames` is the
    number of video frames before the first generated one. With `uses_cache`, later windows attend
    to cached ones; otherwise each window sees only the latent frames inside it.
    """

    spans: tuple[Generate, ...]
    windows: tuple[Window, ...]
    known_before: int = 0
    generated: int = 0
    known_after: int = 0
    lead_frames: int = 0
    uses_cache: bool = True

    @property
    def latent_frames(self) -> int:
        """Total number of latent frames of a run between kept frames."""
        return self.known_before + self.generated + self.known_after

    @property
    def frames(self) -> int:
        """Number of generated video frames."""
        return sum(span.frames for span in self.spans)

    def opens_shot(self, window: Window) -> bool:
        """Whether a window is at the start of a shot, with no kept frames around the run."""
        return not (window.start or self.known_before or self.known_after)

    @property
    def whole(self) -> Generate:
        """The spans of a run between kept frames as one span."""
        return _joined(self.spans)


def plan_runs(
    timeline: Timeline, scale: ScaleFactors, native: int, rollout: Rollout | None
) -> tuple[RunPlan, ...]:
    """Plan the windows of all generated spans, for a model that samples `native` latent frames.

    Raises RequestError if `native` is less than 3 and a window has to see other frames.
    """
    runs: list[RunPlan] = []
    sequence: list[Generate] = []
    for span in (*timeline.spans, None):
        generated = isinstance(span, Generate)
        if sequence and not (generated and _is_sampled_with(span, sequence[-1])):
            runs.append(_plan_run(tuple(sequence), scale, native, rollout))
            sequence.clear()
        if generated:
            sequence.append(span)
    return tuple(runs)


def _is_sampled_with(span: Generate, before: Generate) -> bool:
    return span.name == before.name and (span.continues or not span.name)


def _plan_run(
    spans: tuple[Generate, ...], scale: ScaleFactors, native: int, rollout: Rollout | None
) -> RunPlan:
    if not spans[0].name:
        windows = shot_windows(spans, scale, native, rollout)
        return RunPlan(spans, windows, uses_cache=rollout is not None)
    if len(spans) == 1:
        return plan_span(spans[0], scale, native, rollout)
    return plan_prompts(spans, scale, native)


def _joined(spans: Sequence[Generate]) -> Generate:
    """Spans of one name, of which all but the first continue, as one span."""
    first = spans[0]
    frames = sum(span.frames for span in spans)
    clips = (replace(clip, stop=clip.start + frames) for clip in first.init_clips)
    shares = tuple(share for span in spans for share in span.mix_shares)
    return replace(first, frames=frames, init_clips=tuple(clips), mix_shares=shares)


def shot_windows(
    spans: Sequence[Generate], scale: ScaleFactors, native: int, rollout: Rollout | None
) -> tuple[Window, ...]:
    """Divide the shots of a prompt or storyboard into windows; a window belongs to one span.

    If a span begins inside a latent frame, that latent frame is sampled once per span, and each
    span shows its own video frames of it. Raises RequestError if a shot needs several windows,
    the model has no rollout and `native` is less than 3.
    """
    windows: list[Window] = []
    shot = 0
    offset = 0
    for index, span in enumerate(spans):
        following = spans[index + 1] if index + 1 < len(spans) else None
        continues = following is not None and following.continues
        if index and not span.continues:
            shot += 1
            offset = 0
        until = offset + span.frames
        end = _latent_frame_of(until - 1, scale) + 1
        cache_end = _latent_frame_of(until, scale) if continues else end
        # media of the following span is sampled together with the frames before it
        sees_media = continues and following is not None and following.media is not None
        ahead = cache_end + 1 if sees_media else end
        last = max(end, ahead)
        start = _latent_frame_of(offset, scale)
        while start < last:
            seen = 0 if rollout is not None else min(_max_known(native), start)
            if start == 0 or rollout is None:
                full = start + native - seen
            else:
                full = start + rollout.window
            is_whole = start > 0 and not continues and rollout is not None
            stop = full if is_whole else min(full, last)
            if stop + 1 == last and ahead > end and stop - start > 1:
                stop -= 1
            fade = _prompt_fade(span.fade_frames, offset, (start, stop), scale)
            windows.append(
                Window(
                    len(windows),
                    start - seen,
                    stop,
                    decode_until=min(stop, end),
                    cache_until=min(stop, cache_end),
                    display_range=(offset, until),
                    generated=(start, stop),
                    shot=shot,
                    span=index,
                    prompt_fade=(0.0,) * seen + fade if fade else (),
                )
            )
            start = stop
        offset = until
    if rollout is None and any(one.shot == two.shot for one, two in pairwise(windows)):
        _check_native(native, scale, "videos of several windows")
    return tuple(windows)


def plan_span(span: Generate, scale: ScaleFactors, native: int, rollout: Rollout | None) -> RunPlan:
    """Plan a span between kept frames, for a model that samples `native` latent frames.

    Raises RequestError if `native` is less than 3.
    """
    _check_native(native, scale, "edits")
    max_known = _max_known(native)
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
    fits_one_window = known_before + generated + known_after <= native
    if not known_before and not known_after and (generated <= native or rollout is not None):
        uses_cache = True
        ranges = list(_cached(0, generated, native, rollout))
    elif continues and not (fits_one_window and known_before <= max_known):
        assert rollout is not None
        uses_cache = True
        ranges = list(_cached(known_before, generated, rollout.window, rollout))
    else:
        uses_cache = False
        sliding = _backward if known_after and not known_before else _forward
        ranges = list(sliding(known_before, generated, known_after, native))
    end = known_before + generated
    windows = tuple(
        Window(
            index,
            start,
            stop,
            decode_until=min(target[1], end),
            cache_until=stop,
            display_range=(lead, lead + span.frames),
            generated=target,
        )
        for index, ((start, stop), target) in enumerate(ranges)
    )
    return RunPlan(
        (span,),
        windows,
        known_before=known_before,
        generated=generated,
        known_after=known_after,
        lead_frames=lead,
        uses_cache=uses_cache,
    )


def plan_prompts(spans: tuple[Generate, ...], scale: ScaleFactors, native: int) -> RunPlan:
    """Plan spans between kept frames that are one shot with several prompts.

    Windows follow one another in time; each has one prompt and sees the latent frames next to it.
    A prompt holds from the first latent frame that begins in its span.
    """
    run = plan_span(_joined(spans), scale, native, rollout=None)
    end = run.known_before + run.generated
    windows: list[Window] = []
    position = run.known_before
    offset = 0
    for index, span in enumerate(spans):
        until = offset + span.frames
        last = index + 1 == len(spans)
        stop = end if last else min(end, run.known_before + -(-until // scale.time))
        known_after = run.known_after if stop == end else 0
        for seen, target in _forward(position, stop - position, known_after, native):
            window = Window(
                len(windows),
                *seen,
                decode_until=target[1],
                cache_until=seen[1],
                display_range=(run.lead_frames, run.lead_frames + run.frames),
                generated=target,
                span=index,
                prompt_fade=_prompt_fade(span.fade_frames, run.lead_frames + offset, seen, scale),
            )
            windows.append(window)
        position = stop
        offset = until
    return replace(run, spans=spans, windows=tuple(windows), uses_cache=False)


def latent_frames_for(frames: int, scale: ScaleFactors) -> int:
    """Number of latent frames that hold the first `frames` frames of a video."""
    return -(-(frames - 1) // scale.time) + 1


def first_frame(cell: int, scale: ScaleFactors) -> int:
    """The first video frame of a latent frame."""
    return 0 if cell == 0 else scale.video_frames(cell)


def _max_known(native: int) -> int:
    """Largest number of known latent frames per side of a window."""
    return min(MAX_KNOWN, (native - 1) // 2)


def _check_native(native: int, scale: ScaleFactors, purpose: str) -> None:
    """Raise RequestError if a window cannot hold known frames beside those that it generates."""
    if native < _MIN_NATIVE:
        raise RequestError(
            f"The model's native window must be >= {scale.video_frames(_MIN_NATIVE)} frames for "
            f"{purpose}, got {scale.video_frames(native)}.",
            hint="Use another model.",
            field="model",
        )


def _latent_frame_of(frame: int, scale: ScaleFactors) -> int:
    """The latent frame that holds a video frame."""
    return -(-frame // scale.time)


def _prompt_fade(
    fade_frames: int, offset: int, cells: tuple[int, int], scale: ScaleFactors
) -> tuple[float, ...]:
    """Weight of the previous span's prompt per latent frame: 1 to 0 over the span's fade."""
    if not fade_frames:
        return ()
    middles = [
        (first_frame(cell, scale) + first_frame(cell + 1, scale) - 1) / 2 for cell in range(*cells)
    ]
    weights = [min(1.0, max(0.0, 1 - (middle - offset + 0.5) / fade_frames)) for middle in middles]
    return tuple(weights) if any(weights) else ()


Ranges = tuple[tuple[int, int], tuple[int, int]]  # what a window sees, what it generates


def _cached(begin: int, count: int, first: int, rollout: Rollout | None) -> Iterator[Ranges]:
    """Windows that follow one another by the cache; the first one has `first` latent frames."""
    end = begin + count
    start = begin
    while start < end:
        size = first if start == begin else rollout.window if rollout else count
        # the only window of a video is as short as the video
        stop = min(start + size, end) if start == begin == 0 else start + size
        yield (start, stop), (start, stop)
        start = stop


def _forward(known_before: int, generated: int, known_after: int, native: int) -> Iterator[Ranges]:
    """Windows in order of time; the last one sees the known latent frames after the span."""
    position = known_before
    end = known_before + generated
    max_known = _max_known(native)
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


def _backward(known_before: int, generated: int, known_after: int, native: int) -> Iterator[Ranges]:
    """Windows from the end of a span without known frames before it to its start."""
    assert not known_before
    end = generated
    max_known = _max_known(native)
    while end > 0:
        seen = min(max_known, generated + known_after - end)
        start = max(0, end - (native - seen))
        yield (start, end + seen), (start, end)
        end = start


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


def decode_whole(first: int, stop: int, display_range: tuple[int, int]) -> Window:
    """A run of known latent frames to decode."""
    return Window(
        0,
        first,
        stop,
        decode_until=stop,
        cache_until=stop,
        display_range=display_range,
        generated=(first, stop),
    )
