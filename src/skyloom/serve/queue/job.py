# pyright: basic
"""The job row: columns, status transitions, attempts, events and the owners' virtual time.

Statuses are in tables.py. A running job may have a requested action, written `in_progress+cancel`,
`in_progress+pause` or `in_progress+delete`, which its worker carries out between two steps. Every
transition is listed here; a verb in any other status raises an error or changes nothing.

    client verb (jobs.py)  | from                                         | to
    submit                 | (new)                                        | queued
    cancel                 | queued, paused                               | cancelled
                           | in_progress, in_progress+pause               | in_progress+cancel
    pause                  | queued                                       | paused
                           | in_progress                                  | in_progress+pause
    resume                 | paused                                       | queued
                           | in_progress+pause                            | in_progress
    retry                  | failed, cancelled, expired                   | queued
    delete                 | queued, paused, completed                    | (deleted)
                           | failed, cancelled, expired                   | (deleted)
                           | in_progress, in_progress+pause               | in_progress+delete
                           | in_progress+cancel                           | in_progress+delete

    worker verb (leases.py)| from                                         | to
    lease                  | queued                                       | in_progress
    finish                 | in_progress, in_progress+pause               | completed
                           | in_progress+cancel                           | cancelled
                           | in_progress+delete                           | (deleted)
    fail                   | in_progress, in_progress+pause               | failed
                           | in_progress+cancel                           | cancelled
                           | in_progress+delete                           | (deleted)
    fail and retry later   | in_progress                                  | queued
                           | in_progress+pause                            | paused
                           | in_progress+cancel                           | cancelled
                           | in_progress+delete                           | (deleted)
    release                | in_progress                                  | queued
                           | in_progress+pause                            | paused
                           | in_progress+cancel                           | cancelled
                           | in_progress+delete                           | (deleted)
    lease runs out         | in_progress                                  | queued
                           | in_progress+pause                            | paused
                           | in_progress+cancel                           | cancelled
                           | in_progress+delete                           | (deleted)
    deadline passes        | queued                                       | expired
    result expires         | completed                                    | expired

A job that is returned to the queue by `fail` or by a lost lease fails instead after `max_attempts`
attempts without a new checkpoint, or after `max_job_seconds` of work. A deadline applies only to
jobs that were never started.

All functions run inside the caller's transaction (jobs.py for clients, leases.py for workers).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from sqlalchemy import Connection, Row, Select, bindparam, delete, func, insert, select, update

from skyloom.serve.queue.database import Write
from skyloom.serve.queue.errors import NotFoundError
from skyloom.serve.queue.tables import (
    MAX_RULE,
    Status,
    attempts,
    events,
    has_status,
    jobs,
    owners,
    refusals,
    results,
)
from skyloom.serve.queue.webhooks import enqueue_deliveries

RequestedAction = Literal["cancel", "pause"]
ACTIVE: tuple[Status, ...] = ("queued", "in_progress", "paused")
BLOCKED = "moderation_blocked"  # failure code: a rule of the policy matched
FAILED = "moderation_failed"  # failure code: a check of the policy could not be made


@dataclass(frozen=True)
class JobFailure:
    """Why a job or an attempt failed.

    `rule` and `target` ("prompt", "input" or "output") are set for rejections by the policy.
    """

    code: str
    message: str
    rule: str | None = None
    target: str | None = None


@dataclass(frozen=True)
class JobResult:
    """Result of a job: asset references by name ("video", "thumbnail", ...) and the receipt."""

    assets: Mapping[str, str]
    receipt: Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """A row of `jobs` with its row of `results`. Times are seconds since 1970."""

    number: int  # primary key; grows with every submission
    id: str  # public id: "<kind>_<32 hex digits>"
    owner: str  # owner of the API key that submitted it
    kind: str  # prefix of the id and of event types, such as "video"
    status: Status  # see the table of transitions above
    request: Mapping[str, Any]  # the Request as JSON values
    metadata: Mapping[str, Any]  # JobMetadata as JSON values, for responses; column `extra`
    priority: int  # higher runs first among the jobs of one owner
    progress: int  # percent, 0 to 100; never decreases until a retry
    phase: str | None  # stage of the render; None once the job has ended
    requested_action: RequestedAction | None  # for the worker of a running job; column `wanted`
    deleted: bool  # deleted by its owner while running; removed once the worker releases it
    checkpoint: Mapping[str, str]  # asset references from which another attempt resumes
    attempts: int  # failed or lost attempts since the last new checkpoint
    worker: str | None  # name of the worker that holds the lease
    error: JobFailure | None  # why the job failed; list_attempts has the error of every attempt
    result: JobResult | None  # set while the status is completed
    created_at: float  # when it was submitted
    started_at: float | None  # when it was first leased
    completed_at: float | None  # when it reached an end status
    expires_at: float | None  # when its result will be deleted; None for never

    @property
    def done(self) -> bool:
        """Whether the status is final unless a client changes it."""
        return self.status not in ACTIVE


@dataclass(frozen=True)
class Attempt:
    """One lease of a job, from its start to its end. Times are seconds since 1970."""

    token: int  # token of the lease
    worker: str
    began_at: float
    ended_at: float | None  # None while it runs
    outcome: Status | None  # status of the job after the attempt; None while it runs
    error: JobFailure | None  # why this attempt failed; None where it did not


COLUMNS = [jobs.c[field.name].label(field.name) for field in fields(Job) if field.name in jobs.c]
# Every job with its result. Statements are built once: building one takes longer than running it.
WHOLE_JOBS = select(*COLUMNS, results.c.assets, results.c.receipt).outerjoin(
    results, results.c.job == jobs.c.number
)
_BY_NUMBER = WHOLE_JOBS.where(jobs.c.number == bindparam("number"))
_UPDATE_JOB = update(jobs).where(jobs.c.number == bindparam("where_number"))
_INSERT_EVENT = insert(events)
_ADD_USAGE = (
    update(owners)
    .where(owners.c.owner == bindparam("where_owner"))
    .values(served=owners.c.served + bindparam("cost"))
)
_OF_JOB = attempts.c.job == bindparam("where_job")
_INSERT_ATTEMPT = insert(attempts)
_END_ATTEMPT = update(attempts).where(_OF_JOB, attempts.c.ended_at.is_(None))
_DELETE_ATTEMPTS = delete(attempts).where(_OF_JOB)
_ATTEMPT_TIMES = select(attempts.c.began_at, attempts.c.ended_at).where(_OF_JOB)
_LIST_ATTEMPTS = (
    select(*(attempts.c[field.name] for field in fields(Attempt)))
    .where(_OF_JOB)
    .order_by(attempts.c.token)
)


def as_job(row: Row[Any]) -> Job:
    """Convert a row of WHOLE_JOBS."""
    values = dict(row._mapping)
    assets = values.pop("assets", None)
    receipt = values.pop("receipt", None)
    result = None if assets is None else JobResult(assets, receipt)
    return Job(**{**values, "error": _as_failure(values["error"]), "result": result})


def _as_failure(error: Mapping[str, Any] | None) -> JobFailure | None:
    return None if error is None else JobFailure(**error)


def read_job(connection: Connection, number: int) -> Job:
    """Read a job by its number. Raises NotFoundError."""
    return select_job(connection, _BY_NUMBER, str(number), number=number)


def select_job(connection: Connection, query: Select[Any], id: str, **values: object) -> Job:
    """Read the one job of a query on WHOLE_JOBS. Raises NotFoundError with `id`."""
    row = connection.execute(query, values).one_or_none()
    if row is None:
        raise NotFoundError("job", id, hint="It may have been deleted.")
    return as_job(row)


def update_job(
    write: Write,
    job: Job,
    *,
    event: str | None = None,
    data: Mapping[str, Any] | None = None,
    **values: Any,
) -> Job:
    """Set columns, record `event` ("completed") with its `data`, and return the updated job."""
    write.connection.execute(_UPDATE_JOB, {"where_number": job.number, **values})
    if event is not None:
        record_event(write, job, event, data)
    return read_job(write.connection, job.number)


def end_attempt(
    write: Write,
    job: Job,
    status: Status,
    *,
    error: JobFailure | None = None,
    attempt_error: JobFailure | None = None,
    **values: Any,
) -> Job | None:
    """Take a job from its worker, if it has one, and move it to `status`.

    `error` is why the job failed; `attempt_error` is why the attempt failed although the job
    goes on or was stopped. Returns None for a job deleted by its owner: its row is removed.
    """
    if job.status == "in_progress":
        cause = error or attempt_error
        ended = {"ended_at": write.now, "outcome": status, "error": cause and vars(cause)}
        write.connection.execute(_END_ATTEMPT, {"where_job": job.number, **ended})
    if job.deleted:
        write.connection.execute(delete(jobs).where(jobs.c.number == job.number))
        return None
    values.update(status=status, requested_action=None, worker=None, lease_until=None)
    if status not in ACTIVE:
        values.update(completed_at=write.now, phase=None)
    if error is not None:
        values["error"] = vars(error)
    return update_job(write, job, event=status, data=error and vars(error), **values)


def apply_requested_action(
    write: Write, job: Job, action: RequestedAction, attempt_error: JobFailure | None = None
) -> Job | None:
    """Cancel or pause a job that no worker renders any more; None for a deleted one."""
    status: Status = "cancelled" if action == "cancel" else "paused"
    return end_attempt(write, job, status, attempt_error=attempt_error)


def record_event(write: Write, job: Job, event: str, data: Mapping[str, Any] | None = None) -> None:
    """Add an event of a job; completed and failed go to the owner's webhooks too."""
    type = f"{job.kind}.{event}"
    row = {
        "job": job.number,
        "owner": job.owner,
        "type": type,
        "data": dict(data or {}),
        "created_at": write.now,
    }
    write.connection.execute(_INSERT_EVENT, row)
    if event in ("completed", "failed"):
        enqueue_deliveries(write, job.owner, type, job.id)


