"""Edit verbs of the wire as the edit that a Request holds (generate/edit_spec.py checks it once more): which fields a verb
takes, and what it cannot do without, told by the wire's own names."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from skyloom.generate.edit_spec import FILTERS
from skyloom.generate.request import parse_size
from skyloom.generate.styles import list_styles
from skyloom.serve.api.errors import invalid
from skyloom.serve.api.request_models import EditFields

SAMPLING = frozenset({"seed", "steps", "guidance", "negative_prompt", "quality"})


@dataclass(frozen=True)
class Verb:
    """A way to edit: the fields that it takes besides prompt and sampling, those it needs, how many videos."""

    summary: str
    takes: frozenset[str] = frozenset()
    needs: frozenset[str] = frozenset()
    videos: tuple[int, int] = (1, 1)


VERBS: Mapping[str, Verb] = {
    "remix": Verb(
        "the whole again by another prompt", frozenset({"strength"}), frozenset({"prompt"})
    ),
    "restyle": Verb(
        "the whole in another style", frozenset({"style", "strength"}), frozenset({"style"})
    ),
    "retake": Verb(
        "a time range again", frozenset({"start", "stop", "strength"}), frozenset({"start", "stop"})
    ),
    "inpaint": Verb(
        "a region again",
        frozenset({"region", "mask", "feather", "strength"}),
        frozenset({"prompt"}),
    ),
    "extend": Verb(
        "go on, at either end",
        frozenset({"seconds", "backward", "overlap"}),
        frozenset({"seconds"}),
    ),
    "recut": Verb(
        "keep the best part, grow both sides",
        frozenset({"start", "stop", "seconds", "overlap"}),
        frozenset({"start", "stop", "seconds"}),
    ),
    "loop": Verb("a seamless loop", frozenset({"start", "stop", "bridge"})),
    "upscale": Verb("larger, by a filter", frozenset({"size"}), frozenset({"size"})),
    "interpolate": Verb("smoother, by a filter", frozenset({"fps"}), frozenset({"fps"})),
    "blend": Verb(
        "cross from one video into another",
        frozenset({"curve", "seconds", "strength"}),
        videos=(2, 2),
    ),
    "stitch": Verb(
        "join videos, hard or with made transitions", frozenset({"morph"}), videos=(2, 20)
    ),
}


def verb_of(body: EditFields) -> str:
    """What OpenAI calls an edit, by the fields it comes with: a region, a time range, or the whole."""
    if body.region is not None or body.mask is not None:
        return "inpaint"
    return "retake" if body.start is not None and body.stop is not None else "remix"


def check_fields(verb: str, body: EditFields) -> None:
    """Raise ApiError for a field that the verb cannot use, or lacks: a setting without effect is an error."""
    known = VERBS[verb]
    given = {name for name in body.model_fields_set if getattr(body, name) not in (None, "")}
    cut = verb == "stitch" and body.morph == 0
    sampling = frozenset[str]() if cut or verb in FILTERS else SAMPLING
    for name in sorted(
        given - known.takes - sampling - {"prompt", "model", "consent", "video", "videos"}
    ):
        raise invalid(
            name,
            f"{name} means nothing to {'a hard cut' if cut else verb}.",
            "unsupported_parameter",
        )
    for name in sorted(known.needs - given):
        raise invalid(name, f"Missing required parameter: '{name}'.", "missing_required_parameter")
    if verb == "inpaint" and (body.region is None) == (body.mask is None):
        raise invalid("region", "Give a region or a mask.", "missing_required_parameter")
    if body.start is not None and body.stop is not None and body.stop <= body.start:
        raise invalid("stop", "stop must be later than start.")


def check_source(body: EditFields, size: str, fps: float, seconds: float) -> None:
    """Raise ApiError for what a video of ours, which is known, does not allow; others are looked at by the worker."""
    if body.size is not None:
        width, height = parse_size(body.size)
        wide, high = parse_size(size)
        if (width, height) == (wide, high) or width < wide or height < high:
            raise invalid("size", f"{body.size} is not larger than the video, {size}.")
    if body.fps is not None and body.fps <= fps:
        raise invalid("fps", f"{body.fps:g} fps are not more than the video's {fps:g}.")
    for name, time in (("start", body.start), ("stop", body.stop)):
        if time is not None and time > seconds + 1 / fps:
            raise invalid(
                name, f"{time:g} s is outside of the video: it is {seconds:g} seconds long."
            )


def edit_fields(verb: str, body: EditFields, videos: list[str], mask: str | None) -> dict[str, Any]:
    """The edit of a Request, as plain values; `videos` and `mask` are references of stored files."""
    told: dict[str, Any] = {"verb": verb, "videos": videos, "mask": mask}
    told |= {name: getattr(body, name) for name in sorted(VERBS[verb].takes) if name != "mask"}
    if body.style is not None:
        told["style"] = list_styles().get(body.style, body.style)
    return {name: value for name, value in told.items() if value is not None}
