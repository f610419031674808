# pyright: basic
"""JobStore: the clients' side of the queue.

A job runs at least once and has at most one result: workers hold a lease, and each of their writes
carries its token (leases.py). job.py documents the row and its transitions.
"""

import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, Connection, bindparam, delete, func, insert, select

from skyloom.serve.queue.capabilities import check_held, live_capabilities, needs_of
from skyloom.serve.queue.database import MAX_PAGE, Database, Write, read_page
from skyloom.serve.queue.errors import JobConflictError, NotFoundError, QueueFullError
from skyloom.serve.queue.idempotency import find_duplicate, keep_key
from skyloom.serve.queue.job import (
    COLUMNS,
    WHOLE_JOBS,
    Attempt,
    Job,
    JobFailure,
    JobResult,
    RequestedAction,
    Status,
    apply_requested_action,
    as_job,
    count_refusal,
    delete_attempts,
    list_attempts,
    mean_job_seconds,
    read_job,
    read_refusals,
    record_event,
    reset_virtual_time,
    select_job,
    update_job,
)
from skyloom.serve.queue.quotas import Quotas
from skyloom.serve.queue.tables import (
    ASSET_SCHEME,
    IS_ACTIVE,
    events,
    has_status,
    job_counts,
    jobs,
    results,
)
from skyloom.serve.settings import Settings

__all__ = [
    "Counts",
    "Event",
    "Job",
    "JobConflictError",
    "JobFailure",
    "JobResult",
    "JobStore",
    "NotFoundError",
    "QueueFullError",
    "Status",
]

MAX_RETRY_AFTER = 120  # seconds; clients do not wait longer
REFERENCE_ROWS = 200  # jobs read at a time by JobStore.references

_INSERT_JOB = insert(jobs).returning(*COLUMNS)
_ACTIVE_BY_OWNER = (
    select(jobs.c.owner, func.count(), func.sum(jobs.c.cost))
    .where(IS_ACTIVE)
    .group_by(jobs.c.owner)
)
_BY_ID = WHOLE_JOBS.where(jobs.c.id == bindparam("where_id"), ~jobs.c.deleted)
_BY_ID_OF_OWNER = _BY_ID.where(jobs.c.owner == bindparam("where_owner"))
_REFERENCES = (
    select(jobs.c.number, results.c.assets, jobs.c.checkpoint, jobs.c.request, jobs.c.metadata)
    .outerjoin(results, results.c.job == jobs.c.number)
    .where(jobs.c.number > bindparam("after"))
    .order_by(jobs.c.number)
    .limit(REFERENCE_ROWS)
)


@dataclass(frozen=True)
class Event:
    """An event of a job. Numbers grow, so a reader resumes after the last one it has seen."""

    number: int
    job: str
    type: str
    data: Mapping[str, Any]
    created_at: float


@dataclass(frozen=True)
class Counts:
    """Jobs by status, age of the oldest queued job in seconds, workers seen in the last minute.

    `models`: number of these workers by the models that they hold.
    """

    by_status: Mapping[str, int]
    oldest_seconds: float
    workers: int
    models: Mapping[str, int] = field(default_factory=dict[str, int])


