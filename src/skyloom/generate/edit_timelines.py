# pyright: basic
"""Timeline builders of the edit verbs: kept, generated and filtered spans. No pixel is read here.

remix and restyle start from the whole source; retake and inpaint from a part of it; extend, recut,
loop and stitch generate frames between or beside kept ones; blend mixes two videos by a curve.
Importing this module does not import torch.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

from skyloom.core.errors import RequestError
from skyloom.generate.parsing import parse_size
from skyloom.generate.source_prompts import PromptChooser, PromptSpan, SourceInfo, with_style
from skyloom.generate.timeline import (
    DEFAULT_FADE,
    Generate,
    Interpolate,
    Keep,
    Resize,
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


def build_remix(
    edit: "Edit", prompt: str, sources: Sequence[SourceInfo], fps: Fraction
) -> Timeline:
    """The whole video, generated from the source's frames."""
    whole = SourceClip(0, 0, sources[0].frames)
    return make_timeline([_from_clip(whole, prompt, "remix", edit.value("strength"))])


def build_restyle(
    edit: "Edit", prompt: str, sources: Sequence[SourceInfo], fps: Fraction
) -> Timeline:
    """The whole video, with the style appended to the prompt; a span per prompt of the source."""
    prompts = PromptChooser(prompt, sources, edit.videos)
    spans: list[Span | None] = []
    for index, part in enumerate(prompts.each(SourceClip(0, 0, sources[0].frames))):
        clip = SourceClip(0, part.start, part.stop)
        text = with_style(part.prompt, str(edit.style))
        name = f"restyle {index + 1}" if index else "restyle"
        spans.append(_from_clip(clip, text, name, edit.value("strength")))
    return _timeline(spans, prompts)


def build_retake(
    edit: "Edit", prompt: str, sources: Sequence[SourceInfo], fps: Fraction
) -> Timeline:
    """A time range, generated between the kept frames before and after it, with its prompts."""
    part = _time_range(edit, sources[0], fps)
    prompts = PromptChooser(prompt, sources, edit.videos)
    strength = edit.value("strength")
    whole = _replacement(sources[0], part, prompt, "retake", strength=strength)
    generated = _with_prompts(whole, prompts.known(part), nearest_frame(DEFAULT_FADE, fps))
    return _timeline(_around(sources[0], part, *generated), prompts)


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
    strength = edit.value("strength")
    generated = _replacement(sources[0], part, prompt, "inpaint", strength=strength)
    return make_timeline(_around(sources[0], part, replace(generated, masked=True)))


def build_extend(
    edit: "Edit", prompt: str, sources: Sequence[SourceInfo], fps: Fraction
) -> Timeline:
    """The whole source, and generated frames after or before it."""
    whole = SourceClip(0, 0, sources[0].frames)
    context = _context_frames(edit, fps)
    added = _frames(edit, "seconds", fps)
    prompts = PromptChooser(prompt, sources, edit.videos)
    if added < 1:
        raise RequestError(
            f"seconds must be at least one frame ({float(1 / fps):g} s), got {edit.seconds}.",
            field="seconds",
        )
    text = prompts.at(0, 0 if edit.backward else whole.stop - 1)
    if edit.backward:
        generated = Generate(added, text, "extend", after=_head(whole, context))
        return _timeline([generated, Keep(whole)], prompts)
    generated = Generate(added, text, "extend", before=_tail(whole, context))
    return _timeline([Keep(whole), generated], prompts)


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
    prompts = PromptChooser(prompt, sources, edit.videos)
    ahead = missing // 2
    behind = missing - ahead
    before = after = None
    if ahead:
        text = prompts.at(0, kept.start)
        before = Generate(ahead, text, "recut before", after=_head(kept, context))
    if behind:
        text = prompts.at(0, kept.stop - 1)
        after = Generate(behind, text, "recut after", before=_tail(kept, context))
    return _timeline([before, Keep(kept), after], prompts)


