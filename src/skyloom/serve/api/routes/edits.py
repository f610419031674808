"""Edits: OpenAI's remix, edits and extensions, and a route for each verb of skyloom."""

from collections.abc import Callable

from fastapi import Response

from skyloom.serve.api.dependencies import AppServices, Idempotency, Writer
from skyloom.serve.api.edit_fields import VERBS, verb_of
from skyloom.serve.api.openapi import errors
from skyloom.serve.api.request_models import EditBody, EditFields, ExtendBody, RemixBody
from skyloom.serve.api.response_models import VideoResponse
from skyloom.serve.api.routes.videos import show_new_job
from skyloom.serve.api.routing import make_router

_ONE_VIDEO = ("retake", "inpaint", "recut", "loop", "restyle", "upscale", "interpolate")
_MANY_VIDEOS = ("blend", "stitch")
router = make_router()


@router.post("/v1/videos/edits", responses=errors(404, 409))
def edit_video(
    body: EditBody, caller: Writer, services: AppServices, keys: Idempotency, response: Response
) -> VideoResponse:
    """Change one thing of a video."""
    job = services.desk.edit(caller.owner, verb_of(body), body, keys)
    return show_new_job(services, job, response)


@router.post("/v1/videos/{id}/edits", responses=errors(404, 409))
def edit_video_by_id(
    id: str,
    body: EditBody,
    caller: Writer,
    services: AppServices,
    keys: Idempotency,
    response: Response,
) -> VideoResponse:
    """Change one thing of this video."""
    job = services.desk.edit(caller.owner, verb_of(body), body, keys, id)
    return show_new_job(services, job, response)


@router.post("/v1/videos/extensions", responses=errors(404, 409))
def extend_video(
    body: ExtendBody, caller: Writer, services: AppServices, keys: Idempotency, response: Response
) -> VideoResponse:
    """Make a video longer; the result is the whole."""
    job = services.desk.edit(caller.owner, "extend", body, keys)
    return show_new_job(services, job, response)


@router.post("/v1/videos/{id}/remix", responses=errors(404, 409))
def remix_video(
    id: str,
    body: RemixBody,
    caller: Writer,
    services: AppServices,
    keys: Idempotency,
    response: Response,
) -> VideoResponse:
    """Make a video again by another prompt."""
    job = services.desk.edit(caller.owner, "remix", body, keys, id)
    return show_new_job(services, job, response)


def _edit_one(verb: str) -> Callable[..., VideoResponse]:
    """The handler of a verb for the video in the path."""

    def edit(
        id: str,
        body: EditFields,
        caller: Writer,
        services: AppServices,
        keys: Idempotency,
        response: Response,
    ) -> VideoResponse:
        job = services.desk.edit(caller.owner, verb, body, keys, id)
        return show_new_job(services, job, response)

    return edit


def _edit_many(verb: str) -> Callable[..., VideoResponse]:
    """The handler of a verb for the videos in the body."""

    def edit(
        body: EditFields,
        caller: Writer,
        services: AppServices,
        keys: Idempotency,
        response: Response,
    ) -> VideoResponse:
        job = services.desk.edit(caller.owner, verb, body, keys)
        return show_new_job(services, job, response)

    return edit


for _verb in (*_MANY_VIDEOS, *_ONE_VIDEO):
    _is_one = _verb in _ONE_VIDEO
    router.add_api_route(
        f"/v1/videos/{{id}}/{_verb}" if _is_one else f"/v1/videos/{_verb}",
        _edit_one(_verb) if _is_one else _edit_many(_verb),
        methods=["POST"],
        summary=f"{_verb.title()}: {VERBS[_verb].summary}.",
        responses=errors(404, 409),
    )
