# pyright: basic
"""Timeline builders of the edit verbs: kept, generated and filtered spans. No pixel is read here.

remix and restyle start from the whole source; retake and inpaint from a part of it; extend, recut,
loop and stitch generate frames between or beside kept ones; blend mixes two videos by a curve.
Importing this module does not import torch.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Protocol

from skyloom.core.errors import RequestError
from skyloom.generate.parsing import parse_size
from skyloom.generate.timeline import (
    Filter,
    Generate,
    Keep,
    SourceClip,
    Span,
    Timeline,
    make_timeline,
    nearest_frame,
)

if TYPE_CHECKING:
    from skyloom.generate.edit_spec import Edit

CURVES = ("transition", "mix", "sample")
# kept frames beside a span that condition it: the bundled model's native window
CONTEXT_FRAMES = 33
_BLEND_SECONDS = Fraction(1)
_SAMPLE_PEAK = 0.8  # largest share of the second video in a "sample" curve


class SourceInfo(Protocol):
    """Length and receipt of a source video."""

    @property
    def frames(self) -> int:
        """Number of frames."""
        ...

    @property
    def receipt(self) -> Mapping[str, object]:
        """The receipt in the file; empty if there is none."""
        ...


def source_prompt(source: SourceInfo) -> str:
    """The prompt in a source's receipt; empty if there is none."""
    request = source.receipt.get("request")
    prompt = request.get("prompt", "") if isinstance(request, Mapping) else ""
    return prompt if isinstance(prompt, str) else ""


def build_remix(
    edit: "Edit", prompt: str, sources: Sequence[SourceInfo], fps: Fraction
) -> Timeline:
    """The whole video, generated from the source's frames."""
    return _from_whole(sources[0], prompt, "remix", edit.value("strength"))


def build_restyle(
    edit: "Edit", prompt: str, sources: Sequence[SourceInfo], fps: Fraction
) -> Timeline:
    """The whole video, with the style appended to the prompt."""
    text = prompt or source_prompt(sources[0])
    styled = f"{text}, {edit.style}" if text else str(edit.style)
    return _from_whole(sources[0], styled, "restyle", edit.value("strength"))


def build_retake(
    edit: "Edit", prompt: str, sources: Sequence[SourceInfo], fps: Fraction
) -> Timeline:
    """A time range, generated between the kept frames before and after it."""
    part = _time_range(edit, sources[0], fps)
    return _replace_part(
        sources[0], part, prompt, name="retake", strength=edit.value("strength"), masked=False
    )


def build_inpaint(
    edit: "Edit", prompt: str, sources: Sequence[SourceInfo], fps: Fraction
) -> Timeline:
    """The frames in which the region or mask holds."""
    begin = 0
    end = sources[0].frames
    if edit.region is not None:
        from skyloom.media.masks import parse_region

        boxes = parse_region(edit.region).boxes
        if all(box.stop is not None for box in boxes):
            begin = min(math.floor((box.start or 0) * fps) for box in boxes)
            end = min(end, max(math.ceil((box.stop or 0) * fps) for box in boxes))
    if not begin < end:
        length = f"{float(sources[0].frames / fps):.2f} s"
        raise RequestError(
            f"region must hold within the video ({length}), got {edit.region}.", field="region"
        )
    part = SourceClip(0, begin, end)
    return _replace_part(
        sources[0], part, prompt, name="inpaint", strength=edit.value("strength"), masked=True
    )


def build_extend(
    edit: "Edit", prompt: str, sources: Sequence[SourceInfo], fps: Fraction
) -> Timeline:
    """The whole source, and generated frames after or before it."""
    whole = SourceClip(0, 0, sources[0].frames)
    context = _context_frames(edit, fps)
    added = _frames(edit, "seconds", fps)
    text = prompt or source_prompt(sources[0])
    if added < 1:
        raise RequestError(
            f"seconds must be at least one frame ({float(1 / fps):g} s), got {edit.seconds}.",
            field="seconds",
        )
    if edit.backward:
        generated = Generate(added, text, "extend", after=_head(whole, context))
        return make_timeline([generated, Keep(whole)])
    generated = Generate(added, text, "extend", before=_tail(whole, context))
    return make_timeline([Keep(whole), generated])