def build_loop(edit: "Edit", prompt: str, sources: Sequence[SourceInfo], fps: Fraction) -> Timeline:
    """A kept time range, and generated frames from its end back to its start."""
    kept = _time_range(edit, sources[0], fps)
    bridge = _frames(edit, "bridge", fps)
    prompts = PromptChooser(prompt, sources, edit.videos)
    generated = None
    if bridge:
        text = prompts.at(0, kept.stop - 1)
        generated = Generate(bridge, text, "loop", before=_tail(kept), after=_head(kept))
    return _timeline([Keep(kept), generated], prompts, loops=True)


def build_stitch(
    edit: "Edit", prompt: str, sources: Sequence[SourceInfo], fps: Fraction
) -> Timeline:
    """All sources in order, with a generated transition between each two, or a hard cut."""
    transition = _frames(edit, "morph", fps)
    prompts = PromptChooser(prompt, sources, edit.videos)
    spans: list[Span | None] = []
    for index, source in enumerate(sources):
        whole = SourceClip(index, 0, source.frames)
        if index and transition:
            previous = SourceClip(index - 1, 0, sources[index - 1].frames)
            spans.append(
                Generate(
                    transition,
                    prompts.at(index, 0),
                    f"stitch {index}",
                    before=_tail(previous),
                    after=_head(whole),
                )
            )
        spans.append(Keep(whole))
    return _timeline(spans, prompts)


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
    prompts = PromptChooser(prompt, sources, edit.videos)
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
                prompts.over(clips[1]),
                f"blend {index}",
                before=_tail(before),
                after=_head(after),
                init_clips=clips,
                mix_shares=tuple(shares[start : start + frames]),
                strength=edit.value("strength"),
            )
        )
    return _timeline(spans, prompts)


def build_upscale(
    edit: "Edit", prompt: str, sources: Sequence[SourceInfo], fps: Fraction
) -> Timeline:
    """The whole source at a larger size."""
    width, height = parse_size(str(edit.size))
    whole = SourceClip(0, 0, sources[0].frames)
    return replace(make_timeline([Resize(whole, (height, width))]), size=(height, width))


def build_interpolate(
    edit: "Edit", prompt: str, sources: Sequence[SourceInfo], fps: Fraction
) -> Timeline:
    """The whole source at a higher frame rate."""
    target = Fraction(str(edit.fps))
    whole = SourceClip(0, 0, sources[0].frames)
    return replace(make_timeline([Interpolate(whole, target / fps)]), fps=target)


def _timeline(
    spans: Sequence[Span | None], prompts: PromptChooser, *, loops: bool = False
) -> Timeline:
    """A timeline with the notices about the prompts of its generated spans."""
    timeline = make_timeline(spans, loops=loops)
    return replace(timeline, notices=prompts.notices) if timeline.generated_spans else timeline


def _from_clip(clip: SourceClip, prompt: str, name: str, strength: float) -> Generate:
    """A generated span that starts from a clip, without frames before or after it."""
    return Generate(clip.frames, prompt, name, init_clips=(clip,), strength=strength)


def _replacement(
    source: SourceInfo, part: SourceClip, prompt: str, name: str, *, strength: float
) -> Generate:
    """A part of the source, generated again between the rest."""
    return Generate(
        part.frames,
        prompt,
        name,
        before=_tail(SourceClip(0, 0, part.start)),
        after=_head(SourceClip(0, part.stop, source.frames)),
        init_clips=(part,),
        strength=strength,
    )


def _with_prompts(
    whole: Generate, prompts: Sequence[PromptSpan], fade_frames: int
) -> Iterator[Generate]:
    """One shot as a span for each prompt; positions count from the shot's first frame."""
    (clip,) = whole.init_clips
    for number, one in enumerate(prompts):
        frames = one.stop - one.start
        yield replace(
            whole,
            frames=frames,
            prompt=one.prompt,
            init_clips=(SourceClip(clip.source, clip.start + one.start, clip.start + one.stop),),
            continues=number > 0,
            fade_frames=min(fade_frames, frames) if number else 0,
        )


def _around(source: SourceInfo, part: SourceClip, *replacement: Span) -> list[Span | None]:
    """The spans that replace a part of the source, between the kept rest."""
    before = Keep(SourceClip(0, 0, part.start))
    after = Keep(SourceClip(0, part.stop, source.frames))
    return [before, *replacement, after]


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
