# pyright: basic
"""Webhook delivery: send due deliveries on a few threads, sharing them fairly between owners.

A delivery is claimed in the database before it is sent and recorded afterwards, so several
processes may deliver. A delivery interrupted by a stop is due again when its claim ends, under the
same webhook id: every delivery arrives at least once.
"""

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Row, and_, func, select, update
from sqlalchemy.exc import SQLAlchemyError

from skyloom.serve.queue.database import Database, Write
from skyloom.serve.queue.slots import Slots
from skyloom.serve.queue.tables import deliveries, endpoints
from skyloom.serve.queue.webhooks import Post, as_endpoint, send

BACKOFF = (5, 30, 120, 600, 1_800, 3_600, 7_200, 14_400, *[28_800] * 8)  # seconds; 72 h in total
GIVE_UP_SECONDS = 72 * 3_600
MAX_CONCURRENT = 8  # deliveries at once; an endpoint has one
MAX_PER_OWNER = 2
PAUSE_AFTER = 5  # failures in a row of one endpoint
PAUSE_SECONDS = 60.0
MAX_PAUSE_SECONDS = 900.0
_POLL_SECONDS = 2.0
_CLAIM_SECONDS = 60.0  # longer than a request may take
_JOIN_SECONDS = 1.0
_MAX_REMEMBERED = 10_000  # owners, and endpoints
_CLAIMED = [
    *(deliveries.c[name] for name in ("number", "endpoint", "event", "payload", "attempts")),
    deliveries.c.created_at.label("written_at"),
    endpoints,
]

log = logging.getLogger(__name__)


