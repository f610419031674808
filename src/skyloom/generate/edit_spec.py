# pyright: basic
"""Edit: a verb and its parameters, as plain values that requests, receipts and jobs store."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

from skyloom.core.errors import RequestError
from skyloom.generate.edit_verbs import EDIT_VERBS, STRENGTHS, EditField, EditVerb
from skyloom.generate.parsing import TIME_HINT, parse_clock, parse_size
from skyloom.generate.timeline import nearest_frame

_DOCS = "docs/editing.md shows every verb."


@dataclass(frozen=True)
class Edit:
    """An edit verb, its source videos and its parameters (skyloom.generate.edit_verbs lists them).

    Times are seconds ("2.5", "1:02.5", "13/16"). `strength` is 0 (unchanged) to 1 (unconstrained),
    or "subtle", "mild", "strong". `style` is the text of a style. `backward` extends before the
    first frame instead of after the last. `strict` refuses videos that would have to be resampled.
    Raises RequestError for values that are invalid, missing, or not a
    parameter of the verb.
    """

    verb: str
    videos: tuple[str, ...]
    start: str | None = None
    stop: str | None = None
    seconds: str | None = None
    strength: float | None = None
    region: str | None = None
    mask: str | None = None
    feather: int | None = None
    backward: bool = False
    overlap: str | None = None
    bridge: str | None = None
    morph: str | None = None
    curve: str | None = None
    style: str | None = None
    size: str | None = None
    fps: str | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        if self.verb not in EDIT_VERBS:
            near = difflib.get_close_matches(str(self.verb), EDIT_VERBS, n=1)
            raise RequestError(
                f"verb must be one of {', '.join(EDIT_VERBS)}, got {self.verb!r:.60}.",
                hint=f"Did you mean {near[0]}?" if near else _DOCS,
                field="verb",
            )
        verb = EDIT_VERBS[self.verb]
        for name in _PARAMETERS:
            object.__setattr__(self, name, _parse_parameter(verb, name, getattr(self, name)))
        if not isinstance(self.strict, bool):
            raise _invalid("strict", "true or false", self.strict)
        object.__setattr__(self, "videos", _parse_videos(verb, self.videos))
        for name in verb.required:
            if name != "prompt" and getattr(self, name) is None:
                raise RequestError(
                    f"{name} must be given for {verb.name}, got none.", hint=_DOCS, field=name
                )
        if verb.name == "inpaint" and (self.region is None) == (self.mask is None):
            given = "neither" if self.region is None else "both"
            raise RequestError(
                f"Either region or mask must be given for inpaint, got {given}.",
                hint="Give a region like 40,40,48,48, or a mask file.",
                field="region",
            )

    @property
    def needs_model(self) -> bool:
        """Whether a model generates frames; some verbs, and hard cuts, only use existing ones."""
        is_hard_cut = self.verb == "stitch" and not self.seconds_of("morph")
        return EDIT_VERBS[self.verb].uses_model and not is_hard_cut

    def value(self, name: str) -> Any:
        """A parameter, or the verb's default if it is not set."""
        value = getattr(self, name)
        field = EDIT_VERBS[self.verb].field(name)
        return field.default if value is None and field is not None else value

    def seconds_of(self, name: str) -> Fraction | None:
        """A time parameter in exact seconds, or the verb's default; None if there is neither."""
        value = self.value(name)
        return None if value is None else parse_clock(value)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; parameters that are not set are left out."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in values.items()
            if value is not None and value is not False
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Edit":
        """The inverse of `to_dict`. Raises RequestError for unknown keys."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                raise RequestError(
                    f"An edit has no parameter {name!r:.60}.",
                    hint=f"Did you mean {near[0]!r}?" if near else f"It has: {', '.join(known)}.",
                )
        for name in ("verb", "videos"):
            if name not in values:
                raise RequestError(
                    f"{name} must be given for an edit, got none.", hint=_DOCS, field=name
                )
        return cls(**values)


_PARAMETERS = tuple(
    field.name for field in fields(Edit) if field.name not in ("verb", "videos", "strict")
)


def check_source_limits(edit: Edit, *, width: int, height: int, fps: Fraction, frames: int) -> None:
    """Check an edit against its first video.

    Raises RequestError for a size or rate that is not larger than the video's, and for a time range
    outside it.
    """
    if edit.size is not None:
        wide, high = parse_size(edit.size)
        if wide < width or high < height or (wide, high) == (width, height):
            raise RequestError(
                f"size must be larger than the video ({width}x{height}), got {edit.size}.",
                hint=f"Use {2 * width}x{2 * height}, for example.",
                field="size",
            )
    if edit.fps is not None and Fraction(edit.fps) <= fps:
        raise RequestError(
            f"fps must be > {float(fps):g}, the video's own rate, got {edit.fps}.",
            hint=f"Use {float(2 * fps):g}, for example.",
            field="fps",
        )
    length = f"{float(frames / fps):.2f} s, the length of the video"
    start = edit.seconds_of("start") if edit.start is not None else None
    stop = edit.seconds_of("stop")
    if start is not None and nearest_frame(start, fps) >= frames:
        raise RequestError(f"start must be < {length}, got {edit.start}.", field="start")
    if stop is not None and nearest_frame(stop, fps) > frames:
        raise RequestError(f"stop must be <= {length}, got {edit.stop}.", field="stop")
    if stop is not None and nearest_frame(stop, fps) <= nearest_frame(start or Fraction(0), fps):
        raise RequestError(
            f"stop must be at least one frame after start ({edit.value('start')} s), "
            f"got {edit.stop}.",
            field="stop",
        )


def _parse_videos(verb: EditVerb, videos: object) -> tuple[str, ...]:
    """The paths of the source videos as strings."""
    if not isinstance(videos, (tuple, list)) or not all(
        isinstance(path, (str, Path)) for path in videos
    ):
        raise RequestError(
            f"videos must be a list of paths, got {videos!r:.60}.",
            hint='Write it like ("one.mp4", "two.mp4").',
            field="videos",
        )
    if not verb.min_videos <= len(videos) <= verb.max_videos:
        count = f"{verb.min_videos}"
        if verb.max_videos > verb.min_videos:
            count = f"{verb.min_videos} to {verb.max_videos}"
        raise RequestError(
            f"videos must have {count} {'path' if count == '1' else 'paths'} for {verb.name}, "
            f"got {len(videos)}.",
            field="videos",
        )
    return tuple(str(path) for path in videos)


def _parse_parameter(verb: EditVerb, name: str, value: object) -> object:
    """A parameter converted to the type of its field."""
    if value is None or value is False:
        return value
    field = verb.field(name)
    if field is None:
        raise RequestError(
            f"{name} is not a parameter of {verb.name}.",
            hint=f"It takes: {', '.join(verb.field_names)}.",
            field=name,
        )
    return _PARSERS[field.kind](field, value)


def _parse_time(field: EditField, value: object) -> str:
    time = parse_clock(str(value)) if _is_number_or_text(value) else None
    if time is None:
        raise _invalid(field.name, "a time in seconds", value, TIME_HINT)
    if field.maximum is not None and time > field.maximum:
        raise _invalid(field.name, f"<= {field.maximum:g} seconds", value)
    return str(value)


def _parse_strength(field: EditField, value: object) -> float:
    try:
        if not _is_number_or_text(value):
            raise ValueError(value)
        strength = STRENGTHS.get(str(value))
        strength = float(str(value)) if strength is None else strength
    except ValueError:
        strength = -1.0
    if not 0 <= strength <= 1:
        raise _invalid(field.name, f"from 0 to 1, or {', '.join(field.choices)}", value)
    return strength


def _parse_integer(field: EditField, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _invalid(field.name, "an integer", value)
    if field.minimum is not None and value < field.minimum:
        raise _invalid(field.name, f">= {field.minimum:g}", value)
    if field.maximum is not None and value > field.maximum:
        raise _invalid(field.name, f"<= {field.maximum:g}", value)
    return value


def _parse_flag(field: EditField, value: object) -> bool:
    if not isinstance(value, bool):
        raise _invalid(field.name, "true or false", value)
    return value


def _parse_text(field: EditField, value: object) -> str:
    if not isinstance(value, str):
        raise _invalid(field.name, "text", value)
    return value


def _parse_size(field: EditField, value: object) -> str:
    parse_size(_parse_text(field, value))
    return str(value)


def _parse_rate(field: EditField, value: object) -> str:
    try:
        if not _is_number_or_text(value):
            raise ValueError(value)
        Fraction(str(value))
    except (ValueError, ZeroDivisionError) as error:
        raise _invalid(field.name, "a number of frames per second", value) from error
    return str(value)


_PARSERS: Mapping[str, Callable[[EditField, object], object]] = {
    "time": _parse_time,
    "strength": _parse_strength,
    "integer": _parse_integer,
    "flag": _parse_flag,
    "text": _parse_text,
    "file": _parse_text,
    "size": _parse_size,
    "rate": _parse_rate,
}


def _is_number_or_text(value: object) -> bool:
    return isinstance(value, (str, int, float)) and not isinstance(value, bool)


def _invalid(name: str, constraint: str, value: object, hint: str | None = None) -> RequestError:
    return RequestError(f"{name} must be {constraint}, got {value!r:.60}.", hint=hint, field=name)
