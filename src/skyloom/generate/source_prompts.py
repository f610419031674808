# pyright: basic
"""Prompts of an edit's sources over time, by their receipts, and of the video that it makes.

A storyboard's cards hold from their times on. An edit's receipt lists the prompt of all of its
frames, kept ones too, so a chain of edits loses none. Importing this module does not import torch.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any, Protocol

from skyloom.generate.parsing import parse_clock
from skyloom.generate.timeline import Generate, SourceClip, Timeline, nearest_frame
from skyloom.safety.moderation import refuse_prompt

_MAX_CHARACTERS = 8_000  # of a prompt in a receipt, which anyone can write


class SourceInfo(Protocol):
    """Length, frame rate and receipt of a source video."""

    @property
    def frames(self) -> int:
        """Number of frames."""
        ...

    @property
    def fps(self) -> Fraction:
        """Frames per second, after resampling."""
        ...

    @property
    def receipt(self) -> Mapping[str, object]:
        """The receipt in the file; empty if there is none."""
        ...


@dataclass(frozen=True)
class PromptSpan:
    """Frames [start, stop) and the prompt that they show; "" if it is unknown."""

    start: int
    stop: int
    prompt: str


def with_style(prompt: str, style: str) -> str:
    """Append a style to a prompt; either may be empty."""
    return ", ".join(text for text in (prompt, style) if text.strip())


def source_prompts(source: SourceInfo) -> tuple[PromptSpan, ...]:
    """Return the prompts of a source in order, for all of its frames.

    A receipt that is missing or damaged gives one span with the prompt "".
    """
    try:
        prompts = {0: "", **dict(_starts(source.receipt, source.fps))}
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        prompts = {0: ""}
    starts = sorted(start for start in prompts if 0 <= start < source.frames)
    return _merge(
        PromptSpan(start, stop, prompts[start])
        for start, stop in pairwise([*starts, source.frames])
    )


def prompts_in(sources: Sequence[SourceInfo], clip: SourceClip) -> tuple[PromptSpan, ...]:
    """Return the prompts of a clip of one of the sources; frames count from the clip's first."""
    return tuple(
        PromptSpan(max(span.start, clip.start) - clip.start, stop - clip.start, span.prompt)
        for span in source_prompts(sources[clip.source])
        if (stop := min(span.stop, clip.stop)) > max(span.start, clip.start)
    )


def timeline_prompts(timeline: Timeline, sources: Sequence[SourceInfo]) -> tuple[PromptSpan, ...]:
    """Return the prompts of an edited video in order, for all of its frames."""
    found: list[PromptSpan] = []
    position = 0
    for span in timeline.spans:
        if isinstance(span, Generate):
            found.append(PromptSpan(position, position + span.frames, span.prompt))
        else:
            for one in prompts_in(sources, span.clip):
                start, stop = span.range_of(one.start, one.stop)
                found.append(PromptSpan(position + start, position + stop, one.prompt))
        position += span.frames
    return _merge(sorted(found, key=lambda one: one.start))


class PromptChooser:
    """Chooses the prompts of generated spans: the request's, or what their source shows there.

    `notices` collects a sentence for each span whose source shows no prompt or several.
    """

    def __init__(self, prompt: str, sources: Sequence[SourceInfo], names: Sequence[str]) -> None:
        self._prompt = prompt
        self._sources = sources
        self._names = names
        self._notices: dict[str, None] = {}

    @property
    def notices(self) -> tuple[str, ...]:
        """The notices, each once."""
        return tuple(self._notices)

    def at(self, source: int, frame: int) -> str:
        """The prompt for frames that continue from one frame of a source. Raises SafetyError."""
        return self.over(SourceClip(source, frame, frame + 1))

    def over(self, clip: SourceClip) -> str:
        """The first known prompt of a clip. Raises SafetyError if the policy blocks it."""
        known = [span for span in self._of(clip) if span.prompt]
        if not known:
            self._add_missing(clip)
            return ""
        chosen = known[0].prompt
        for span in known[1:]:
            if span.prompt != chosen:
                seconds = float((clip.start + span.start) / self._sources[clip.source].fps)
                self._add(
                    clip,
                    f"its prompt changes to {span.prompt!r:.60} at {seconds:g} s, "
                    f"but the generated frames follow {chosen!r:.60}",
                )
        return chosen

    def known(self, clip: SourceClip) -> tuple[PromptSpan, ...]:
        """The known prompts of a clip, for all of its frames. Raises SafetyError as `over`.

        Frames of an unknown prompt take the known one before them, the first ones that after them.
        """
        spans = self._of(clip)
        known = next((span.prompt for span in spans if span.prompt), "")
        if not known:
            self._add_missing(clip)
        found: list[PromptSpan] = []
        for span in spans:
            known = span.prompt or known
            found.append(PromptSpan(span.start, span.stop, known))
        return _merge(found)

    def each(self, clip: SourceClip) -> tuple[PromptSpan, ...]:
        """All prompts of a clip in order. Raises SafetyError if the policy blocks one."""
        spans = self._of(clip)
        if not all(span.prompt for span in spans):
            self._add_missing(clip)
        return spans

    def _of(self, clip: SourceClip) -> tuple[PromptSpan, ...]:
        if self._prompt:
            return (PromptSpan(0, clip.frames, self._prompt),)
        spans = prompts_in(self._sources, clip)
        refuse_prompt("\n".join(span.prompt for span in spans))
        return spans

    def _add_missing(self, clip: SourceClip) -> None:
        self._add(clip, "it has no prompt, and frames are generated without one; give a prompt")

    def _add(self, clip: SourceClip, notice: str) -> None:
        self._notices[f"{self._names[clip.source]}: {notice}."] = None


def _starts(receipt: Mapping[str, Any], source_fps: Fraction) -> Iterator[tuple[int, str]]:
    """Yield the prompts of a receipt, each with its first frame at the source's rate."""
    request = receipt["request"]
    edit = request.get("edit") or {}
    frames = receipt.get("frames")
    fps = source_fps if frames is None else Fraction(frames["fps"])
    scale = source_fps / fps  # a source shows the latest frame of its file
    rows = receipt.get("notes", {}).get("prompts")
    if rows is not None:
        for start, _, prompt in rows:
            yield math.ceil(start * scale), _text(prompt)
    elif request.get("cards"):
        # cards are placed at the model's rate; of its frames, the file may have one in several
        model_fps = source_fps if scale.denominator == 1 else fps
        for card in request["cards"]:
            at = parse_clock(str(card["at"]))
            if at is None:
                raise ValueError("a card has no time")
            first = math.ceil(nearest_frame(at, model_fps) * fps / model_fps)
            yield math.ceil(first * scale), with_style(_text(card["prompt"]), request["prompt"])
    else:
        prompt = _text(request["prompt"])
        yield 0, with_style(prompt, _text(edit.get("style") or "")) if prompt else ""


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("a prompt must be text")
    return value[:_MAX_CHARACTERS]


def _merge(spans: Iterable[PromptSpan]) -> tuple[PromptSpan, ...]:
    """Join neighbours with the same prompt."""
    merged: list[PromptSpan] = []
    for span in spans:
        if merged and merged[-1].prompt == span.prompt:
            merged[-1] = PromptSpan(merged[-1].start, span.stop, span.prompt)
        else:
            merged.append(span)
    return tuple(merged)
