"""Where a span that is made lies on latent frames, and in which windows it is made.

A boundary of latent frames falls on the span's first frame; its last latent frame may reach into the frames after it,
which are shown as they are. Short spans are made in one window that sees both sides. Longer ones go on as long videos
do, with a memory, if nothing follows; from window to window if something does, towards what is known.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from skyloom.core.types import ScaleFactors
from skyloom.generate.rollout import Window, make_windows
from skyloom.generate.timeline import Generate
from skyloom.models.registry import Rollout

KNOWN = 3  # latent frames that a window sees on a side, or less, where it has no room for something new between them
_FEWEST = 2  # and at least, if that spares a second window


@dataclass(frozen=True)
class Layout:
    """`left` known latent frames, `made` ones and `right` known ones; the span's first frame is number `lead`.

    Window i makes the latent frames `makes[i]`; with a `memory`, later windows see what it keeps of those before, else
    each sees what lies in it.
    """

    left: int
    made: int
    right: int
    lead: int
    windows: tuple[Window, ...]
    makes: tuple[tuple[int, int], ...]
    memory: bool

    @property
    def cells(self) -> int:
        """All latent frames."""
        return self.left + self.made + self.right


def lay_out(span: Generate, scale: ScaleFactors, native: int, rollout: Rollout | None) -> Layout:
    """The layout of a span, for a model that makes `native` latent frames in one go, three or more."""
    assert native >= 3, "one before, one after, one to be made"  # noqa: PLR2004
    known = min(KNOWN, (native - 1) // 2)
    before = 0 if span.before is None else span.before.frames
    after = 0 if span.after is None else span.after.frames
    goes_on = before > 0 and after == 0 and rollout is not None
    most = native if goes_on else known
    left = min(most, (before - 1) // scale.time + 1) if before else 0
    made = -(-span.frames // scale.time) if left else scale_cells(span.frames, scale)
    covered = made * scale.time if left else scale.video_frames(made)
    beyond = after - (covered - span.frames)
    right = 0 if beyond <= 0 else min(known, max(1, beyond // scale.time))
    if left and right:
        left, right = _fitted(left, made, right, native)
    lead = scale.video_frames(left) if left else 0
    begins = not left and not right and (made <= native or rollout is not None)
    fits = left + made + right <= native
    if begins:
        windows = make_windows(made, native, rollout)
        makes = tuple((one.start, one.stop) for one in windows)
        return Layout(0, made, 0, 0, windows, makes, memory=True)
    if goes_on and not (fits and left <= known):
        assert rollout is not None
        edges = [
            *range(left, left + made, rollout.window),
            left + -(-made // rollout.window) * rollout.window,
        ]
        windows = tuple(
            Window(index, start, stop, min(stop, left + made), stop)
            for index, (start, stop) in enumerate(pairwise(edges))
        )
        makes = tuple((one.start, one.stop) for one in windows)
        return Layout(left, made, 0, lead, windows, makes, memory=True)
    runs = list(
        _backward(made, right, native)
        if right and not left
        else _forward(left, made, right, native)
    )
    windows = tuple(
        Window(index, start, stop, stop, stop, shot=index)
        for index, ((start, stop), _) in enumerate(runs)
    )
    return Layout(left, made, right, lead, windows, tuple(made for _, made in runs), memory=False)


def _fitted(left: int, made: int, right: int, native: int) -> tuple[int, int]:
    """A little less of what is known, where that makes one window of two."""
    for fewer_left, fewer_right in (
        (left, min(right, _FEWEST)),
        (min(left, _FEWEST), min(right, _FEWEST)),
    ):
        if left + made + right > native >= fewer_left + made + fewer_right:
            return fewer_left, fewer_right
    return left, right


def scale_cells(frames: int, scale: ScaleFactors) -> int:
    """Latent frames that hold so many frames of the beginning of a video."""
    return -(-(frames - 1) // scale.time) + 1


Run = tuple[tuple[int, int], tuple[int, int]]  # what a window sees, and what it makes of that


def _forward(left: int, made: int, right: int, native: int) -> Iterator[Run]:
    """From left to right; the last window sees what follows."""
    at, end, known = left, left + made, min(KNOWN, (native - 1) // 2)
    while at < end:
        seen = min(known, at)
        room, rest = native - seen, end - at
        if rest + right <= room:
            yield (at - seen, end + right), (at, end)
            return
        step = room if rest > room else max(1, rest - (native - known - right))
        yield (at - seen, at + step), (at, at + step)
        at += step


def _backward(made: int, right: int, native: int) -> Iterator[Run]:
    """From right to left, towards the beginning of the video."""
    end, most = made, min(KNOWN, (native - 1) // 2)
    while end > 0:
        seen = min(most, made + right - end)
        start = max(0, end - (native - seen))
        yield (start, end + seen), (start, end)
        end = start
