"""Edit verbs of the API: accepted and required fields, and their conversion to a Request's edit.

generate/edit_spec.py validates the result again; errors here use the parameter names of the API.
"""

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
class VerbFields:
    """Parameters of an edit verb.

    `accepted` fields come in addition to the prompt and the sampling fields; `videos` is the range
    (minimum, maximum) of their number.
    """

    summary: str
    accepted: frozenset[str] = frozenset()
    required: frozenset[str] = frozenset()
    videos: tuple[int, int] = (1, 1)


VERBS: Mapping[str, VerbFields] = {
    "remix": VerbFields(
        "generate the whole video again from another prompt",
        frozenset({"strength"}),
        frozenset({"prompt"}),
    ),
    "restyle": VerbFields(
        "render the whole video in another style",
        frozenset({"style", "strength"}),
        frozenset({"style"}),
    ),
    "retake": VerbFields(
        "generate a time range again",
        frozenset({"start", "stop", "strength"}),
        frozenset({"start", "stop"}),
    ),
    "inpaint": VerbFields(
        "generate a region again",
        frozenset({"region", "mask", "feather", "strength"}),
        frozenset({"prompt"}),
    ),
    "extend": VerbFields(
        "continue the video at either end",
        frozenset({"seconds", "backward", "overlap"}),
        frozenset({"seconds"}),
    ),
    "recut": VerbFields(
        "keep a time range and extend it at both ends",
        frozenset({"start", "stop", "seconds", "overlap"}),
        frozenset({"start", "stop", "seconds"}),
    ),
    "loop": VerbFields("make a seamless loop", frozenset({"start", "stop", "bridge"})),
    "upscale": VerbFields(
        "enlarge the frames with a filter", frozenset({"size"}), frozenset({"size"})
    ),
    "interpolate": VerbFields(
        "raise the frame rate with a filter", frozenset({"fps"}), frozenset({"fps"})
    ),
    "blend": VerbFields(
        "cross from one video into another",
        frozenset({"curve", "seconds", "strength"}),
        videos=(2, 2),
    ),
    "stitch": VerbFields(
        "join videos by hard cuts or generated transitions",
        frozenset({"morph"}),
        videos=(2, 20),
    ),
}
_COMMON = frozenset({"prompt", "model", "consent", "video", "videos"})


def verb_of(body: EditFields) -> str:
    """Return the verb of POST /v1/videos/edits.

    It is inpaint with a region or mask, retake with a time range, and remix otherwise.
    """
    if body.region is not None or body.mask is not None:
        return "inpaint"
    return "retake" if body.start is not None and body.stop is not None else "remix"


def check_fields(verb: str, body: EditFields) -> None:
    """Check that every field has an effect and that no required one is missing.

    Raises ApiError.
    """
    fields = VERBS[verb]
    given = {name for name in body.model_fields_set if getattr(body, name) not in (None, "")}
    hard_cut = verb == "stitch" and body.morph == 0
    sampled = not hard_cut and verb not in FILTERS
    unused = given - fields.accepted - _COMMON - (SAMPLING if sampled else frozenset())
    for name in sorted(unused):
        target = "stitch with morph 0" if hard_cut else verb
        message = f"{name} has no effect on {target}. Leave it out."
        raise invalid(name, message, "unsupported_parameter")
    for name in sorted(fields.required - given):
        raise invalid(name, f"Missing required parameter: '{name}'.", "missing_required_parameter")
    if verb == "inpaint" and (body.region is None) == (body.mask is None):
        message = "inpaint needs exactly one of region and mask."
        raise invalid("region", message, "missing_required_parameter")
    if body.start is not None and body.stop is not None and body.stop <= body.start:
        raise invalid("stop", f"stop must be > start ({body.start:g}), got {body.stop:g}.")


def check_source(body: EditFields, size: str, fps: float, seconds: float) -> None:
    """Check the fields against the properties of a source video made by this server.

    Raises ApiError.

    The worker checks other sources when it opens them.
    """
    if body.size is not None:
        width, height = parse_size(body.size)
        source_width, source_height = parse_size(size)
        smaller = width < source_width or height < source_height
        if smaller or (width, height) == (source_width, source_height):
            raise invalid("size", f"size must be larger than the video ({size}), got {body.size}.")
    if body.fps is not None and body.fps <= fps:
        raise invalid("fps", f"fps must be > {fps:g} (of the video), got {body.fps:g}.")
    for name, time in (("start", body.start), ("stop", body.stop)):
        if time is not None and time > seconds + 1 / fps:
            limit = f"{seconds:g} (seconds of the video)"
            raise invalid(name, f"{name} must be <= {limit}, got {time:g}.")


def edit_fields(verb: str, body: EditFields, videos: list[str], mask: str | None) -> dict[str, Any]:
    """Build the `edit` of a Request as plain values; `videos` and `mask` are asset references."""
    edit: dict[str, Any] = {"verb": verb, "videos": videos, "mask": mask}
    for name in sorted(VERBS[verb].accepted - {"mask"}):
        edit[name] = getattr(body, name)
    if body.style is not None:
        edit["style"] = list_styles().get(body.style, body.style)
    return {name: value for name, value in edit.items() if value is not None}
