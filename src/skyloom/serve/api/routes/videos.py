"""Videos: create, list, download, delete, and control while they run."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from fastapi import Depends, Request, Response
from fastapi.responses import StreamingResponse

from skyloom.serve.api.dependencies import (
    AppServices,
    Cursor,
    Idempotency,
    Order,
    PageSize,
    Reader,
    Services,
    Writer,
    hold_stream_place,
)
from skyloom.serve.api.downloads import send_asset
from skyloom.serve.api.errors import ApiError, missing, rate_limit
from skyloom.serve.api.events import stream_events
from skyloom.serve.api.numbers import find_whole
from skyloom.serve.api.openapi import content, errors
from skyloom.serve.api.request_models import CreateVideoBody, EmptyBody
from skyloom.serve.api.response_models import (
    DeletedResponse,
    PlanResponse,
    VideoList,
    VideoResponse,
)
from skyloom.serve.api.routing import limit, make_router
from skyloom.serve.api.submit import JobSubmitter, SubmitOptions
from skyloom.serve.queue.errors import NotFoundError
from skyloom.serve.queue.jobs import Job, JobStore
from skyloom.serve.storage.folder import Asset

POLL_AFTER_MS = 500
Variant = Literal["video", "thumbnail", "spritesheet"]
router = make_router()


def show_job(job: Job, response: Response) -> VideoResponse:
    """A job, with the header that says when to poll again."""
    response.headers["openai-poll-after-ms"] = str(POLL_AFTER_MS)
    return VideoResponse.from_job(job)


@dataclass(frozen=True)
class Submission:
    """Arguments of a route that makes a job."""

    owner: str
    submitter: JobSubmitter
    jobs: JobStore
    options: SubmitOptions
    response: Response

    def show(self, job: Job) -> VideoResponse:
        """The new job, with headers about how many more may wait."""
        settings = self.jobs.settings
        max_jobs = settings.max_queued_per_owner or settings.max_queued
        self.response.headers.update(rate_limit(max_jobs, self.jobs.room(self.owner)))
        return show_job(job, self.response)


async def get_submission(
    caller: Writer, services: AppServices, options: Idempotency, response: Response
) -> Submission:
    """Dependency of the routes that make a job."""
    return Submission(caller.owner, services.submitter, services.jobs, options, response)


NewJob = Annotated[Submission, Depends(get_submission)]


@router.post("/v1/videos", responses=errors(404, 409))
def create_video(body: CreateVideoBody, new: NewJob) -> VideoResponse:
    """Make a video."""
    return new.show(new.submitter.create_video(new.owner, body, new.options))


@router.get("/v1/videos", responses=errors(404))
def list_videos(
    caller: Reader,
    services: AppServices,
    after: Cursor = None,
    limit: PageSize = 20,
    order: Order = "desc",
) -> VideoList:
    """List videos."""
    if after is not None:
        _check_cursor(services, caller.owner, after)
    rows, has_more = services.jobs.page(
        caller.owner, kind="video", after=after, limit=limit, newest_first=order == "desc"
    )
    return VideoList.from_rows([VideoResponse.from_job(row) for row in rows], has_more=has_more)


@router.post("/v1/videos/plan")
@limit("plan")
def plan_video(body: CreateVideoBody, caller: Writer, services: AppServices) -> PlanResponse:
    """Estimate what a video would take.

    The workers' planner does it, in a process of its own.
    """
    request, details = services.submitter.plan(body)
    plan = services.effects.plan(request)
    return PlanResponse(
        model=details.model,
        size=plan["size"],
        seconds=details.seconds,
        fps=plan["fps"],
        steps=plan["steps"],
        guidance=plan["guidance"],
        estimate=plan["estimate"],
        cards=plan.get("cards", []),
    )


@router.get("/v1/videos/{id}", responses=errors(404))
def get_video(id: str, caller: Reader, services: AppServices, response: Response) -> VideoResponse:
    """Get a video."""
    return show_job(services.jobs.get(id, caller.owner), response)


@router.delete("/v1/videos/{id}", responses=errors(404))
def delete_video(id: str, caller: Writer, services: AppServices) -> DeletedResponse:
    """Delete a video; a running one stops within a step."""
    services.jobs.delete(id, caller.owner)
    return DeletedResponse(id=id, object="video.deleted")


@router.get(
    "/v1/videos/{id}/content",
    response_class=Response,
    responses={
        **content("video/mp4", "image/webp", "image/jpeg", ranges=True),
        **errors(409, 410),
    },
)
@limit("download")
def get_video_content(
    id: str,
    request: Request,
    caller: Reader,
    services: AppServices,
    variant: Variant = "video",
) -> Response:
    """Download a video, its thumbnail or its spritesheet."""
    job = services.jobs.get(id, caller.owner)
    asset = _finished_asset(services, job, variant)
    suffix = "" if variant == "video" else f"_{variant}"
    filename = f"{job.id}{suffix}.{asset.suffix}"
    return send_asset(request, services, caller.owner, asset, filename)


@router.get(
    "/v1/videos/{id}/events",
    response_class=StreamingResponse,
    responses={**content("text/event-stream"), **errors(404)},
    dependencies=[Depends(hold_stream_place)],
)
def stream_video_events(
    id: str, request: Request, caller: Reader, services: AppServices
) -> Response:
    """Stream the events of a video (server-sent events)."""
    job = services.jobs.get(id, caller.owner)
    after = find_whole(request.headers.get("last-event-id", "0"))
    if after is None:
        message = "Last-Event-ID must be a number that this stream sent."
        raise ApiError(400, message, "invalid_header")
    run = partial(services.limiters["events"].run, caller.owner)
    stream = stream_events(services.events, job, after, run)
    if request.method == "HEAD":
        return Response(headers=dict(stream.headers))
    return stream


@router.post("/v1/videos/{id}/cancel", responses=errors(404))
def cancel_video(
    id: str, body: EmptyBody, caller: Writer, services: AppServices, response: Response
) -> VideoResponse:
    """Stop a video for good."""
    return show_job(services.jobs.cancel(id, caller.owner), response)


@router.post("/v1/videos/{id}/pause", responses=errors(404, 409))
def pause_video(
    id: str, body: EmptyBody, caller: Writer, services: AppServices, response: Response
) -> VideoResponse:
    """Pause a video; no step is lost."""
    return show_job(services.jobs.pause(id, caller.owner), response)


@router.post("/v1/videos/{id}/resume", responses=errors(404, 409))
def resume_video(
    id: str, body: EmptyBody, caller: Writer, services: AppServices, response: Response
) -> VideoResponse:
    """Resume a paused video."""
    return show_job(services.jobs.resume(id, caller.owner), response)


def _finished_asset(services: Services, job: Job, variant: Variant) -> Asset:
    """The file of a completed job. Raises ApiError (404, 409, 410)."""
    now = services.database.now()
    if job.status == "expired" or (job.expires_at is not None and job.expires_at <= now):
        raise ApiError(410, "The video has expired.", "video_expired")
    if job.status != "completed" or job.result is None:
        status = VideoResponse.from_job(job).status
        message = f"The video is {status}: it has no content."
        raise ApiError(409, message, "not_ready", headers={"x-should-retry": "false"})
    if variant not in job.result.assets:
        raise missing(variant, job.id, "variant")
    return Asset.parse(job.result.assets[variant])


def _check_cursor(services: Services, owner: str, id: str) -> None:
    try:
        services.jobs.get(id, owner)
    except NotFoundError as error:
        raise missing("video", id, "after") from error
