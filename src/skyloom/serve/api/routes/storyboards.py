"""Storyboards: videos by cards with times."""

from skyloom.serve.api.openapi import errors
from skyloom.serve.api.request_models import StoryboardBody
from skyloom.serve.api.response_models import VideoResponse
from skyloom.serve.api.routes.videos import NewJob
from skyloom.serve.api.routing import make_router

router = make_router()


@router.post("/v1/videos/storyboard", responses=errors(404, 409))
def create_storyboard(body: StoryboardBody, new: NewJob) -> VideoResponse:
    """Make a video by cards."""
    return new.show(new.submitter.create_storyboard(new.owner, body, new.options))
