"""One job as it is kept: what it looks like, how its row is read and changed, and who is told.

Everything here happens inside a write transaction of its caller (jobs.py for clients, leases.py for workers).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from sqlalchemy import Connection, Row, Select, bindparam, delete, func, insert, select, update

from skyloom.core.errors import QueueError
from skyloom.serve.queue.attempts import end_attempt
from skyloom.serve.queue.database import Write
from skyloom.serve.queue.tables import events, has_status, jobs, owners, results
from skyloom.serve.queue.webhooks import announce

Status = Literal["queued", "in_progress", "paused", "completed", "failed", "cancelled", "expired"]
Wanted = Literal["cancel", "pause"]
ACTIVE: tuple[Status, ...] = ("queued", "in_progress", "paused")


class MissingJobError(QueueError):
    """There is no such job, or it is somebody else's."""

    code = "job_missing"


class JobConflictError(QueueError):
    """The job is not in a state for that, or a key was used for another request."""

    code = "job_conflict"


class LostLeaseError(QueueError):
    """The job is no longer this worker's: nothing it writes counts."""

    code = "lost_lease"


@dataclass(frozen=True)
class JobFailure:
    """Why a job failed: a code for programs, a sentence for people, and of a refusal the policy's rule and of what it
    was: the "prompt", the "input" or the "output"."""

    code: str
    message: str
    rule: str | None = None
    target: str | None = None


@dataclass(frozen=True)
class JobResult:
    """What a job made: references of stored assets by name ("video", "thumbnail", ...), and the receipt."""

    assets: Mapping[str, str]
    receipt: Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """A row of the queue. Times are seconds since 1970; `progress` goes from 0 to 100 and never back while it runs.

    `request` is a Request's plain values; `extra` is whatever the wire wants to remember; `wanted` is what a running
    job was asked and has not done yet; `checkpoint` names stored assets that a resumed run starts from; `attempts`
    counts the runs that were lost or went wrong since the last checkpoint.
    """

    number: int
    id: str
    owner: str
    kind: str
    status: Status
    request: Mapping[str, Any]
    extra: Mapping[str, Any]
    priority: int
    progress: int
    phase: str | None
    wanted: Wanted | None
    deleted: bool
    checkpoint: Mapping[str, str]
    attempts: int
    worker: str | None
    error: JobFailure | None
    result: JobResult | None
    created_at: float
    started_at: float | None
    completed_at: float | None
    expires_at: float | None

    @property
    def done(self) -> bool:
        """Whether nothing more will happen to it by itself."""
        return self.status not in ACTIVE


COLUMNS = [
    jobs.c[name]
    for name in (
        *(
            "number",
            "id",
            "owner",
            "kind",
            "status",
            "request",
            "extra",
            "priority",
            "progress",
            "phase",
            "wanted",
        ),
        *("deleted", "checkpoint", "attempts", "worker", "error"),
        *("created_at", "started_at", "completed_at", "expires_at"),
    )
]


# Every job with its result. These statements are built once: building one takes longer than running it.
WHOLE_JOBS = select(*COLUMNS, results.c.assets, results.c.receipt).outerjoin(
    results, results.c.job == jobs.c.number
)
_BY_NUMBER = WHOLE_JOBS.where(jobs.c.number == bindparam("number"))
_CHANGE = update(jobs).where(jobs.c.number == bindparam("which"))
_TELL = insert(events)
_CHARGE = (
    update(owners)
    .where(owners.c.owner == bindparam("who"))
    .values(served=owners.c.served + bindparam("cost"))
)


def as_job(row: Row[Any]) -> Job:
    """A row of WHOLE_JOBS."""
    values = dict(row._mapping)
    assets, receipt, error = (
        values.pop("assets", None),
        values.pop("receipt", None),
        values.pop("error"),
    )
    result = None if assets is None else JobResult(assets, receipt)
    return Job(**values, error=None if error is None else JobFailure(**error), result=result)


def read_job(connection: Connection, number: int) -> Job:
    """The job of a number. Raises MissingJobError."""
    return one_job(connection, _BY_NUMBER, number=number)


def one_job(connection: Connection, look: Select[Any], **values: object) -> Job:
    """The job that a look at WHOLE_JOBS finds. Raises MissingJobError."""
    row = connection.execute(look, values).one_or_none()
    if row is None:
        raise MissingJobError("There is no such job.", hint="It may have been deleted.")
    return as_job(row)


def change(
    write: Write,
    job: Job,
    *,
    event: str | None = None,
    data: Mapping[str, Any] | None = None,
    **values: Any,
) -> Job:
    """Set some columns, tell of it if it is an `event` ("completed"), and give back the job as it is then."""
    write.connection.execute(_CHANGE, {"which": job.number, **values})
    if event is not None:
        tell(write, job, event, data)
    return read_job(write.connection, job.number)


def leave(
    write: Write,
    job: Job,
    status: Status,
    *,
    error: JobFailure | None = None,
    cause: JobFailure | None = None,
    **values: Any,
) -> Job | None:
    """Take a job out of a worker's hands into another state. One that was deleted meanwhile is gone: None.

    `error` is why the job failed, `cause` why the attempt did, where the job goes on.
    """
    if job.status == "in_progress":
        why = error or cause
        end_attempt(write, job.number, status, None if why is None else vars(why))
    if job.deleted and status != "queued":
        write.connection.execute(delete(jobs).where(jobs.c.number == job.number))
        return None
    values |= {"status": status, "wanted": None, "worker": None, "lease_until": None}
    if status not in ACTIVE:
        values |= {"completed_at": write.now, "phase": None}
    if error is not None:
        values["error"] = vars(error)
    return change(write, job, event=status, data=vars(error) if error else None, **values)


def settle(write: Write, job: Job, wanted: Wanted) -> Job | None:
    """Do what was wanted of a job that no worker has in its hands."""
    return leave(write, job, "cancelled" if wanted == "cancel" else "paused")


def tell(write: Write, job: Job, event: str, data: Mapping[str, Any] | None = None) -> None:
    """Write down what happened; ends of jobs go to the owner's webhooks too."""
    kind = f"{job.kind}.{event}"
    row = {
        "job": job.number,
        "owner": job.owner,
        "type": kind,
        "data": dict(data or {}),
        "created_at": write.now,
    }
    write.connection.execute(_TELL, row)
    if event in ("completed", "failed"):
        announce(write, job.owner, kind, job.id)


def level_up(write: Write, owner: str, others: Sequence[str]) -> None:
    """An owner who comes back to the queue starts where the least served of the others stands, not with credit."""
    served = dict(
        cast(
            "list[tuple[str, float]]",
            write.connection.execute(
                select(owners).where(owners.c.owner.in_([owner, *others]))
            ).all(),
        )
    )
    level = max(
        served.get(owner, 0.0), min((served.get(other, 0.0) for other in others), default=0.0)
    )
    charge(write, owner, level - served.get(owner, 0.0))


def charge(write: Write, owner: str, cost: float) -> None:
    """Count work for an owner."""
    if not write.connection.execute(_CHARGE, {"who": owner, "cost": cost}).rowcount:
        write.connection.execute(insert(owners).values(owner=owner, served=cost))


def usual_seconds(connection: Connection, last: int = 20) -> float | None:
    """How long the last jobs took on average; None before there were any."""
    took = (jobs.c.completed_at - jobs.c.started_at).label("took")
    recent = (
        select(took)
        .where(has_status("completed"))
        .order_by(jobs.c.number.desc())
        .limit(last)
        .subquery()
    )
    return connection.execute(select(func.avg(recent.c.took))).scalar_one()
