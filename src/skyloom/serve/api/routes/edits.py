"""Edits: OpenAI's remix, edits and extensions, and a call for each verb of ours."""

from functools import partial
from typing import Any

from skyloom.serve.api import response_models as answers
from skyloom.serve.api.context import Asked, Call, Reply
from skyloom.serve.api.edit_fields import VERBS, verb_of
from skyloom.serve.api.request_models import EditBody, EditFields, ExtendBody, RemixBody, parse
from skyloom.serve.api.routes.videos import queued

_OWN = ("retake", "inpaint", "recut", "loop", "restyle", "upscale", "interpolate")
_JOINED = ("blend", "stitch")


def remix(asked: Asked) -> Reply:
    """The whole again by another prompt."""
    body = parse(RemixBody, asked.fields)
    return queued(
        asked, asked.services.desk.create_edit(asked.owner, "remix", body, asked.keys(), asked.id)
    )


def edit(asked: Asked) -> Reply:
    """One targeted change, of the video in the body or, under its alias, in the path."""
    body = parse(EditBody, asked.fields)
    return queued(
        asked,
        asked.services.desk.create_edit(
            asked.owner, verb_of(body), body, asked.keys(), asked.path.get("id")
        ),
    )


def extend(asked: Asked) -> Reply:
    """Longer, at either end; the answer is the whole."""
    body = parse(ExtendBody, asked.fields)
    return queued(asked, asked.services.desk.create_edit(asked.owner, "extend", body, asked.keys()))


def edit_by(verb: str, asked: Asked) -> Reply:
    """Any verb of ours."""
    body = parse(EditFields, asked.fields)
    return queued(
        asked,
        asked.services.desk.create_edit(
            asked.owner, verb, body, asked.keys(), asked.path.get("id")
        ),
    )


_VIDEO: dict[str, Any] = {"answer": answers.VideoAnswer, "scope": "write", "faults": (404, 409)}
CALLS = (
    Call("POST", "/v1/videos/edits", edit, "Change one thing of a video.", **_VIDEO, body=EditBody),
    Call(
        "POST", "/v1/videos/extensions", extend, "Make a video longer.", **_VIDEO, body=ExtendBody
    ),
    *(
        Call(
            "POST",
            f"/v1/videos/{verb}",
            partial(edit_by, verb),
            f"{verb.title()}: {VERBS[verb].summary}.",
            **_VIDEO,
            body=EditFields,
        )
        for verb in _JOINED
    ),
    Call(
        "POST",
        "/v1/videos/{id}/remix",
        remix,
        "Make a video again by another prompt.",
        **_VIDEO,
        body=RemixBody,
    ),
    Call(
        "POST",
        "/v1/videos/{id}/edits",
        edit,
        "Change one thing of this video.",
        **_VIDEO,
        body=EditBody,
    ),
    *(
        Call(
            "POST",
            f"/v1/videos/{{id}}/{verb}",
            partial(edit_by, verb),
            f"{verb.title()}: {VERBS[verb].summary}.",
            **_VIDEO,
            body=EditFields,
        )
        for verb in _OWN
    ),
)
