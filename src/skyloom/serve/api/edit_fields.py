"""Validation of an edit's fields against generate/edit_verbs.py; conversion to a Request's edit.

generate/edit_spec.py validates the result again; errors here use the parameter names of the API.
"""

from typing import Any

from skyloom.generate.edit_verbs import EDIT_VERBS
from skyloom.generate.request import parse_size
from skyloom.generate.styles import list_styles
from skyloom.serve.api.errors import invalid
from skyloom.serve.api.request_models import EditFields

SAMPLING = frozenset({"seed", "steps", "guidance", "negative_prompt", "quality", "loras"})


# required by the API in addition to EDIT_VERBS: a client names both ends of a range
_RANGE = frozenset({"start", "stop"})
_ALSO_REQUIRED = {"retake": _RANGE, "recut": _RANGE}
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
    spec = EDIT_VERBS[verb]
    given = {name for name in body.model_fields_set if getattr(body, name) not in (None, "", [])}
    hard_cut = verb == "stitch" and body.morph == 0
    sampled = spec.uses_model and not hard_cut
    unused = given - set(spec.field_names) - _COMMON - (SAMPLING if sampled else frozenset())
    for name in sorted(unused):
        target = "stitch with morph 0" if hard_cut else verb
        message = f"{name} must be left out for {target}: it has no effect."
        raise invalid(name, message, "unsupported_parameter")
    for name in sorted({*spec.required, *_ALSO_REQUIRED.get(verb, ())} - given):
        raise invalid(name, f"Missing required parameter: '{name}'.", "missing_required_parameter")
    if verb == "inpaint" and (body.region is None) == (body.mask is None):
        message = "Either region or mask must be given for inpaint, and not both."
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


def build_edit(verb: str, body: EditFields, videos: list[str], mask: str | None) -> dict[str, Any]:
    """Build the `edit` of a Request as plain values; `videos` and `mask` are asset references."""
    edit: dict[str, Any] = {"verb": verb, "videos": videos, "mask": mask}
    for name in sorted(set(EDIT_VERBS[verb].field_names) - {"mask"}):
        edit[name] = getattr(body, name)
    if body.style is not None:
        edit["style"] = list_styles().get(body.style, body.style)
    return {name: value for name, value in edit.items() if value is not None}