class JobStore:
    """The clients' side of the queue. Every method is one transaction; its effect is on disk.

    With an `owner`, a method sees that owner's jobs only and raises NotFoundError for others;
    None sees all. `own_workers` returns the names of the server's own worker processes.
    """

    def __init__(
        self,
        database: Database,
        settings: Settings,
        own_workers: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        self.database = database
        self.settings = settings
        self._own_workers = own_workers
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
        metadata: Mapping[str, Any] | None = None,
    ) -> Job:
        """Queue a job, or return the one that the same call has queued before.

        `fingerprint` is a hash of the request. An idempotency `key` is kept for 24 hours: with the
        same fingerprint it returns the same job, with another it raises JobConflictError. Without
        a key, a client's retry (`retry_count` > 0) within a minute returns the newest job of its
        fingerprint. `priority` orders the owner's own jobs, higher first; `cost` is what the job
        counts for in the owner's fair share; a job not started at `deadline` expires. Raises
        QueueFullError or QuotaError when the queue, or the owner's part of it, is full, and
        ModelNotHeldError when no worker can render the job.
        """
        values = {
            "id": f"{kind}_{secrets.token_hex(16)}",
            "owner": owner,
            "kind": kind,
            "status": "queued",
            "request": dict(request),
            "metadata": dict(metadata or {}),
            "fingerprint": fingerprint,
            "priority": priority,
            "cost": cost,
            "deadline": deadline,
            "checkpoint": {},
            "needs": needs_of(request),
        }
        with self.database.write() as write:
            number = find_duplicate(write, owner, key, fingerprint, retry_count)
            if number is not None:
                return read_job(write.connection, number)
            live = live_capabilities(write.connection, write.now)
            check_held(live, values["needs"], self._own_workers())
            self._reserve_room(write, owner, cost)
            values["created_at"] = write.now
            job = as_job(write.connection.execute(_INSERT_JOB, values).one())
            if key is not None:
                keep_key(write, job, key, fingerprint)
            record_event(write, job, "queued")
            return job

    def get(self, id: str, owner: str | None = None) -> Job:
        """Read a job. Raises NotFoundError."""
        with self.database.read() as connection:
            return _find(connection, id, owner)

    def find(self, ids: Sequence[str], owner: str) -> dict[str, Job]:
        """Read the owner's jobs of these ids, by id; ids without a job are left out."""
        query = WHOLE_JOBS.where(jobs.c.id.in_(ids), *_conditions(owner))
        with self.database.read() as connection:
            return {row.id: as_job(row) for row in connection.execute(query)}

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
        """Read a page of at most MAX_PAGE jobs after the one with id `after`.

        Returns the jobs in order of submission, and whether there are more. Raises NotFoundError
        when there is no job `after`.
        """
        query = WHOLE_JOBS.where(*_conditions(owner, kind, status))
        number = jobs.c.number
        with self.database.read() as connection:
            if after is not None:
                last = _find(connection, after, owner).number
                query = query.where(number < last if newest_first else number > last)
            order = number.desc() if newest_first else number
            rows, more = read_page(connection, query.order_by(order), limit)
        return [as_job(row) for row in rows], more

    def walk(self, owner: str | None = None, *, status: Status | None = None) -> Iterator[Job]:
        """Iterate over all jobs, the newest first, reading MAX_PAGE at a time.

        Jobs that are added or deleted meanwhile may be missed.
        """
        query = WHOLE_JOBS.where(*_conditions(owner, status=status))
        query = query.order_by(jobs.c.number.desc())
        following = query
        more = True
        while more:
            with self.database.read() as connection:
                rows, more = read_page(connection, following, MAX_PAGE)
            yield from map(as_job, rows)
            if more:
                following = query.where(jobs.c.number < rows[-1].number)

    def cancel(self, id: str, owner: str | None = None) -> Job:
        """Cancel a job: at once if it waits, after the current step if it runs.

        A job that has ended stays as it is.
        """
        return self._request_transition(id, owner, "cancel")

    def pause(self, id: str, owner: str | None = None) -> Job:
        """Pause a job: at once if it waits, after the current step if it runs.

        Raises JobConflictError for a job that has ended.
        """
        return self._request_transition(id, owner, "pause")

    def resume(self, id: str, owner: str | None = None) -> Job:
        """Queue a paused job again, from its checkpoint.

        Raises JobConflictError for a job that has ended or is being cancelled.
        """
        with self.database.write() as write:
            job = _find(write.connection, id, owner)
            if job.done or job.requested_action == "cancel":
                status = job.status if job.done else "being cancelled"
                message = f"{id} is {status} and cannot be resumed."
                raise JobConflictError(message, hint="Retry it, or submit it again.")
            if job.status == "paused":
                return update_job(write, job, status="queued", event="queued")
            return update_job(write, job, requested_action=None)

    def retry(self, id: str, owner: str | None = None) -> Job:
        """Queue a failed, cancelled or expired job again, with no attempts counted.

        Raises JobConflictError for other jobs, CapacityError when the queue is full.
        """
        with self.database.write() as write:
            job = _find(write.connection, id, owner)
            if job.status not in ("failed", "cancelled", "expired"):
                raise JobConflictError(
                    f"status must be failed, cancelled or expired to retry {id}, got {job.status}."
                )
            cost = select(jobs.c.cost).where(jobs.c.number == job.number)
            self._reserve_room(write, job.owner, write.connection.execute(cost).scalar_one())
            delete_attempts(write, job.number)
            return update_job(
                write,
                job,
                event="queued",
                status="queued",
                attempts=0,
                error=None,
                progress=0,
                run_after=0.0,
                deadline=None,
                completed_at=None,
                expires_at=None,
            )

    def delete(self, id: str, owner: str | None = None) -> None:
        """Delete a job and its result.

        A running job is hidden at once and counts as active until its worker has released it.
        """
        with self.database.write() as write:
            job = _find(write.connection, id, owner)
            if job.status == "in_progress":
                update_job(write, job, requested_action="cancel", deleted=True)
            else:
                write.connection.execute(delete(jobs).where(jobs.c.number == job.number))

    def attempts(self, job: Job) -> list[Attempt]:
        """List the attempts since the last retry by the owner, each with its error."""
        with self.database.read() as connection:
            return list_attempts(connection, job.number)

    def events(
        self, owner: str | None = None, *, job: str | None = None, after: int = 0, limit: int = 100
    ) -> list[Event]:
        """List events after a number, in order: of a job, of an owner, or all; at most MAX_PAGE."""
        query = select(events, jobs.c.id).join(jobs)
        query = query.where(events.c.number > after, ~jobs.c.deleted)
        if owner is not None:
            query = query.where(events.c.owner == owner)
        if job is not None:
            query = query.where(jobs.c.id == job)
        with self.database.read() as connection:
            rows, _ = read_page(connection, query.order_by(events.c.number), limit)
        return [Event(row.number, row.id, row.type, row.data, row.created_at) for row in rows]

    def counts(self) -> Counts:
        """Count jobs and workers, for metrics and health."""
        now = self.database.now()
        oldest = select(func.min(jobs.c.created_at)).where(has_status("queued"))
        with self.database.read() as connection:
            rows = connection.execute(select(job_counts).where(job_counts.c.count > 0)).all()
            since = connection.execute(oldest).scalar_one()
            live = live_capabilities(connection, now).values()
        waited = 0.0 if since is None else max(0.0, now - since)
        models = Counter(name for one in live for name in one.usable_models)
        return Counts({row.status: row[1] for row in rows}, waited, len(live), models)

    def count_refusal(self, rule: str, target: str, code: str) -> None:
        """Count a request that a rule of the policy has rejected before it became a job."""
        with self.database.write() as write:
            count_refusal(write, rule, target, code)

    def refusals(self) -> Mapping[tuple[str, str, str], int]:
        """Return how often each rule has rejected something, by rule, target and code."""
        with self.database.read() as connection:
            return read_refusals(connection)

    def room(self, owner: str) -> int:
        """Return how many more jobs an owner may submit now."""
        with self.database.read() as connection:
            active = _active_by_owner(connection)
        total = self.settings.max_queued - sum(count for count, _ in active.values())
        limit = self.settings.max_queued_per_owner
        if limit:
            total = min(total, limit - active.get(owner, (0, 0.0))[0])
        return max(0, total)

    def check_held(self, request: Mapping[str, Any]) -> None:
        """Check that a worker can render a request. Raises ModelNotHeldError as `submit` would."""
        now = self.database.now()
        with self.database.read() as connection:
            live = live_capabilities(connection, now)
        check_held(live, needs_of(request), self._own_workers())

    def check_room(self, owner: str, more: int = 1, cost: float = 0.0) -> None:
        """Check that `more` jobs of `cost` in total may be submitted.

        Raises QueueFullError or QuotaError as `submit` would.
        """
        now = self.database.now()
        with self.database.read() as connection:
            active = _active_by_owner(connection)
            self._check_limits(connection, now, owner, active=active, more=more, cost=cost)

    def references(self, pause: float = 0.0) -> Iterator[str]:
        """Iterate over the asset references in results, checkpoints, requests and metadata.

        Reads REFERENCE_ROWS jobs per transaction, the oldest first, and sleeps `pause` seconds
        after each, so a long history does not keep the server busy. References may repeat;
        those of jobs that are submitted meanwhile are included.
        """
        after = 0
        while True:
            with self.database.read() as connection:
                rows = connection.execute(_REFERENCES, {"after": after}).all()
            if not rows:
                return
            after = rows[-1].number
            yield from find_references([[*row[1:]] for row in rows])
            time.sleep(pause)

    def referenced_assets(self) -> set[str]:
        """Return all `references` as a set, which grows with the history."""
        return set(self.references())

    def _request_transition(self, id: str, owner: str | None, action: RequestedAction) -> Job:
        """Cancel or pause a waiting job now; ask the worker of a running one to do so."""
        with self.database.write() as write:
            job = _find(write.connection, id, owner)
            if job.done and action == "pause":
                raise JobConflictError(f"{id} is {job.status} and cannot be paused.")
            if job.status == "in_progress" and job.requested_action != "cancel":
                return update_job(write, job, requested_action=action)
            if job.status == "queued" or (job.status == "paused" and action == "cancel"):
                return apply_requested_action(write, job, action) or job
            return job

    def _reserve_room(self, write: Write, owner: str, cost: float) -> None:
        """Raise CapacityError when the queue is full; else prepare an owner's return to it."""
        active = _active_by_owner(write.connection)
        self._check_limits(write.connection, write.now, owner, active=active, more=1, cost=cost)
        if owner not in active:
            reset_virtual_time(write, owner, list(active))

    def _check_limits(
        self,
        connection: Connection,
        now: float,
        owner: str,
        *,
        active: "_Active",
        more: int,
        cost: float,
    ) -> None:
        """Raise QuotaError or QueueFullError unless `more` jobs of `cost` fit beside the active."""

        def retry_after() -> float:
            """Estimate the seconds until a job ends, from 1 to MAX_RETRY_AFTER."""
            workers = max(1, len(live_capabilities(connection, now)))
            return min(max((mean_job_seconds(connection) or 10.0) / workers, 1.0), MAX_RETRY_AFTER)

        count, work = active.get(owner, (0, 0.0))
        self._quotas.check_usage("queued_jobs", count, more, retry_after)
        limit = self.settings.max_queued
        if sum(jobs for jobs, _ in active.values()) + more > limit:
            seconds = retry_after()
            hint = f"Try again in {seconds:.0f} s."
            raise QueueFullError("The queue is full.", hint=hint, retry_after=seconds, limit=limit)
        self._quotas.check_usage("queued_cost", work, cost, retry_after)


