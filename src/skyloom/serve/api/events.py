"""Server-sent events: what happens to a video. A reader that comes back says which event it saw last."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import anyio
from starlette.responses import StreamingResponse

from skyloom.serve.api.response_models import VideoResponse
from skyloom.serve.queue.jobs import Event, Job, JobStore, NotFoundError

LOOK_SECONDS, QUIET_SECONDS = 0.25, 15
Look = Callable[[Callable[[], Any]], Awaitable[Any]]
"""Runs a look at the database off the event loop."""


def stream_events(
    jobs: JobStore, job: Job, after: int, stopping: Callable[[], bool], look: Look
) -> StreamingResponse:
    """The events of a job after a number, until it is done or gone, or the server stops. `look` asks the database."""
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(
        _follow(jobs, job, after, stopping, look), 200, headers, "text/event-stream"
    )


async def _follow(
    jobs: JobStore, job: Job, after: int, stopping: Callable[[], bool], look: Look
) -> AsyncIterator[str]:
    quiet = 0.0
    while not stopping():
        done = job.done
        for event in await look(partial(jobs.events, job.owner, job=job.id, after=after)):
            after, quiet = event.number, 0.0
            yield _lines(event, job)
        if done:
            return
        if quiet >= QUIET_SECONDS:
            quiet = 0.0
            yield ": still here\n\n"
        await anyio.sleep(LOOK_SECONDS)
        quiet += LOOK_SECONDS
        try:
            job = await look(partial(jobs.get, job.id, job.owner))
        except NotFoundError:
            return


def _lines(event: Event, job: Job) -> str:
    """An event with the video as it is now."""
    data = {
        "type": event.type,
        "created_at": int(event.created_at),
        "data": event.data,
        "video": VideoResponse.from_job(job).model_dump(),
    }
    return (
        f"id: {event.number}\nevent: {event.type}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"
    )
