"""Storyboards: videos by cards with times."""

from fastapi import Response

from skyloom.serve.api.dependencies import AppServices, Idempotency, Writer
from skyloom.serve.api.openapi import errors
from skyloom.serve.api.request_models import StoryboardBody
from skyloom.serve.api.response_models import VideoResponse
from skyloom.serve.api.routes.videos import show_new_job
from skyloom.serve.api.routing import make_router

router = make_router()


@router.post("/v1/videos/storyboard", responses=errors(404, 409))
def create_storyboard(
    body: StoryboardBody,
    caller: Writer,
    services: AppServices,
    keys: Idempotency,
    response: Response,
) -> VideoResponse:
    """Make a video by cards."""
    job = services.desk.storyboard(caller.owner, body, keys)
    return show_new_job(services, job, response)