_Active = dict[str, tuple[int, float]]


def _active_by_owner(connection: Connection) -> _Active:
    """Return the number and total cost of active jobs by owner.

    Includes deleted jobs that a worker still renders: they take its time until it releases them.
    """
    return {owner: (count, work) for owner, count, work in connection.execute(_ACTIVE_BY_OWNER)}


def _conditions(
    owner: str | None, kind: str | None = None, status: Status | None = None
) -> list[ColumnElement[bool]]:
    """Build the conditions of a query for visible jobs."""
    conditions: list[ColumnElement[bool]] = [~jobs.c.deleted]
    if owner is not None:
        conditions.append(jobs.c.owner == owner)
    if kind is not None:
        conditions.append(jobs.c.kind == kind)
    if status is not None:
        conditions.append(has_status(status))
    return conditions


def _find(connection: Connection, id: str, owner: str | None) -> Job:
    """Read a job that its owner may see. Raises NotFoundError."""
    if owner is None:
        return select_job(connection, _BY_ID, id, where_id=id)
    return select_job(connection, _BY_ID_OF_OWNER, id, where_id=id, where_owner=owner)


def find_references(values: object) -> set[str]:
    """Collect every reference in nested mappings and sequences."""
    if isinstance(values, str):
        return {values} if values.startswith(ASSET_SCHEME) else set()
    if isinstance(values, Mapping):
        values = list(values.values())
    if isinstance(values, Sequence):
        return set().union(*map(find_references, values))
    return set()
