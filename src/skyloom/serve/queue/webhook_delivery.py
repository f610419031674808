"""Delivery of webhooks: what is due is sent on a few threads of its own, in turns of owners, until it is heard.

A delivery is claimed in the database before it is sent and noted after, so any number of processes may deliver. One
that a stop interrupts is due again when its claim ends, under the same webhook id: it arrives at least once.
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

BACKOFF = (
    5,
    30,
    120,
    600,
    1_800,
    3_600,
    7_200,
    14_400,
    *[28_800] * 8,
)  # seconds; 72 hours and a little in all
GIVE_UP_SECONDS = 72 * 3_600
TOTAL, PER_OWNER = 8, 2  # deliveries at once; an endpoint has one
PAUSE_AFTER, PAUSE_SECONDS, LONGEST_PAUSE = 5, 60.0, 900.0
_LOOK_SECONDS = 2.0
_CLAIM_SECONDS = 60.0  # in which nobody else tries the same delivery; longer than a call may take
_JOIN_SECONDS = 1.0
_MOST_REMEMBERED = 10_000  # owners and endpoints
_DELIVERY = [deliveries.c[name] for name in ("number", "endpoint", "event", "payload", "attempts")]
_DELIVERY += [deliveries.c.created_at.label("written_at")]

log = logging.getLogger(__name__)


class Courier:
    """Sends deliveries that are due. The owner with the fewest in hand is next, then who was served longest ago.

    At most `total` at once, `per_owner` of one owner, and one to an endpoint. What waits for an endpoint that has
    failed PAUSE_AFTER times in a row is put off for a minute, then for twice as long each time, up to a quarter of an
    hour, until one delivery is heard.
    """

    def __init__(
        self, database: Database, post: Post, *, total: int = TOTAL, per_owner: int = PER_OWNER
    ) -> None:
        self._database, self._post, self._per_owner = database, post, per_owner
        self._slots = Slots(total, per_owner)
        self._served: dict[str, float] = {}
        self._failures: dict[str, int] = {}
        self._over, self._wake = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="courier", daemon=True)

    def start(self) -> "Courier":
        """Begin; what is due is sent at once."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """Begin nothing more. What is not sent within a second is left behind: its threads do not keep the process
        alive."""
        self._over.set()
        self._wake.set()
        self._thread.join(_JOIN_SECONDS)
        self.settle(_JOIN_SECONDS)

    def start_due(self) -> int:
        """Begin deliveries that are due, as far as there is room; how many."""
        free = self._slots.free
        if not free:
            return 0
        chosen: list[Row[Any]] = []
        begun: set[int] = set()
        try:
            for row in sorted(self._due(), key=self._turn):
                if len(chosen) < free and self._slots.take(row.owner, row.endpoint):
                    chosen.append(row)
            for row in self._claim([row.number for row in chosen]):
                threading.Thread(
                    target=self._deliver, args=[row], name="delivery", daemon=True
                ).start()
                begun.add(row.number)
                self._served[row.owner] = time.monotonic()
        finally:  # of those that another process has, or that could not begin
            for row in chosen:
                if row.number not in begun:
                    self._slots.give_back(row.owner, row.endpoint)
        _forget_some(self._served)
        return len(begun)

    def settle(self, seconds: float) -> bool:
        """Wait until nothing is being sent; whether that came about in time."""
        return self._slots.settle(seconds)

    def _run(self) -> None:
        while not self._over.is_set():
            self._wake.clear()
            try:
                self.start_due()
            except (
                SQLAlchemyError,
                RuntimeError,
            ) as error:  # an absent database, or no more threads
                log.warning("webhooks wait", extra={"cause": type(error).__name__})
            self._wake.wait(_LOOK_SECONDS)

    def _due(self) -> Sequence[Row[Any]]:
        """The first due delivery of each endpoint, for each owner as many as she may have in hand."""
        turn = func.row_number().over(
            partition_by=deliveries.c.endpoint, order_by=[deliveries.c.next_at]
        )
        look = select(
            deliveries.c.number, deliveries.c.endpoint, deliveries.c.next_at, endpoints.c.owner
        )
        look = look.add_columns(turn.label("turn")).join(endpoints)
        due = look.where(
            _is_due(self._database.now()), deliveries.c.endpoint.not_in(self._slots.things)
        ).subquery()
        place = func.row_number().over(partition_by=due.c.owner, order_by=[due.c.next_at])
        ranked = select(due, place.label("place")).where(due.c.turn == 1).subquery()
        with self._database.read() as connection:
            return connection.execute(select(ranked).where(ranked.c.place <= self._per_owner)).all()

    def _turn(self, row: Row[Any]) -> tuple[int, float, float]:
        return (
            self._slots.of_owner(row.owner) + row.place,
            self._served.get(row.owner, 0.0),
            row.next_at,
        )

    def _claim(self, numbers: Sequence[int]) -> Sequence[Row[Any]]:
        """Those that are still due, each with its endpoint; nobody else takes them for a minute."""
        if not numbers:
            return []
        whole = (
            select(*_DELIVERY, endpoints).join(endpoints).where(deliveries.c.number.in_(numbers))
        )
        with self._database.write() as write:
            rows = write.connection.execute(whole.where(_is_due(write.now))).all()
            mine = deliveries.c.number.in_([row.number for row in rows])
            write.connection.execute(
                update(deliveries).where(mine).values(next_at=write.now + _CLAIM_SECONDS)
            )
        return rows

    def _deliver(self, row: Row[Any]) -> None:
        """Send one and note what came of it."""
        try:
            now = self._database.now()
            status = send(self._post, row.url, as_endpoint(row).signing(now), row.payload, now)
            self._note(row, 200 <= status < 300, status)  # noqa: PLR2004
        except Exception as error:  # whatever it is, it is due again when its claim ends
            log.warning(
                "a webhook was not noted", extra={"event": row.event, "cause": type(error).__name__}
            )
        finally:
            self._slots.give_back(row.owner, row.endpoint)
            self._wake.set()

    def _note(self, row: Row[Any], heard: bool, status: int) -> None:
        """What came of a delivery; None for `next_at` means that it is over."""
        self._failures[row.endpoint] = 0 if heard else self._failures.get(row.endpoint, 0) + 1
        pause = _pause(self._failures[row.endpoint])
        _forget_some(self._failures)
        with self._database.write() as write:
            tried = row.attempts + 1
            over = heard or tried > len(BACKOFF) or row.written_at <= write.now - GIVE_UP_SECONDS
            next_at = None if over else write.now + max(BACKOFF[row.attempts], pause)
            values = {"attempts": tried, "status_code": status, "next_at": next_at}
            write.connection.execute(
                update(deliveries).where(deliveries.c.number == row.number).values(**values)
            )
            if pause:
                _put_off(write, row.endpoint, write.now + pause)
        if pause:
            log.warning(
                "deliveries to a webhook endpoint are put off",
                extra={"endpoint": row.endpoint, "seconds": pause},
            )


def _is_due(now: float) -> ColumnElement[bool]:
    return deliveries.c.next_at <= now


def _pause(failures: int) -> float:
    """How long an endpoint is left alone after so many failures in a row, in seconds."""
    doubled = min(10, failures - PAUSE_AFTER)
    return 0.0 if doubled < 0 else min(LONGEST_PAUSE, PAUSE_SECONDS * 2**doubled)


def _put_off(write: Write, endpoint: str, until: float) -> None:
    """Nothing is sent to an endpoint before a time."""
    sooner = and_(deliveries.c.endpoint == endpoint, deliveries.c.next_at < until)
    write.connection.execute(update(deliveries).where(sooner).values(next_at=until))


def _forget_some(remembered: dict[str, Any]) -> None:
    """Drop the oldest rows of a table that grows."""
    while len(remembered) > _MOST_REMEMBERED:
        del remembered[next(iter(remembered))]