def begin_attempt(write: Write, job: int, token: int, worker: str) -> float:
    """Add an attempt; return the seconds that earlier attempts took."""
    seconds = seconds_used(write.connection, job, write.now)
    row = {"job": job, "token": token, "worker": worker, "began_at": write.now}
    write.connection.execute(_INSERT_ATTEMPT, row)
    return seconds


def seconds_used(connection: Connection, job: int, now: float) -> float:
    """Sum the durations of a job's attempts in seconds."""
    rows = connection.execute(_ATTEMPT_TIMES, {"where_job": job}).all()
    return sum(max(0.0, (now if ended is None else ended) - began) for began, ended in rows)


def delete_attempts(write: Write, job: int) -> None:
    """Delete the attempts of a job that its owner retries."""
    write.connection.execute(_DELETE_ATTEMPTS, {"where_job": job})


def list_attempts(connection: Connection, job: int) -> list[Attempt]:
    """List the attempts of a job, each with its error, the oldest first."""
    rows = connection.execute(_LIST_ATTEMPTS, {"where_job": job}).all()
    return [Attempt(**{**row._mapping, "error": _as_failure(row.error)}) for row in rows]


def reset_virtual_time(write: Write, owner: str, others: Sequence[str]) -> None:
    """Raise the usage of an owner who returns to the queue to the least of the active `others`.

    Without this, an owner who was away would go first for as long as the others were served.
    """
    rows = write.connection.execute(select(owners).where(owners.c.owner.in_([owner, *others])))
    usage = {row.owner: row.served for row in rows}
    least = min((usage.get(other, 0.0) for other in others), default=0.0)
    own = usage.get(owner, 0.0)
    add_usage(write, owner, max(0.0, least - own))


