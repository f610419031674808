"""Server-sent events of a video: one reader of the database per process, any number of viewers.

While at least one viewer is connected, `EventBroadcaster` reads new events once per interval and
puts them into a bounded queue per viewer. A viewer that connects, reconnects with Last-Event-ID, or
is too slow for its queue reads what it missed from the database: no event is skipped.
"""

import asyncio
import json
import logging
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import aclosing, suppress
from enum import Enum
from functools import partial
from typing import Any

from starlette.responses import StreamingResponse

from skyloom.serve.api.response_models import VideoResponse
from skyloom.serve.queue.event_feed import EventFeed, JobUpdate
from skyloom.serve.queue.jobs import Event, Job, NotFoundError

POLL_SECONDS = 0.25
KEEPALIVE_SECONDS = 15.0
MAX_QUEUED_UPDATES = 64  # per viewer
Read = Callable[[Callable[[], Any]], Awaitable[Any]]
"""Runs a database read off the event loop."""
_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}
_KEEPALIVE = ": still here\n\n"
log = logging.getLogger(__name__)


class _Signal(Enum):
    """Queue items besides updates: read the history from the database, or end the stream."""

    RESYNC = "resync"
    CLOSE = "close"


class _Viewer:
    """Queue of one viewer: filled by the broadcaster's thread, read on an event loop."""

    def __init__(self, job: str) -> None:
        self.job = job
        self.closed = False
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[JobUpdate | _Signal] = asyncio.Queue(MAX_QUEUED_UPDATES)

    def put(self, item: JobUpdate | _Signal) -> None:
        """Queue an item from any thread. A full queue is replaced by a RESYNC."""
        with suppress(RuntimeError):  # the event loop is closed
            self._loop.call_soon_threadsafe(self._put, item)

    async def get(self) -> JobUpdate | _Signal | None:
        """Return the next item, or None after KEEPALIVE_SECONDS without one."""
        try:
            return await asyncio.wait_for(self._queue.get(), KEEPALIVE_SECONDS)
        except TimeoutError:
            return None

    def _put(self, item: JobUpdate | _Signal) -> None:
        if self._queue.full():
            while not self._queue.empty():
                self._queue.get_nowait()
            item = item if item is _Signal.CLOSE else _Signal.RESYNC
        self._queue.put_nowait(item)


class EventBroadcaster:
    """Reads new events once per interval and distributes them to the viewers of their jobs.

    The reader is a daemon thread that runs while there are viewers. It ends all streams when
    `stopping` returns True or the database fails; clients then reconnect with Last-Event-ID. `wait`
    is called with the interval in seconds.
    """

    def __init__(
        self,
        feed: EventFeed,
        stopping: Callable[[], bool],
        wait: Callable[[float], object] = time.sleep,
    ) -> None:
        self._feed = feed
        self._stopping = stopping
        self._wait = wait
        self._start_lock = threading.Lock()
        self._lock = threading.Lock()  # of the two fields below; never held during a read
        self._running = False
        self._viewers: set[_Viewer] = set()

    async def follow(
        self, job: Job, after: int, read: Read
    ) -> AsyncGenerator[tuple[Event, Job] | None, None]:
        """Yield the events of a job after a number, each with the job as it is now.

        Yields None after every KEEPALIVE_SECONDS without an event. Ends after the events of a
        finished job, when the job is deleted, and when the server stops.
        """
        if self._stopping():
            return
        history = partial(self._feed.history, job.id, job.owner)
        viewer = _Viewer(job.id)
        try:
            if not job.done:
                await read(partial(self._subscribe, viewer))
            item: JobUpdate | _Signal | None = _Signal.RESYNC
            while item is not _Signal.CLOSE:
                if item is None:
                    yield None
                else:
                    update = await read(partial(history, after)) if item is _Signal.RESYNC else item
                    if update.job is None:
                        return
                    for event in update.events:
                        if event.number > after:
                            after = event.number
                            yield event, update.job
                    if job.done or update.job.done:
                        return
                item = await viewer.get()
        except NotFoundError:  # deleted
            return
        finally:
            self._unsubscribe(viewer)

    def _subscribe(self, viewer: _Viewer) -> None:
        """Add a viewer and start the reader if it does not run."""
        with self._start_lock:
            with self._lock:
                if self._running:
                    self._add(viewer)
                    return
            # read before the viewer reads its history, so that no event is between the two
            cursor = self._feed.newest()
            reader = threading.Thread(
                target=self._run, args=(cursor,), name="event-broadcaster", daemon=True
            )
            with self._lock:
                reader.start()
                self._running = True
                self._add(viewer)

    def _add(self, viewer: _Viewer) -> None:
        if not viewer.closed:  # its client may have gone meanwhile
            self._viewers.add(viewer)

    def _unsubscribe(self, viewer: _Viewer) -> None:
        with self._lock:
            viewer.closed = True
            self._viewers.discard(viewer)

    def _run(self, cursor: int) -> None:
        """Read and distribute the events after `cursor` until there are no viewers."""
        try:
            while True:
                self._wait(POLL_SECONDS)
                viewers = self._current_viewers()
                if not viewers:
                    return
                if self._stopping():
                    break
                cursor, updates = self._feed.poll(cursor, {viewer.job for viewer in viewers})
                self._distribute(updates, viewers)
        except Exception as error:  # clients reconnect, and see the error if it lasts
            name = type(error).__name__
            log.warning("event streams closed: the database failed", extra={"error": name})
        self._close_all()

    def _current_viewers(self) -> Collection[_Viewer]:
        """Return a copy of the viewers; if there are none, the reader counts as stopped."""
        with self._lock:
            self._running = bool(self._viewers)
            return frozenset(self._viewers)

    def _distribute(self, updates: Mapping[str, JobUpdate], polled: Collection[_Viewer]) -> None:
        """Put updates into the queues.

        A viewer that came during the poll may have missed its events: RESYNC.
        """
        with self._lock:
            viewers = frozenset(self._viewers)
        for viewer in viewers:
            if viewer not in polled:
                viewer.put(_Signal.RESYNC)
            elif viewer.job in updates:
                viewer.put(updates[viewer.job])

    def _close_all(self) -> None:
        with self._lock:
            viewers = frozenset(self._viewers)
            self._viewers.clear()
            self._running = False
        for viewer in viewers:
            viewer.put(_Signal.CLOSE)


def stream_events(
    broadcaster: EventBroadcaster, job: Job, after: int, read: Read
) -> StreamingResponse:
    """Respond with the events of a job after a number as text/event-stream."""

    async def lines() -> AsyncIterator[str]:
        async with aclosing(broadcaster.follow(job, after, read)) as items:
            async for item in items:
                yield _KEEPALIVE if item is None else _format(*item)

    return StreamingResponse(lines(), 200, _HEADERS, "text/event-stream")


def _format(event: Event, job: Job) -> str:
    """Serialise an event with the video as it is now."""
    data = {
        "type": event.type,
        "created_at": int(event.created_at),
        "data": event.data,
        "video": VideoResponse.from_job(job).model_dump(),
    }
    text = json.dumps(data, ensure_ascii=False)
    return f"id: {event.number}\nevent: {event.type}\ndata: {text}\n\n"
