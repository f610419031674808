"""Edits: OpenAI's remix, edits and extensions, and a route for each verb of skyloom."""

from collections.abc import Callable

from skyloom.generate.edit_verbs import EDIT_VERBS
from skyloom.serve.api.edit_fields import verb_of
from skyloom.serve.api.openapi import errors
from skyloom.serve.api.request_models import EditBody, EditFields, ExtendBody, RemixBody
from skyloom.serve.api.response_models import VideoResponse
from skyloom.serve.api.routes.videos import NewJob
from skyloom.serve.api.routing import make_router

_OPENAI_VERBS = ("remix", "extend")  # have routes of their own
_ERRORS = errors(404, 409)
router = make_router()


@router.post("/v1/videos/edits", responses=_ERRORS)
def edit_video(body: EditBody, new: NewJob) -> VideoResponse:
    """Change one thing of a video."""
    return new.show(new.submitter.create_edit(new.owner, verb_of(body), body, new.options))


@router.post("/v1/videos/{id}/edits", responses=_ERRORS)
def edit_video_by_id(id: str, body: EditBody, new: NewJob) -> VideoResponse:
    """Change one thing of this video."""
    return new.show(new.submitter.create_edit(new.owner, verb_of(body), body, new.options, id))


@router.post("/v1/videos/extensions", responses=_ERRORS)
def extend_video(body: ExtendBody, new: NewJob) -> VideoResponse:
    """Make a video longer; the result is the whole."""
    return new.show(new.submitter.create_edit(new.owner, "extend", body, new.options))


@router.post("/v1/videos/{id}/remix", responses=_ERRORS)
def remix_video(id: str, body: RemixBody, new: NewJob) -> VideoResponse:
    """Make a video again by another prompt."""
    return new.show(new.submitter.create_edit(new.owner, "remix", body, new.options, id))


def _edit_one(verb: str) -> Callable[..., VideoResponse]:
    """The handler of a verb for the video in the path."""

    def edit(id: str, body: EditFields, new: NewJob) -> VideoResponse:
        return new.show(new.submitter.create_edit(new.owner, verb, body, new.options, id))

    return edit


def _edit_many(verb: str) -> Callable[..., VideoResponse]:
    """The handler of a verb for the videos in the body."""

    def edit(body: EditFields, new: NewJob) -> VideoResponse:
        return new.show(new.submitter.create_edit(new.owner, verb, body, new.options))

    return edit


for _verb in EDIT_VERBS.values():
    if _verb.name not in _OPENAI_VERBS:
        _is_one = _verb.max_videos == 1
        router.add_api_route(
            f"/v1/videos/{{id}}/{_verb.name}" if _is_one else f"/v1/videos/{_verb.name}",
            _edit_one(_verb.name) if _is_one else _edit_many(_verb.name),
            methods=["POST"],
            summary=_verb.summary,
            responses=_ERRORS,
        )