def build_recut(
    edit: "Edit", prompt: str, sources: Sequence[SourceInfo], fps: Fraction
) -> Timeline:
    """A kept time range, with generated frames before and after it."""
    kept = _time_range(edit, sources[0], fps)
    context = _context_frames(edit, fps)
    missing = _frames(edit, "seconds", fps) + 1 - kept.frames
    if missing < 0:
        raise RequestError(
            f"seconds must be >= {float((kept.frames - 1) / fps):.2f}, "
            f"the length of the kept range, got {edit.seconds}.",
            hint="Keep a shorter range, or raise seconds.",
            field="seconds",
        )
    text = prompt or source_prompt(sources[0])
    ahead = missing // 2
    behind = missing - ahead
    before = after = None
    if ahead:
        before = Generate(ahead, text, "recut before", after=_head(kept, context))
    if behind:
        after = Generate(behind, text, "recut after", before=_tail(kept, context))
    return make_timeline([before, Keep(kept), after])


def build_loop(edit: "Edit", prompt: str, sources: Sequence[SourceInfo], fps: Fraction) -> Timeline:
    """A kept time range, and generated frames from its end back to its start."""
    kept = _time_range(edit, sources[0], fps)
    bridge = _frames(edit, "bridge", fps)
    generated = None
    if bridge:
        text = prompt or source_prompt(sources[0])
        generated = Generate(bridge, text, "loop", before=_tail(kept), after=_head(kept))
    return make_timeline([Keep(kept), generated], loops=True)


def build_stitch(
    edit: "Edit", prompt: str, sources: Sequence[SourceInfo], fps: Fraction
) -> Timeline:
    """All sources in order, with a generated transition between each two, or a hard cut."""
    transition = _frames(edit, "morph", fps)
    spans: list[Span | None] = []
    for index, source in enumerate(sources):
        whole = SourceClip(index, 0, source.frames)
        if index and transition:
            previous = SourceClip(index - 1, 0, sources[index - 1].frames)
            spans.append(
                Generate(
                    transition,
                    prompt or source_prompt(source),
                    f"stitch {index}",
                    before=_tail(previous),
                    after=_head(whole),
                )
            )
        spans.append(Keep(whole))
    return make_timeline(spans)


def build_blend(
    edit: "Edit", prompt: str, sources: Sequence[SourceInfo], fps: Fraction
) -> Timeline:
    """Frames of only one source are kept; frames that mix both are generated from the mix."""
    first, second = sources
    curve = edit.value("curve")
    overlap = min(first.frames, second.frames)
    offset = 0
    if curve == "transition":
        seconds = edit.seconds_of("seconds")
        overlap = min(overlap, nearest_frame(_BLEND_SECONDS if seconds is None else seconds, fps))
        offset = first.frames - overlap
    elif edit.seconds is not None:
        raise RequestError(
            f"seconds must be left out for the curve {curve!r:.60}, got {edit.seconds}.",
            hint="Only a transition has a length.",
            field="seconds",
        )
    shares = [0.0] * offset + [_share(curve, index, overlap, fps) for index in range(overlap)]
    if curve == "transition":
        shares += [1.0] * (second.frames - overlap)
    runs = list(_share_runs(shares, offset))
    spans: list[Span | None] = []
    for index, (start, clips) in enumerate(runs):
        if len(clips) == 1:
            spans.append(Keep(clips[0]))
            continue
        before = runs[index - 1][1][0] if index else SourceClip(0, 0, 0)
        after = runs[index + 1][1][0] if index + 1 < len(runs) else SourceClip(1, 0, 0)
        frames = clips[0].frames
        spans.append(
            Generate(
                frames,
                prompt or source_prompt(second),
                f"blend {index}",
                before=_tail(before),
                after=_head(after),
                init_clips=clips,
                mix_shares=tuple(shares[start : start + frames]),
                strength=edit.value("strength"),
            )
        )
    return make_timeline(spans)


def build_upscale(
    edit: "Edit", prompt: str, sources: Sequence[SourceInfo], fps: Fraction
) -> Timeline:
    """The whole source at a larger size."""
    width, height = parse_size(str(edit.size))
    return make_timeline([Filter(SourceClip(0, 0, sources[0].frames), size=(height, width))])


def build_interpolate(
    edit: "Edit", prompt: str, sources: Sequence[SourceInfo], fps: Fraction
) -> Timeline:
    """The whole source at a higher frame rate."""
    factor = Fraction(str(edit.fps)) / fps
    return make_timeline([Filter(SourceClip(0, 0, sources[0].frames), rate_factor=factor)])