class WebhookSender:
    """Sends due deliveries. The owner with the fewest in progress is next, then the least recent.

    Sends at most `total` at once, `per_owner` of one owner, and one to an endpoint. After
    PAUSE_AFTER failures in a row the deliveries of an endpoint are postponed by a minute, then by
    twice as long each time, up to a quarter of an hour, until one succeeds.
    """

    def __init__(
        self,
        database: Database,
        post: Post,
        *,
        total: int = MAX_CONCURRENT,
        per_owner: int = MAX_PER_OWNER,
    ) -> None:
        self._database = database
        self._post = post
        self._per_owner = per_owner
        self._slots = Slots(total, per_owner)
        self._last_sent: dict[str, float] = {}  # by owner, on the monotonic clock
        self._failures: dict[str, int] = {}  # in a row, by endpoint
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="webhook-sender", daemon=True)

    def start(self) -> "WebhookSender":
        """Start the thread that sends."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """Start no more deliveries; wait a second for those in progress.

        The threads are daemons and do not keep the process alive.
        """
        self._stopping.set()
        self._wake.set()
        self._thread.join(_JOIN_SECONDS)
        self.wait_until_idle(_JOIN_SECONDS)

    def send_due(self) -> int:
        """Start sending due deliveries while there are free slots; return their number."""
        free = self._slots.free
        if not free:
            return 0
        chosen: list[Row[Any]] = []
        started: set[int] = set()
        try:
            for row in sorted(self._find_due(), key=self._order):
                if len(chosen) < free and self._slots.acquire(row.owner, row.endpoint):
                    chosen.append(row)
            for row in self._claim([row.number for row in chosen]):
                threading.Thread(
                    target=self._deliver, args=[row], name="webhook-delivery", daemon=True
                ).start()
                started.add(row.number)
                self._last_sent[row.owner] = time.monotonic()
        finally:  # release the slots of those that another process claimed or that did not start
            for row in chosen:
                if row.number not in started:
                    self._slots.release(row.owner, row.endpoint)
        _drop_oldest(self._last_sent)
        return len(started)

    def wait_until_idle(self, seconds: float) -> bool:
        """Wait until nothing is being sent, at most `seconds`; return whether that happened."""
        return self._slots.wait_until_idle(seconds)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                self.send_due()
            except (SQLAlchemyError, RuntimeError) as error:  # no database, or no more threads
                log.warning("webhooks wait", extra={"cause": type(error).__name__})
            self._wake.wait(_POLL_SECONDS)

    def _find_due(self) -> Sequence[Row[Any]]:
        """Find the first due delivery of each endpoint, at most `per_owner` of each owner."""
        first = func.row_number().over(
            partition_by=deliveries.c.endpoint, order_by=[deliveries.c.next_at]
        )
        columns = (deliveries.c.number, deliveries.c.endpoint, deliveries.c.next_at)
        query = select(*columns, endpoints.c.owner, first.label("first")).join(endpoints)
        idle = deliveries.c.endpoint.not_in(self._slots.resources)
        due = query.where(_is_due(self._database.now()), idle).subquery()
        rank = func.row_number().over(partition_by=due.c.owner, order_by=[due.c.next_at])
        ranked = select(due, rank.label("rank")).where(due.c.first == 1).subquery()
        with self._database.read() as connection:
            return connection.execute(select(ranked).where(ranked.c.rank <= self._per_owner)).all()

    def _order(self, row: Row[Any]) -> tuple[int, float, float]:
        in_progress = self._slots.count(row.owner) + row.rank
        return (in_progress, self._last_sent.get(row.owner, 0.0), row.next_at)

    def _claim(self, numbers: Sequence[int]) -> Sequence[Any]:
        """Claim those deliveries that are still due; return them with their endpoints."""
        if not numbers:
            return []
        query = select(*_CLAIMED).join(endpoints)
        with self._database.write() as write:
            due = (deliveries.c.number.in_(numbers), _is_due(write.now))
            rows = write.connection.execute(query.where(*due)).all()
            claim = update(deliveries).where(deliveries.c.number.in_([row.number for row in rows]))
            write.connection.execute(claim.values(next_at=write.now + _CLAIM_SECONDS))
        return rows

    def _deliver(self, row: Row[Any]) -> None:
        """Send a delivery and record the response."""
        try:
            now = self._database.now()
            secrets = as_endpoint(row).signing_secrets(now)
            self._record(row, send(self._post, row.url, secrets, row.payload, now))
        except Exception as error:  # it is due again when its claim ends
            details = {"event": row.event, "cause": type(error).__name__}
            log.warning("a webhook delivery was not recorded", extra=details)
        finally:
            self._slots.release(row.owner, row.endpoint)
            self._wake.set()

    def _record(self, row: Row[Any], status: int) -> None:
        """Record a response. A `next_at` of None means that the delivery has ended."""
        succeeded = 200 <= status < 300  # noqa: PLR2004
        failures = 0 if succeeded else self._failures.get(row.endpoint, 0) + 1
        self._failures[row.endpoint] = failures
        _drop_oldest(self._failures)
        pause = _pause_seconds(failures)
        attempts = row.attempts + 1
        with self._database.write() as write:
            expired = attempts > len(BACKOFF) or row.written_at <= write.now - GIVE_UP_SECONDS
            next_at = None
            if not succeeded and not expired:
                next_at = write.now + max(BACKOFF[row.attempts], pause)
            change = update(deliveries).where(deliveries.c.number == row.number)
            values = {"attempts": attempts, "status_code": status, "next_at": next_at}
            write.connection.execute(change.values(**values))
            if pause:
                _postpone(write, row.endpoint, write.now + pause)
        if pause:
            details = {"endpoint": row.endpoint, "seconds": pause}
            log.warning("deliveries to a webhook endpoint are postponed", extra=details)


def _is_due(now: float) -> ColumnElement[bool]:
    return deliveries.c.next_at <= now


def _pause_seconds(failures: int) -> float:
    """Return how long an endpoint is paused after so many failures in a row."""
    doublings = min(10, failures - PAUSE_AFTER)
    return 0.0 if doublings < 0 else min(MAX_PAUSE_SECONDS, PAUSE_SECONDS * 2**doublings)


def _postpone(write: Write, endpoint: str, until: float) -> None:
    """Move the deliveries of an endpoint that are due before a time to that time."""
    sooner = and_(deliveries.c.endpoint == endpoint, deliveries.c.next_at < until)
    write.connection.execute(update(deliveries).where(sooner).values(next_at=until))


def _drop_oldest(table: dict[str, Any]) -> None:
    """Delete the first entries of a dict that has more than _MAX_REMEMBERED."""
    while len(table) > _MAX_REMEMBERED:
        del table[next(iter(table))]