def add_usage(write: Write, owner: str, cost: float) -> None:
    """Add to the work that an owner was served."""
    values = {"where_owner": owner, "cost": cost}
    if not write.connection.execute(_ADD_USAGE, values).rowcount:
        write.connection.execute(insert(owners).values(owner=owner, served=cost))


def mean_job_seconds(connection: Connection, last: int = 20) -> float | None:
    """Average the duration of the last completed jobs in seconds; None before there are any."""
    took = (jobs.c.completed_at - jobs.c.started_at).label("took")
    recent = select(took).where(has_status("completed")).order_by(jobs.c.number.desc()).limit(last)
    return connection.execute(select(func.avg(recent.subquery().c.took))).scalar_one()


def count_refusal(write: Write, rule: str, target: str, code: str) -> None:
    """Count a rejection by a rule of the policy. `target` is "prompt", "input" or "output"."""
    key = {"rule": rule[:MAX_RULE], "target": target, "code": code}
    same = [refusals.c[name] == value for name, value in key.items()]
    increment = update(refusals).where(*same).values(count=refusals.c.count + 1)
    if not write.connection.execute(increment).rowcount:
        write.connection.execute(insert(refusals).values(**key, count=1))


def read_refusals(connection: Connection) -> dict[tuple[str, str, str], int]:
    """Read how often each rule has rejected something, by rule, target and code."""
    rows = connection.execute(select(refusals)).all()
    return {(rule, target, code): count for rule, target, code, count in rows}