def _from_whole(source: SourceInfo, prompt: str, name: str, strength: float) -> Timeline:
    """One generated span that starts from the whole source."""
    whole = SourceClip(0, 0, source.frames)
    return make_timeline(
        [Generate(whole.frames, prompt, name, init_clips=(whole,), strength=strength)]
    )


def _replace_part(
    source: SourceInfo, part: SourceClip, prompt: str, *, name: str, strength: float, masked: bool
) -> Timeline:
    """A part of the source generated again, between the kept rest."""
    before = SourceClip(0, 0, part.start)
    after = SourceClip(0, part.stop, source.frames)
    generated = Generate(
        part.frames,
        prompt or source_prompt(source),
        name,
        before=_tail(before),
        after=_head(after),
        init_clips=(part,),
        strength=strength,
        masked=masked,
    )
    return make_timeline([Keep(before), generated, Keep(after)])


def _time_range(edit: "Edit", source: SourceInfo, fps: Fraction) -> SourceClip:
    """The frames from `start` to `stop`; `check_source_limits` has checked them."""
    stop = edit.seconds_of("stop")
    end = source.frames if stop is None else nearest_frame(stop, fps)
    return SourceClip(0, _frames(edit, "start", fps), end)


def _frames(edit: "Edit", name: str, fps: Fraction) -> int:
    """A time parameter, or its default, in frames."""
    seconds = edit.seconds_of(name)
    assert seconds is not None, "the parameter is required or has a default"
    return nearest_frame(seconds, fps)


def _context_frames(edit: "Edit", fps: Fraction) -> int:
    """The overlap in frames."""
    return CONTEXT_FRAMES if edit.overlap is None else _frames(edit, "overlap", fps)


def _tail(clip: SourceClip, frames: int = CONTEXT_FRAMES) -> SourceClip | None:
    """The last frames of a clip; None for an empty clip."""
    if not clip.frames:
        return None
    return SourceClip(clip.source, max(clip.start, clip.stop - frames), clip.stop)


def _head(clip: SourceClip, frames: int = CONTEXT_FRAMES) -> SourceClip | None:
    """The first frames of a clip; None for an empty clip."""
    if not clip.frames:
        return None
    return SourceClip(clip.source, clip.start, min(clip.stop, clip.start + frames))


def _share_runs(
    shares: Sequence[float], offset: int
) -> Iterator[tuple[int, tuple[SourceClip, ...]]]:
    """Runs of frames of the first video, the second or both: first frame, then one or two clips.

    `offset` is the frame at which the second video begins.
    """
    for share, numbers in groupby(
        range(len(shares)), key=lambda frame: shares[frame] if shares[frame] in {0, 1} else -1
    ):
        run = list(numbers)
        begin = run[0]
        end = run[-1] + 1
        clips = (SourceClip(0, begin, end), SourceClip(1, begin - offset, end - offset))
        yield begin, clips if share < 0 else (clips[int(share)],)


def _share(curve: str, index: int, frames: int, fps: Fraction) -> float:
    """Share of the second video in a frame: a named curve, or linear between "time:share, ..."."""
    position = (index + 1) / (frames + 1)
    if curve == "transition":
        return position
    if curve == "mix":
        return 0.5
    if curve == "sample":
        return min(1.0, 2 * min(position, 1 - position)) * _SAMPLE_PEAK
    points = _parse_curve(curve)
    time = float(index / fps)
    if time <= points[0][0]:
        return points[0][1]
    for (before, low), (after, high) in pairwise(points):
        if time <= after:
            return low + (high - low) * (time - before) / (after - before)
    return points[-1][1]


def _parse_curve(curve: str) -> list[tuple[float, float]]:
    """Points (time in seconds, share) of "0:0,1.5:1,3:0". Raises RequestError."""
    invalid = RequestError(
        f"curve must be {', '.join(CURVES)} or rising times with shares from 0 to 1, "
        f"got {curve!r:.60}.",
        hint='Write it like "0:0,1.5:1,3:0".',
        field="curve",
    )
    try:
        points = [
            (float(time), float(share))
            for time, share in (point.split(":") for point in curve.split(","))
        ]
    except ValueError as error:
        raise invalid from error
    rising = all(one[0] < two[0] for one, two in pairwise(points))
    if not rising or not all(time >= 0 and 0 <= share <= 1 for time, share in points):
        raise invalid
    return points
