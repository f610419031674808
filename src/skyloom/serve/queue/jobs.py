"""Jobs: what clients do with them. A job is a row; it survives everything that the database survives.

    queued -> in_progress -> completed | failed        queued, in_progress <-> paused
       all that are not done -> cancelled              completed -> expired (its result is dropped)

A job runs at least once and has one result at most: workers hold a lease, and every write of theirs carries its token
(leases.py). `JobStore` is every client's side: submit, look, cancel, pause, resume, retry, delete.
"""

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, bindparam, delete, func, insert, select

from skyloom.core.errors import CapacityError
from skyloom.serve.queue.attempts import Attempt, forget_attempts, list_attempts
from skyloom.serve.queue.database import MAX_PAGE, Database, Write, read_page
from skyloom.serve.queue.job import (
    COLUMNS,
    WHOLE_JOBS,
    Job,
    JobConflictError,
    JobFailure,
    JobResult,
    MissingJobError,
    Status,
    Wanted,
    as_job,
    change,
    level_up,
    one_job,
    read_job,
    settle,
    tell,
    usual_seconds,
)
from skyloom.serve.queue.moderation_counters import count_refusal, read_refusals
from skyloom.serve.queue.quotas import Quotas
from skyloom.serve.queue.tables import (
    IS_ACTIVE,
    events,
    has_status,
    job_counts,
    jobs,
    keys,
    results,
    workers,
)
from skyloom.serve.settings import Settings
from skyloom.serve.storage import find_references

__all__ = [
    "Counts",
    "Event",
    "Job",
    "JobConflictError",
    "JobFailure",
    "JobResult",
    "JobStore",
    "MissingJobError",
]

KEY_SECONDS, RETRY_SECONDS = 24 * 3600, 60
MAX_RETRY_AFTER = 120  # seconds; clients do not wait longer
ALIVE_SECONDS = 60  # a worker that was not seen for longer is not counted
REFERENCE_ROWS = 200  # jobs read at a time where all of them are looked through

_ADD = insert(jobs).returning(*COLUMNS)
_ADD_KEY = insert(keys)
_BY_KEY = select(keys).where(keys.c.owner == bindparam("who"), keys.c.key == bindparam("which"))
_WAITING = (
    select(jobs.c.owner, func.count(), func.sum(jobs.c.cost))
    .where(IS_ACTIVE)
    .group_by(jobs.c.owner)
)
_BY_ID_OF_OWNER = WHOLE_JOBS.where(
    jobs.c.id == bindparam("id"), jobs.c.owner == bindparam("who"), ~jobs.c.deleted
)
_BY_ID = WHOLE_JOBS.where(jobs.c.id == bindparam("id"), ~jobs.c.deleted)
_NEWEST_OF_FINGERPRINT = (
    select(jobs.c.number, jobs.c.created_at)
    .where(jobs.c.owner == bindparam("who"), jobs.c.fingerprint == bindparam("what"))
    .order_by(jobs.c.number.desc())
    .limit(1)
)
_NAMING = (
    select(jobs.c.number, results.c.assets, jobs.c.checkpoint, jobs.c.request, jobs.c.extra)
    .outerjoin(results, results.c.job == jobs.c.number)
    .where(jobs.c.number > bindparam("after"))
    .order_by(jobs.c.number)
    .limit(REFERENCE_ROWS)
)


class QueueFullError(CapacityError):
    """No more jobs may wait than `limit`."""

    def __init__(self, message: str, *, hint: str, retry_after: float, limit: int) -> None:
        super().__init__(message, hint=hint, retry_after=retry_after)
        self.limit = limit


@dataclass(frozen=True)
class Event:
    """Something that happened to a job; numbers grow, so a reader can go on after the last one that it saw."""

    number: int
    job: str
    type: str
    data: Mapping[str, Any]
    created_at: float


@dataclass(frozen=True)
class Counts:
    """The queue at a glance: jobs by status, seconds that the oldest has waited, workers seen within a minute."""

    by_status: Mapping[str, int]
    oldest_seconds: float
    workers: int


