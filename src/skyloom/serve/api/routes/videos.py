"""Videos: make, look, list, download, delete, and hold; OpenAI's calls and those that it never had."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from starlette.responses import Response, StreamingResponse

from skyloom.serve.api import response_models as answers
from skyloom.serve.api.context import PAGE, POLL_AFTER_MS, Asked, Call, Reply
from skyloom.serve.api.errors import WireError, invalid, missing, rate_limit
from skyloom.serve.api.events import stream_events
from skyloom.serve.api.numbers import find_whole
from skyloom.serve.api.ranges import ByteRange, read_range
from skyloom.serve.api.request_models import Body, CreateBody, StoryboardBody, parse
from skyloom.serve.queue.jobs import Job
from skyloom.serve.storage import Asset, AssetStorage

VARIANTS = ("video", "thumbnail", "spritesheet")
_SAFE = "default-src 'none'; sandbox; frame-ancestors 'none'"


def show(job: Job) -> Reply:
    """A job, and when to ask again."""
    return Reply(answers.video(job), headers={"openai-poll-after-ms": str(POLL_AFTER_MS)})


def queued(asked: Asked, job: Job) -> Reply:
    """A job that was made by this call, and how many more the owner may have waiting."""
    jobs, shown = asked.services.jobs, show(job)
    most = jobs.settings.max_queued_per_owner or jobs.settings.max_queued
    told = rate_limit(most, jobs.room(asked.owner))
    return Reply(shown.body, headers={**shown.headers, **told})


def create(asked: Asked) -> Reply:
    """A video by a prompt."""
    return queued(
        asked,
        asked.services.desk.create(asked.owner, parse(CreateBody, asked.fields), asked.keys()),
    )


def storyboard(asked: Asked) -> Reply:
    """A video by cards."""
    return queued(
        asked,
        asked.services.desk.storyboard(
            asked.owner, parse(StoryboardBody, asked.fields), asked.keys()
        ),
    )


def plan(asked: Asked) -> Reply:
    """What a video would take, by the planner that workers use, in a process of its own."""
    request, told = asked.services.desk.plan(parse(CreateBody, asked.fields))
    made = asked.services.outside.plan(request)
    body = {
        "object": "video.plan",
        "model": told.model,
        "size": made["size"],
        "seconds": told.seconds,
    }
    body |= {name: made[name] for name in ("fps", "steps", "guidance", "estimate")}
    return Reply({**body, "cards": made.get("cards", [])})


def retrieve(asked: Asked) -> Reply:
    """How far a video is."""
    return show(asked.services.jobs.get(asked.id, asked.owner))


def list_videos(asked: Asked) -> Reply:
    """A page of the owner's videos."""
    page = asked.page()
    if page.after is not None:
        _check_cursor(asked, page.after)
    rows, more = asked.services.jobs.page(
        asked.owner,
        kind="video",
        after=page.after,
        limit=page.limit,
        newest_first=page.newest_first,
    )
    return Reply(answers.page([answers.video(row) for row in rows], more=more))


def delete(asked: Asked) -> Reply:
    """Gone at once, also when it runs: the worker stops within a step."""
    asked.services.jobs.delete(asked.id, asked.owner)
    return Reply({"id": asked.id, "object": "video.deleted", "deleted": True})


def cancel(asked: Asked) -> Reply:
    """Stop for good."""
    return show(asked.services.jobs.cancel(asked.id, asked.owner))


def pause(asked: Asked) -> Reply:
    """Hold, without losing a step."""
    return show(asked.services.jobs.pause(asked.id, asked.owner))


def resume(asked: Asked) -> Reply:
    """Let a held video go on."""
    return show(asked.services.jobs.resume(asked.id, asked.owner))


def events(asked: Asked) -> Response:
    """What happens to a video, as it happens."""
    job = asked.services.jobs.get(asked.id, asked.owner)
    look = partial(asked.services.gates["events"].run, asked.owner)
    return stream_events(
        asked.services.jobs, job, _last_event(asked), asked.services.draining, look
    )


def content(asked: Asked) -> Response:
    """The file of a finished video, or the part of it that Range names."""
    variant = asked.query.get("variant", "video")
    if variant not in VARIANTS:
        raise invalid("variant", f"variant must be {', '.join(VARIANTS)}.")
    job = asked.services.jobs.get(asked.id, asked.owner)
    asset = _finished(asked, job, variant)
    return send(
        asked, asset, f"{job.id}{'' if variant == 'video' else f'_{variant}'}.{asset.suffix}"
    )


