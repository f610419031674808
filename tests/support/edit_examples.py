"""Valid fields of every edit verb, from EDIT_VERBS: a new verb is tested without a new row."""

from typing import Any

from skyloom.generate.edit_verbs import EDIT_VERBS

_VALUES: dict[str, Any] = {  # by name of a field
    "start": 0.5,
    "stop": 1.0,
    "seconds": 1.5,
    "style": "at night",
    "region": "8,8,16,16@0.5-1",
    "size": "64x64",
    "fps": 32.0,
}
_ALSO_GIVEN = {"start", "stop", "region"}  # besides required fields, wherever a verb has them


def example_fields(verb: str) -> dict[str, Any]:
    """Fields for sources of more than a second, smaller than 64x64, of less than 32 frames/s."""
    found = EDIT_VERBS[verb]
    names = [name for name in found.field_names if name in _ALSO_GIVEN.union(found.required)]
    return {name: _VALUES[name] for name in names}


def example_edit(verb: str, first: str, *others: str, **fields: Any) -> dict[str, Any]:
    """An edit as plain values; `others` are the further videos of verbs that take several."""
    videos = [first, *others][: EDIT_VERBS[verb].max_videos]
    return {"verb": verb, "videos": videos, **example_fields(verb), **fields}