class JobStore:
    """The clients' side of the queue. Every method is one transaction: what it returned is on disk.

    With an `owner` a method sees that owner's jobs only, and raises MissingJobError for all others; None sees all.
    """

    def __init__(self, database: Database, settings: Settings) -> None:
        self.database = database
        self.settings = settings
        self._quotas = Quotas(settings)

    def submit(
        self,
        request: Mapping[str, Any],
        *,
        owner: str,
        kind: str = "video",
        key: str | None = None,
        fingerprint: str | None = None,
        retry_count: int = 0,
        priority: int = 0,
        cost: float = 1.0,
        deadline: float | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Job:
        """Put a job in the queue, or give back the one that this call has made already.

        `fingerprint` is a hash of what was asked. An idempotency `key` is kept for 24 hours: with the same
        fingerprint it gives the same job, with another it raises JobConflictError. Without a key, a client's retry
        (`retry_count` > 0) within a minute gives the newest job of its fingerprint. A higher `priority` goes first
        among the owner's own jobs; `cost` is what it counts for in the owner's fair share; a job that has not begun
        at `deadline` expires. Raises QueueFullError or QuotaError when the queue, or the owner's part of it,
        is full.
        """
        row = {"owner": owner, "kind": kind, "request": dict(request), "extra": dict(extra or {})}
        row |= {
            "id": f"{kind}_{secrets.token_hex(16)}",
            "status": "queued",
            "fingerprint": fingerprint,
        }
        row |= {"priority": priority, "cost": cost, "deadline": deadline, "checkpoint": {}}

        def add(write: Write) -> Job:
            number = self._made_already(write, owner, key, fingerprint, retry_count)
            if number is not None:
                return read_job(write.connection, number)
            self._make_room(write, owner, cost)
            job = as_job(write.connection.execute(_ADD, {**row, "created_at": write.now}).one())
            if key is not None:
                link = {
                    "owner": owner,
                    "key": key,
                    "fingerprint": fingerprint or "",
                    "job": job.number,
                }
                write.connection.execute(_ADD_KEY, {**link, "created_at": write.now})
            tell(write, job, "queued")
            return job

        return self.database.write_together(add)

    def get(self, id: str, owner: str | None = None) -> Job:
        """A job. Raises MissingJobError."""
        with self.database.read() as connection:
            return _find(connection, id, owner)

    def find(self, ids: Sequence[str], owner: str) -> dict[str, Job]:
        """The owner's jobs of these ids, by id; those that are not there are left out."""
        look = WHOLE_JOBS.where(jobs.c.id.in_(ids), jobs.c.owner == owner, ~jobs.c.deleted)
        with self.database.read() as connection:
            return {row.id: as_job(row) for row in connection.execute(look)}

    def page(
        self,
        owner: str | None = None,
        *,
        kind: str | None = None,
        status: Status | None = None,
        after: str | None = None,
        limit: int = 20,
        newest_first: bool = True,
    ) -> tuple[list[Job], bool]:
        """A page of at most MAX_PAGE jobs in the order of their making, after the one with an id; and whether there are
        more. Raises MissingJobError when there is no job `after`."""
        with self.database.read() as connection:
            wanted = [~jobs.c.deleted]
            wanted += [jobs.c.owner == owner] if owner is not None else []
            wanted += [jobs.c.kind == kind] if kind is not None else []
            wanted += [has_status(status)] if status is not None else []
            if after is not None:
                last = _find(connection, after, owner).number
                wanted.append(jobs.c.number < last if newest_first else jobs.c.number > last)
            order = jobs.c.number.desc() if newest_first else jobs.c.number
            rows, more = read_page(
                connection, WHOLE_JOBS.where(and_(*wanted)).order_by(order), limit
            )
        return [as_job(row) for row in rows], more

    def walk(self, owner: str | None = None, *, status: Status | None = None) -> Iterator[Job]:
        """Every job, the newest first, read MAX_PAGE at a time; those that come or go meanwhile may be left out."""
        wanted = [~jobs.c.deleted]
        wanted += [jobs.c.owner == owner] if owner is not None else []
        wanted += [has_status(status)] if status is not None else []
        look = WHOLE_JOBS.where(*wanted).order_by(jobs.c.number.desc())
        last, more = None, True
        while more:
            with self.database.read() as connection:
                rows, more = read_page(
                    connection, look if last is None else look.where(jobs.c.number < last), MAX_PAGE
                )
            yield from map(as_job, rows)
            last = rows[-1].number if rows else None

    def cancel(self, id: str, owner: str | None = None) -> Job:
        """Stop a job for good: at once if it waits, within a step if it runs. Done jobs stay as they are."""
        return self._ask(id, owner, "cancel")

    def pause(self, id: str, owner: str | None = None) -> Job:
        """Hold a job: at once if it waits, within a step if it runs. Raises JobConflictError for one that is done."""
        return self._ask(id, owner, "pause")

    def resume(self, id: str, owner: str | None = None) -> Job:
        """Let a paused job go on where it was. Raises JobConflictError for one that is done."""
        with self.database.write() as write:
            job = _find(write.connection, id, owner)
            if job.done or job.wanted == "cancel":
                raise JobConflictError(
                    f"{id} is {job.status}: it cannot go on.", hint="Retry it, or ask again."
                )
            if job.status == "paused":
                return change(write, job, status="queued", event="queued")
            return change(write, job, wanted=None)

    def retry(self, id: str, owner: str | None = None) -> Job:
        """Put a job that failed, was cancelled or has expired back in the queue. Raises JobConflictError for others,
        CapacityError when the queue is full."""
        with self.database.write() as write:
            job = _find(write.connection, id, owner)
            if job.status not in ("failed", "cancelled", "expired"):
                raise JobConflictError(f"{id} is {job.status}: there is nothing to retry.")
            cost = write.connection.execute(
                select(jobs.c.cost).where(jobs.c.number == job.number)
            ).scalar_one()
            self._make_room(write, job.owner, cost)
            forget_attempts(write, job.number)
            fresh = {
                "attempts": 0,
                "error": None,
                "progress": 0,
                "run_after": 0.0,
                "deadline": None,
            }
            fresh |= {"completed_at": None, "expires_at": None}
            return change(write, job, status="queued", event="queued", **fresh)

    def delete(self, id: str, owner: str | None = None) -> None:
        """Forget a job and its result; one that runs is cancelled first and is gone for its owner at once."""
        with self.database.write() as write:
            job = _find(write.connection, id, owner)
            if job.status == "in_progress":
                change(write, job, wanted="cancel", deleted=True)
            else:
                write.connection.execute(delete(jobs).where(jobs.c.number == job.number))

    def attempts(self, job: Job) -> list[Attempt]:
        """Each time that a worker had a job in its hands since it was last retried, the oldest first."""
        with self.database.read() as connection:
            return list_attempts(connection, job.number)

    def events(
        self, owner: str | None = None, *, job: str | None = None, after: int = 0, limit: int = 100
    ) -> list[Event]:
        """What happened after an event's number, in order: of one job, of an owner, or of all; at most MAX_PAGE."""
        wanted: list[ColumnElement[bool]] = [events.c.number > after, ~jobs.c.deleted]
        wanted += [events.c.owner == owner] if owner is not None else []
        wanted += [jobs.c.id == job] if job is not None else []
        look = select(events, jobs.c.id).join(jobs).where(and_(*wanted)).order_by(events.c.number)
        with self.database.read() as connection:
            rows, _ = read_page(connection, look, limit)
        return [Event(row.number, row.id, row.type, row.data, row.created_at) for row in rows]

    def counts(self) -> Counts:
        """The queue at a glance, for metrics and health."""
        now = self.database.now()
        with self.database.read() as connection:
            rows = connection.execute(select(job_counts).where(job_counts.c.count > 0)).all()
            oldest = select(func.min(jobs.c.created_at)).where(has_status("queued"))
            since = connection.execute(oldest).scalar_one()
            seen = (
                select(func.count())
                .select_from(workers)
                .where(workers.c.seen_at > now - ALIVE_SECONDS)
            )
            alive = connection.execute(seen).scalar_one()
        return Counts(
            {row[0]: row[1] for row in rows}, 0.0 if since is None else max(0.0, now - since), alive
        )

    def count_refusal(self, rule: str, target: str, code: str) -> None:
        """Count that a rule of the policy has refused something before it became a job."""
        self.database.write_together(lambda write: count_refusal(write, rule, target, code))

    def refusals(self) -> Mapping[tuple[str, str, str], int]:
        """How often each rule has refused, by rule, target and code."""
        with self.database.read() as connection:
            return read_refusals(connection)

    def room(self, owner: str) -> int:
        """How many jobs more an owner may have waiting now."""
        with self.database.read() as connection:
            active = _active(connection)
        whole = self.settings.max_queued - sum(count for count, _ in active.values())
        own, most = active.get(owner, (0, 0.0))[0], self.settings.max_queued_per_owner
        return max(0, min(most - own, whole) if most else whole)

    def check_room(self, owner: str, more: int = 1, cost: float = 0.0) -> None:
        """Refuse what `submit` would, before work is done for so many jobs `more`, of that `cost` together. Raises
        QueueFullError, QuotaError."""
        now = self.database.now()
        with self.database.read() as connection:
            self._refuse(connection, now, owner, _active(connection), more, cost)

    def references(self, pause: float = 0.0) -> Iterator[str]:
        """References of everything stored that a job needs: results, checkpoints, and what requests start from.

        REFERENCE_ROWS jobs are read at a time, the oldest first, each time in a look of its own, with `pause` seconds
        between two, so that a long history does not keep a server busy. A reference may come more than once. One that a
        job names which was made meanwhile comes too.
        """
        after = 0
        while True:
            with self.database.read() as connection:
                rows = connection.execute(_NAMING, {"after": after}).all()
            if not rows:
                return
            after = rows[-1].number
            yield from find_references([[*row[1:]] for row in rows])
            time.sleep(pause)

    def referenced_assets(self) -> set[str]:
        """All of `references` at once; its size grows with the history."""
        return set(self.references())

    def _ask(self, id: str, owner: str | None, wanted: Wanted) -> Job:
        with self.database.write() as write:
            job = _find(write.connection, id, owner)
            if job.done and wanted == "pause":
                raise JobConflictError(f"{id} is {job.status}: it cannot be paused.")
            if job.status == "in_progress" and job.wanted != "cancel":
                return change(write, job, wanted=wanted)
            if job.status in ("queued", "paused") and (job.status, wanted) != ("paused", "pause"):
                return settle(write, job, wanted) or job
            return job

    def _made_already(
        self, write: Write, owner: str, key: str | None, fingerprint: str | None, retry_count: int
    ) -> int | None:
        """The number of the job that this very call has made before."""
        if key is not None:
            found = write.connection.execute(_BY_KEY, {"who": owner, "which": key}).one_or_none()
            if found is not None and found.created_at > write.now - KEY_SECONDS:
                if found.fingerprint != (fingerprint or ""):
                    raise JobConflictError(
                        "This idempotency key was used for another request.",
                        hint="Use a new key for a new request.",
                    )
                return found.job
            if found is not None:
                write.connection.execute(
                    delete(keys).where(keys.c.owner == owner, keys.c.key == key)
                )
        elif fingerprint is not None and retry_count > 0:
            newest = write.connection.execute(
                _NEWEST_OF_FINGERPRINT, {"who": owner, "what": fingerprint}
            ).one_or_none()
            if newest is not None and newest.created_at > write.now - RETRY_SECONDS:
                return newest.number
        return None

    def _make_room(self, write: Write, owner: str, cost: float) -> None:
        """Raise CapacityError when no more may wait; let an owner who comes back start level with the others."""
        active = _active(write.connection)
        self._refuse(write.connection, write.now, owner, active, 1, cost)
        if owner not in active:
            level_up(write, owner, list(active))

    def _refuse(
        self,
        connection: Connection,
        now: float,
        owner: str,
        active: "_Active",
        more: int,
        cost: float,
    ) -> None:
        """Raise QuotaError or QueueFullError unless so many jobs `more`, of that cost, may wait beside the active."""

        def wait() -> float:
            return self._usual_wait(connection, now)

        count, work = active.get(owner, (0, 0.0))
        self._quotas.refuse("queued_jobs", count, more, wait)
        if sum(jobs for jobs, _ in active.values()) + more > self.settings.max_queued:
            seconds, limit = wait(), self.settings.max_queued
            hint = f"Try again in {seconds:.0f} s."
            raise QueueFullError("The queue is full.", hint=hint, retry_after=seconds, limit=limit)
        self._quotas.refuse("queued_cost", work, cost, wait)

    def _usual_wait(self, connection: Connection, now: float) -> float:
        """Seconds until a job has probably ended, from 1 to MAX_RETRY_AFTER."""
        seen = (
            select(func.count()).select_from(workers).where(workers.c.seen_at > now - ALIVE_SECONDS)
        )
        hands = max(1, connection.execute(seen).scalar_one())
        return min(max((usual_seconds(connection) or 10.0) / hands, 1.0), MAX_RETRY_AFTER)


_Active = dict[str, tuple[int, float]]


def _active(connection: Connection) -> _Active:
    """How many jobs of each owner wait or run, and their cost together."""
    return {owner: (count, work) for owner, count, work in connection.execute(_WAITING)}


def _find(connection: Connection, id: str, owner: str | None) -> Job:
    """The job of that id, if its owner may still see it. Raises MissingJobError."""
    look = _BY_ID if owner is None else _BY_ID_OF_OWNER
    return one_job(connection, look, id=id, who=owner)