def send(asked: Asked, asset: Asset, name: str) -> Response:
    """A stored file: whole, in part, or not again when the client has it. Nothing that a browser would run."""
    storage, etag = asked.services.storage, f'"{asset.sha256}"'
    headers = {
        "etag": etag,
        "accept-ranges": "bytes",
        "cache-control": "private, max-age=0, must-revalidate",
    }
    headers |= {
        "content-disposition": f'attachment; filename="{name}"',
        "content-security-policy": _SAFE,
    }
    if etag in asked.headers.get("if-none-match", "")[:1_000]:
        return Response(status_code=304, headers=headers)
    size = storage.size(asset)
    wanted = asked.headers.get("range") if asked.headers.get("if-range", etag) == etag else None
    part = read_range(wanted, size)
    if part is None:
        outside = {"content-range": f"bytes */{size}", "accept-ranges": "bytes"}
        raise WireError(
            416, f"The file has {size} bytes.", "range_not_satisfiable", headers=outside
        )
    headers["content-length"] = str(part.length)
    if part.partial:
        headers["content-range"] = part.header
    pieces = asked.services.gates["download"].stream(asked.owner, _read(storage, asset, part))
    return StreamingResponse(pieces, 206 if part.partial else 200, headers, asset.media_type)


def _read(storage: AssetStorage, asset: Asset, part: ByteRange) -> Iterator[bytes]:
    """The bytes, from a file that is opened when the first of them is wanted: a HEAD wants none."""
    yield from storage.read(asset, part.start, part.stop)


def _finished(asked: Asked, job: Job, variant: str) -> Asset:
    """The file of a job that is done and not yet too old. Raises WireError."""
    now = asked.services.database.now()
    if job.status == "expired" or (job.expires_at is not None and job.expires_at <= now):
        raise WireError(410, "The video has expired.", "video_expired")
    if job.status != "completed" or job.result is None:
        again = {"x-should-retry": "false"}
        raise WireError(
            409,
            f"The video is {answers.video(job)['status']}: it has no content.",
            "not_ready",
            headers=again,
        )
    if variant not in job.result.assets:
        raise missing(variant, job.id, "variant")
    return Asset.parse(job.result.assets[variant])


def _check_cursor(asked: Asked, id: str) -> None:
    try:
        asked.services.jobs.get(id, asked.owner)
    except Exception as error:
        raise missing("video", id, "after") from error


def _last_event(asked: Asked) -> int:
    number = find_whole(asked.headers.get("last-event-id", "0"))
    if number is None:
        raise WireError(
            400, "Last-Event-ID must be a number that this stream sent.", "invalid_header"
        )
    return number


class _Nothing(Body):
    """A call without a body."""


_VIDEO: dict[str, Any] = {"answer": answers.VideoAnswer, "scope": "write"}
CALLS = (
    Call(
        "POST", "/v1/videos", create, "Make a video.", **_VIDEO, body=CreateBody, faults=(404, 409)
    ),
    Call(
        "GET",
        "/v1/videos",
        list_videos,
        "List videos.",
        answers.VideoList,
        query=PAGE,
        faults=(404,),
    ),
    Call(
        "POST",
        "/v1/videos/storyboard",
        storyboard,
        "Make a video by cards.",
        **_VIDEO,
        body=StoryboardBody,
        faults=(404, 409),
    ),
    Call(
        "POST",
        "/v1/videos/plan",
        plan,
        "What a video would take.",
        answers.PlanAnswer,
        "write",
        CreateBody,
        kind="plan",
    ),
    Call(
        "GET", "/v1/videos/{id}", retrieve, "Look at a video.", answers.VideoAnswer, faults=(404,)
    ),
    Call(
        "DELETE",
        "/v1/videos/{id}",
        delete,
        "Delete a video; one that runs stops.",
        answers.Deleted,
        "write",
        faults=(404,),
    ),
    Call(
        "GET",
        "/v1/videos/{id}/content",
        content,
        "Download a video.",
        "video/mp4",
        query=("variant",),
        faults=(404, 409, 410, 416),
        kind="download",
    ),
    Call(
        "GET",
        "/v1/videos/{id}/events",
        events,
        "Hear what happens to a video.",
        "text/event-stream",
        faults=(404,),
        kind="stream",
    ),
    Call(
        "POST",
        "/v1/videos/{id}/cancel",
        cancel,
        "Stop a video for good.",
        **_VIDEO,
        body=_Nothing,
        faults=(404,),
    ),
    Call(
        "POST",
        "/v1/videos/{id}/pause",
        pause,
        "Hold a video.",
        **_VIDEO,
        body=_Nothing,
        faults=(404, 409),
    ),
    Call(
        "POST",
        "/v1/videos/{id}/resume",
        resume,
        "Let a held video go on.",
        **_VIDEO,
        body=_Nothing,
        faults=(404, 409),
    ),
)
