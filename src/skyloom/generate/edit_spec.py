"""Edit: what is to be done to videos that exist. Plain values, so that requests, receipts and jobs can hold it."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from skyloom.core.errors import RequestError
from skyloom.generate.cards import parse_clock

STRENGTHS = {"subtle": 0.5, "mild": 0.7, "strong": 0.85}
CURVES = ("transition", "mix", "sample")
_MANY = 20

# what each verb takes besides its videos and a prompt
VERBS: dict[str, tuple[str, ...]] = {
    "remix": ("strength",),
    "restyle": ("style", "strength"),
    "retake": ("start", "stop", "strength"),
    "inpaint": ("region", "mask", "feather", "strength"),
    "extend": ("seconds", "backward", "overlap"),
    "recut": ("start", "stop", "seconds", "overlap"),
    "loop": ("start", "stop", "bridge"),
    "blend": ("curve", "seconds", "strength"),
    "stitch": ("morph",),
    "upscale": ("size",),
    "interpolate": ("fps",),
}
_NEEDED = {
    "restyle": ("style",),
    "extend": ("seconds",),
    "recut": ("seconds",),
    "upscale": ("size",),
    "interpolate": ("fps",),
}
FILTERS = ("upscale", "interpolate")
_VIDEOS = {"blend": (2, 2), "stitch": (2, _MANY)}
_CLOCKS = ("start", "stop", "seconds", "overlap", "bridge", "morph")
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(_CLOCKS, (str, int, float)),
    "strength": (int, float, str),
    "region": (str,),
    "mask": (str,),
    "feather": (int,),
    "backward": (bool,),
    "curve": (str,),
    "style": (str,),
    "size": (str,),
    "fps": (str, int, float),
    "strict": (bool,),
}


@dataclass(frozen=True)
class Edit:
    """A verb, the videos it works on, and what it is told. Times are seconds ("2.5", "1:02.5", "13/16").

    `strength` says how far what is made may move from its source: 0 (not at all) to 1 (free), or "subtle", "mild",
    "strong". `style` is what a style says, in words. With `strict`, videos that would have to be resampled are refused.
    Values that are wrong, missing, or can have no effect on the verb raise RequestError.
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
        if self.verb not in VERBS:
            near = difflib.get_close_matches(str(self.verb), VERBS, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(VERBS)}."
            raise RequestError(f"There is no edit {self.verb!r}.", hint=hint)
        for name, kinds in _KINDS.items():
            object.__setattr__(self, name, _checked(self.verb, name, getattr(self, name), kinds))
        least, most = _VIDEOS.get(self.verb, (1, 1))
        if not isinstance(self.videos, (tuple, list)) or not all(
            isinstance(one, (str, Path)) for one in self.videos
        ):
            raise RequestError(
                "The videos of an edit are a list of paths.", hint='Like ("one.mp4", "two.mp4").'
            )
        object.__setattr__(self, "videos", tuple(str(one) for one in self.videos))
        if not least <= len(self.videos) <= most:
            wanted = f"{least}" if least == most else f"{least} to {most}"
            raise RequestError(
                f"{self.verb} takes {wanted} videos, not {len(self.videos)}.",
                hint="Name them one by one.",
            )
        for name in _NEEDED.get(self.verb, ()):
            if getattr(self, name) is None:
                raise RequestError(
                    f"{self.verb} needs {name}.", hint="docs/editing.md shows every verb."
                )
        if self.verb == "inpaint" and (self.region is None) == (self.mask is None):
            raise RequestError(
                "inpaint needs a region or a mask, one of them.", hint="Like region 40,40,48,48."
            )

    @property
    def samples(self) -> bool:
        """Whether the model makes any of it; a filter and a hard cut only use what is there."""
        cut = self.verb == "stitch" and self.morph is not None and not parse_clock(self.morph)
        return self.verb not in FILTERS and not cut

    def to_dict(self) -> dict[str, Any]:
        """Plain values; what an edit does not say is left out."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in values.items()
            if value is not None and value is not False
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Edit":
        """The inverse of `to_dict`. Raises RequestError for unknown fields."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise RequestError(
                    f"An edit has no field {name!r}.", hint=f"Fields: {', '.join(known)}."
                )
        for name in ("verb", "videos"):
            if name not in values:
                raise RequestError(
                    f"An edit needs {name}.", hint="docs/editing.md shows every verb."
                )
        return cls(**values)


def _checked(verb: str, name: str, value: object, kinds: tuple[type, ...]) -> object:
    """A field's value as its own kind."""
    if value is None or value is False:
        return value
    if name != "strict" and name not in VERBS[verb]:
        raise RequestError(
            f"{verb} has no use for {name}.", hint=f"It takes: {', '.join(VERBS[verb])}."
        )
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise RequestError(
            f"{name} is {value!r:.60}.",
            hint=f"It must be {' or '.join(kind.__name__ for kind in kinds)}.",
        )
    if name in _CLOCKS:
        if parse_clock(str(value)) is None:
            raise RequestError(
                f"{name}: {value!r:.40} is no time.",
                hint='Write seconds like 2.5, "1:02.5" or "13/16".',
            )
        return str(value)
    if name == "strength":
        return _strength(value)
    if name == "feather" and isinstance(value, int) and value < 0:
        raise RequestError(f"A feather of {value} pixels is none.", hint="Use 0 or more.")
    return str(value) if name == "fps" else value


def _strength(value: object) -> float:
    try:
        strength = (
            STRENGTHS[value] if isinstance(value, str) and value in STRENGTHS else float(str(value))
        )
    except ValueError:
        strength = -1.0
    if not 0 <= strength <= 1:
        raise RequestError(
            f"A strength of {value!r:.40} is none.", hint="Use 0 to 1, subtle, mild or strong."
        )
    return strength
