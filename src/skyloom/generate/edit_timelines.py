"""The verbs of editing: what each makes of its sources, as a timeline. None of them touches a pixel.

remix and restyle start from the whole source; retake and inpaint from a part of it; extend, recut, loop and stitch make
what joins on to frames that are kept; blend makes one video out of two, as much of each as a curve says.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import groupby, pairwise
from typing import Protocol

from skyloom.core.errors import RequestError
from skyloom.generate.cards import parse_clock
from skyloom.generate.edit_spec import CURVES, Edit
from skyloom.generate.request import parse_size
from skyloom.generate.timeline import Clip, Filter, Keep, Make, Span, Timeline, make_timeline
from skyloom.media.masks import parse_region

SEEN = 33  # frames beside a span that it may look at: the native window of the bundled model
_DEFAULT_STRENGTH = {"remix": 0.8, "restyle": 0.8, "blend": 0.6, "retake": 1.0, "inpaint": 1.0}
_BRIDGE, _MORPH, _BLEND = Fraction(1), Fraction(1, 2), Fraction(1)
_LONGEST = 3600


class Reel(Protocol):
    """A source, as far as a timeline is concerned."""

    @property
    def frames(self) -> int: ...
    @property
    def receipt(self) -> Mapping[str, object]: ...


def edit_timeline(edit: Edit, prompt: str, sources: Sequence[Reel], fps: Fraction) -> Timeline:
    """The timeline of an edit. Raises RequestError for ranges, times and prompts that its sources do not allow."""
    return _VERBS[edit.verb](edit, prompt.strip(), sources, fps)


def source_prompt(source: Reel) -> str:
    """What a source of our own was made of; empty for others."""
    request = source.receipt.get("request")
    said = request.get("prompt", "") if isinstance(request, Mapping) else ""
    return said if isinstance(said, str) else ""


def _remix(edit: Edit, prompt: str, sources: Sequence[Reel], fps: Fraction) -> Timeline:
    if not prompt:
        raise RequestError("A remix needs a prompt.", hint="Say what it is to show now.")
    whole = Clip(0, 0, sources[0].frames)
    return make_timeline(
        [Make(whole.frames, prompt, "remix", under=(whole,), strength=_strength(edit))]
    )


def _restyle(edit: Edit, prompt: str, sources: Sequence[Reel], fps: Fraction) -> Timeline:
    said = prompt or source_prompt(sources[0])
    whole, text = (
        Clip(0, 0, sources[0].frames),
        f"{said}, {edit.style}" if said else str(edit.style),
    )
    return make_timeline(
        [Make(whole.frames, text, "restyle", under=(whole,), strength=_strength(edit))]
    )


def _retake(edit: Edit, prompt: str, sources: Sequence[Reel], fps: Fraction) -> Timeline:
    begin, end = _range(edit, sources[0], fps)
    return _inside(sources[0], Clip(0, begin, end), prompt, "retake", _strength(edit), masked=False)


def _inpaint(edit: Edit, prompt: str, sources: Sequence[Reel], fps: Fraction) -> Timeline:
    if not prompt:
        raise RequestError("inpaint needs a prompt.", hint="Say what the region is to show.")
    begin, end = 0, sources[0].frames
    if edit.region is not None:
        boxes = parse_region(edit.region).boxes
        if all(box.stop is not None for box in boxes):
            begin = min(math.floor((box.start or 0) * fps) for box in boxes)
            end = min(end, max(math.ceil((box.stop or 0) * fps) for box in boxes))
    if not begin < end:
        raise RequestError(
            "The region's times are outside of the video.", hint=_long(sources[0], fps)
        )
    return _inside(sources[0], Clip(0, begin, end), prompt, "inpaint", _strength(edit), masked=True)


def _inside(
    source: Reel, part: Clip, prompt: str, name: str, strength: float, *, masked: bool
) -> Timeline:
    """A part of a video made again, between what is kept of it."""
    before, after = Clip(0, 0, part.start), Clip(0, part.stop, source.frames)
    made = Make(
        part.frames,
        prompt or source_prompt(source),
        name,
        before=_last(before),
        after=_first(after),
        under=(part,),
        strength=strength,
        masked=masked,
    )
    return make_timeline([Keep(before), made, Keep(after)])


def _extend(edit: Edit, prompt: str, sources: Sequence[Reel], fps: Fraction) -> Timeline:
    whole, seen = Clip(0, 0, sources[0].frames), _frames(edit.overlap, fps, SEEN)
    added, said = _frames(edit.seconds, fps, 0), prompt or source_prompt(sources[0])
    if added < 1:
        raise RequestError("Extending by nothing.", hint="Ask for more than 0 seconds.")
    if edit.backward:
        return make_timeline([Make(added, said, "extend", after=_first(whole, seen)), Keep(whole)])
    return make_timeline([Keep(whole), Make(added, said, "extend", before=_last(whole, seen))])


def _recut(edit: Edit, prompt: str, sources: Sequence[Reel], fps: Fraction) -> Timeline:
    begin, end = _range(edit, sources[0], fps)
    kept, seen = Clip(0, begin, end), _frames(edit.overlap, fps, SEEN)
    missing = _frames(edit.seconds, fps, 0) + 1 - kept.frames
    if missing < 0:
        raise RequestError(
            f"{kept.frames} frames are kept, more than {edit.seconds} s hold.",
            hint="Keep less, or ask for more.",
        )
    said, ahead = prompt or source_prompt(sources[0]), missing // 2
    before = Make(ahead, said, "recut before", after=_first(kept, seen)) if ahead else None
    after = (
        Make(missing - ahead, said, "recut after", before=_last(kept, seen))
        if missing - ahead
        else None
    )
    return make_timeline([before, Keep(kept), after])


def _loop(edit: Edit, prompt: str, sources: Sequence[Reel], fps: Fraction) -> Timeline:
    begin, end = _range(edit, sources[0], fps)
    kept, bridge = Clip(0, begin, end), _frames(edit.bridge, fps, _frame(_BRIDGE, fps))
    made = None
    if bridge:
        said = prompt or source_prompt(sources[0])
        made = Make(bridge, said, "loop", before=_last(kept), after=_first(kept))
    return make_timeline([Keep(kept), made], loops=True)


def _stitch(edit: Edit, prompt: str, sources: Sequence[Reel], fps: Fraction) -> Timeline:
    morph = _frames(edit.morph, fps, _frame(_MORPH, fps))
    spans: list[Span | None] = []
    for index, source in enumerate(sources):
        whole = Clip(index, 0, source.frames)
        if index and morph:
            said = prompt or source_prompt(source)
            before = Clip(index - 1, 0, sources[index - 1].frames)
            spans.append(
                Make(morph, said, f"stitch {index}", before=_last(before), after=_first(whole))
            )
        spans.append(Keep(whole))
    return make_timeline(spans)


def _blend(edit: Edit, prompt: str, sources: Sequence[Reel], fps: Fraction) -> Timeline:
    """Runs of frames: those of one source alone are kept, those of both are made."""
    first, second = sources
    over, offset = min(first.frames, second.frames), 0
    curve = edit.curve or "transition"
    if curve == "transition":
        over = min(over, _frames(edit.seconds, fps, _frame(_BLEND, fps)))
        offset = first.frames - over
    elif edit.seconds is not None:
        raise RequestError(
            f"Only a transition lasts some seconds, not {curve!r}.", hint="Leave the seconds out."
        )
    shares = [0.0] * offset + [_share(curve, index, over, fps) for index in range(over)]
    if curve == "transition":
        shares += [1.0] * (second.frames - over)
    runs = list(_runs(shares, offset))
    said, spans = prompt or source_prompt(second), list[Span | None]()
    for index, (at, clips) in enumerate(runs):
        if len(clips) == 1:
            spans.append(Keep(clips[0]))
            continue
        before = runs[index - 1][1][0] if index else Clip(0, 0, 0)
        after = runs[index + 1][1][0] if index + 1 < len(runs) else Clip(1, 0, 0)
        name, some = f"blend {index}", tuple(shares[at : at + clips[0].frames])
        made = Make(
            len(some),
            said,
            name,
            _last(before),
            _first(after),
            clips,
            some,
            strength=_strength(edit),
        )
        spans.append(made)
    return make_timeline(spans)


def _runs(shares: Sequence[float], offset: int) -> Iterator[tuple[int, tuple[Clip, ...]]]:
    """Runs of frames and where each begins: of the first video, of the second, which begins at `offset`, or of both."""
    for share, numbers in groupby(
        range(len(shares)), key=lambda frame: shares[frame] if shares[frame] in {0, 1} else -1
    ):
        run = list(numbers)
        begin, end = run[0], run[-1] + 1
        clips = (Clip(0, begin, end), Clip(1, begin - offset, end - offset))
        yield begin, clips if share < 0 else (clips[int(share)],)


def _share(curve: str, index: int, frames: int, fps: Fraction) -> float:
    """How much of the second video a frame shows: by a named curve, or straight lines through "time:share, ..."."""
    along = (index + 1) / (frames + 1)
    if curve in CURVES:
        return {
            "transition": along,
            "mix": 0.5,
            "sample": min(1.0, 2 * min(along, 1 - along)) * 0.8,
        }[curve]
    points = _points(curve)
    time = float(index / fps)
    if time <= points[0][0]:
        return points[0][1]
    for (before, low), (after, high) in pairwise(points):
        if time <= after:
            return low + (high - low) * (time - before) / (after - before)
    return points[-1][1]


def _points(curve: str) -> list[tuple[float, float]]:
    wrong = RequestError(
        f"{curve!r:.60} is no curve.",
        hint=f'Use {", ".join(CURVES)}, or times like "0:0,1.5:1,3:0".',
    )
    try:
        points = [
            (float(time), float(share))
            for time, share in (point.split(":") for point in curve.split(","))
        ]
    except ValueError as error:
        raise wrong from error
    rising = all(one[0] < two[0] for one, two in pairwise(points))
    if not rising or not all(time >= 0 and 0 <= share <= 1 for time, share in points):
        raise wrong
    return points


def _upscale(edit: Edit, prompt: str, sources: Sequence[Reel], fps: Fraction) -> Timeline:
    width, height = parse_size(str(edit.size))
    return make_timeline([Filter(Clip(0, 0, sources[0].frames), size=(height, width))])


def _interpolate(edit: Edit, prompt: str, sources: Sequence[Reel], fps: Fraction) -> Timeline:
    try:
        times = Fraction(str(edit.fps)) / fps  # other limits are the filter's
    except (ValueError, ZeroDivisionError) as error:
        raise RequestError(
            f"{edit.fps!r} is no rate.", hint="Write frames a second, like 32."
        ) from error
    if times <= 1:
        raise RequestError(
            f"{edit.fps} fps are not more than {float(fps):g}.",
            hint=f"Use {float(2 * fps):g}, say.",
        )
    return make_timeline([Filter(Clip(0, 0, sources[0].frames), times=times)])


_VERBS: dict[str, Callable[[Edit, str, Sequence[Reel], Fraction], Timeline]] = {
    "remix": _remix,
    "restyle": _restyle,
    "retake": _retake,
    "inpaint": _inpaint,
    "extend": _extend,
    "recut": _recut,
    "loop": _loop,
    "blend": _blend,
    "stitch": _stitch,
    "upscale": _upscale,
    "interpolate": _interpolate,
}


def _strength(edit: Edit) -> float:
    return _DEFAULT_STRENGTH[edit.verb] if edit.strength is None else edit.strength


def _last(clip: Clip, frames: int = SEEN) -> Clip | None:
    """What a span after a clip may look at."""
    return (
        Clip(clip.source, max(clip.start, clip.stop - frames), clip.stop) if clip.frames else None
    )


def _first(clip: Clip, frames: int = SEEN) -> Clip | None:
    """What a span before a clip may look at."""
    return (
        Clip(clip.source, clip.start, min(clip.stop, clip.start + frames)) if clip.frames else None
    )


def _frame(time: Fraction, fps: Fraction) -> int:
    """The nearest frame; halves go up."""
    return int(time * fps + Fraction(1, 2))


def _frames(said: str | None, fps: Fraction, default: int) -> int:
    """A length in frames. Raises RequestError for hours."""
    if said is None:
        return default
    time = parse_clock(said)
    assert time is not None, "an edit is checked when it is made"
    if time > _LONGEST:
        raise RequestError(f"{said} s are more than {_LONGEST}.", hint="Ask for less.")
    return _frame(time, fps)


def _range(edit: Edit, source: Reel, fps: Fraction) -> tuple[int, int]:
    """The first frame of an edit's range and the one after its last."""
    begin = 0 if edit.start is None else _frames(edit.start, fps, 0)
    end = source.frames if edit.stop is None else _frames(edit.stop, fps, 0)
    if begin >= source.frames or end > source.frames:
        raise RequestError(
            f"{edit.start or 0} to {edit.stop or 'the end'} s is outside of the video.",
            hint=_long(source, fps),
        )
    if begin >= end:
        raise RequestError(
            f"{edit.start} to {edit.stop} s holds no frame.", hint="Let it end after it begins."
        )
    return begin, end


def _long(source: Reel, fps: Fraction) -> str:
    return f"It is {float(source.frames / fps):.2f} seconds long."
