# pyright: basic
"""Leases: the workers' side of the queue.

A lease lasts `lease_seconds` from its last heartbeat and has a token, one more than the job's last
lease. A write with an older token, or for a job that has left the worker, raises LostLeaseError and
changes nothing. A job whose lease runs out is queued again, until it was lost `max_attempts` times
without a new checkpoint or was worked on for `max_job_seconds`. job.py has the transitions.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import (
    ColumnElement,
    Connection,
    and_,
    bindparam,
    case,
    delete,
    insert,
    or_,
    select,
    update,
)

from skyloom.serve.queue.capabilities import Capabilities, model_of, read_capabilities
from skyloom.serve.queue.database import Database, Write
from skyloom.serve.queue.errors import LostLeaseError
from skyloom.serve.queue.job import (
    WHOLE_JOBS,
    Job,
    JobFailure,
    JobResult,
    RequestedAction,
    add_usage,
    apply_requested_action,
    as_job,
    begin_attempt,
    count_refusal,
    end_attempt,
    read_job,
    seconds_used,
    update_job,
)
from skyloom.serve.queue.tables import IS_ACTIVE, has_status, jobs, owners, results, workers
from skyloom.serve.queue.time_limits import job_time_failure
from skyloom.serve.settings import Settings

__all__ = ["Lease", "Leases", "LostLeaseError", "WorkerInfo"]

KEEP_WORKERS = 3_600  # seconds until a worker that was not seen is deleted
EXPIRE_ROWS = 500  # jobs that expire in one transaction
WARM_SECONDS = 60  # age of a job from which other jobs of a loaded model no longer overtake it
_MAX_RUNNING_PROGRESS = 99  # percent; 100 means completed

_QUEUED_NEEDS = select(jobs.c.needs).where(has_status("queued")).distinct()
_READY = and_(
    has_status("queued"),
    jobs.c.run_after <= bindparam("now"),
    jobs.c.needs.in_(bindparam("accepted", expanding=True)),
)
_WARM_OR_OLD = or_(
    jobs.c.needs.in_(bindparam("warm", expanding=True)),
    jobs.c.created_at <= bindparam("old"),
)
_WARM_FIRST = case((_WARM_OR_OLD, 0), else_=1)
_NEXT_OWNER = (
    select(jobs.c.owner)
    .outerjoin(owners, owners.c.owner == jobs.c.owner)
    .where(_READY)
    .order_by(owners.c.served, _WARM_FIRST, jobs.c.number)
    .limit(1)
)
_NEXT_JOB = (
    select(jobs.c.number, jobs.c.token, jobs.c.started_at, jobs.c.cost)
    .where(_READY, jobs.c.owner == bindparam("where_owner"))
    .order_by(jobs.c.priority.desc(), _WARM_FIRST, jobs.c.number)
    .limit(1)
)
_LEASED = WHOLE_JOBS.where(
    jobs.c.number == bindparam("number"),
    jobs.c.token == bindparam("token"),
    jobs.c.status == "in_progress",
)
_SEEN = update(workers).where(workers.c.name == bindparam("where_name"))
_RUNNING = WHOLE_JOBS.where(has_status("in_progress"))
_EXPIRED = [
    WHOLE_JOBS.where(condition).limit(EXPIRE_ROWS)
    for condition in (
        and_(has_status("queued"), jobs.c.started_at.is_(None), jobs.c.deadline < bindparam("now")),
        and_(has_status("completed"), jobs.c.expires_at < bindparam("now")),
    )
]


@dataclass(frozen=True)
class Lease:
    """A worker's exclusive right to a job, with a fencing token larger than all earlier ones."""

    job: Job
    token: int
    worker: str
    seconds_used: float = 0.0  # by earlier attempts


@dataclass(frozen=True)
class WorkerInfo:
    """A registered worker and the job it renders, if any. Times are seconds since 1970."""

    device: str
    started_at: float
    job: str | None
    job_started_at: float | None
    capabilities: Capabilities = Capabilities()


class Leases:
    """The workers' side of the queue. Every method is one transaction."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self.database = database
        self.settings = settings

    def register_worker(
        self, worker: str, device: str, capabilities: Capabilities | None = None
    ) -> None:
        """Register a worker, or update what it announces and its last-seen time."""
        announced = None if capabilities is None else capabilities.to_row()
        with self.database.write() as write:
            row = {"device": device, "seen_at": write.now, "capabilities": announced}
            if not write.connection.execute(_SEEN, {"where_name": worker, **row}).rowcount:
                row = {**row, "name": worker, "started_at": write.now}
                write.connection.execute(insert(workers).values(**row))

    def list_workers(self) -> dict[str, WorkerInfo]:
        """Return the registered workers by name."""
        leased = and_(jobs.c.worker == workers.c.name, has_status("in_progress"))
        query = select(workers, jobs.c.id, jobs.c.started_at.label("job_started_at"))
        query = query.select_from(workers).outerjoin(jobs, leased)
        with self.database.read() as connection:
            rows = connection.execute(query).all()
        return {
            row.name: WorkerInfo(
                row.device,
                row.started_at,
                row.id,
                row.job_started_at,
                Capabilities.from_row(row.capabilities),
            )
            for row in rows
        }

    def lease(self, worker: str, warm: Collection[str] = ()) -> Lease | None:
        """Lease the next job that the worker can render, if there is one.

        The owner with the least usage is next; among the owner's jobs the highest priority, then
        the oldest. Among equals, jobs of the `warm` models, which the worker has loaded, come
        before younger than WARM_SECONDS jobs of other models. A read comes first, so that idle
        workers take no write lock.
        """
        with self.database.read() as connection:
            queued = connection.execute(_QUEUED_NEEDS).scalars().all()
            if not queued:
                return None
            capabilities = read_capabilities(connection, worker)
        accepted = [needs for needs in queued if capabilities.can_render(needs)]
        if not accepted:
            return None
        with self.database.write() as write:
            values = {
                "accepted": accepted,
                "warm": [needs for needs in accepted if model_of(needs) in warm],
                "now": write.now,
                "old": write.now - WARM_SECONDS,
            }
            owner = write.connection.execute(_NEXT_OWNER, values).scalar()
            if owner is None:
                return None
            row = write.connection.execute(_NEXT_JOB, {**values, "where_owner": owner}).one()
            if row.started_at is None:
                add_usage(write, owner, row.cost)
            token = row.token + 1
            used = begin_attempt(write, row.number, token, worker)
            job = update_job(
                write,
                read_job(write.connection, row.number),
                event="in_progress",
                status="in_progress",
                worker=worker,
                token=token,
                lease_until=write.now + self.settings.lease_seconds,
                started_at=row.started_at or write.now,
            )
            return Lease(job, token, worker, used)

    def heartbeat(
        self,
        lease: Lease,
        *,
        progress: int = 0,
        phase: str | None = None,
        checkpoint: Mapping[str, str] | None = None,
    ) -> RequestedAction | None:
        """Renew the lease, report progress (percent) and return what the client requested.

        `checkpoint` names the assets from which another worker can resume. Raises LostLeaseError.
        """
        with self.database.write() as write:
            job = _leased_job(write.connection, lease)
            seen = {"where_name": lease.worker, "seen_at": write.now}
            write.connection.execute(_SEEN, seen)
            data = {
                "progress": max(job.progress, min(progress, _MAX_RUNNING_PROGRESS)),
                "phase": phase or job.phase,
            }
            changed = data != {"progress": job.progress, "phase": job.phase}
            values = {**data, "lease_until": write.now + self.settings.lease_seconds}
            if checkpoint is not None and checkpoint != job.checkpoint:
                values.update(checkpoint=dict(checkpoint), attempts=0)
            update_job(write, job, event="progress" if changed else None, data=data, **values)
            return _requested_action(job)

    def requested_action(self, lease: Lease) -> RequestedAction | None:
        """Read what the client requested, without renewing the lease. Raises LostLeaseError."""
        with self.database.read() as connection:
            return _requested_action(_leased_job(connection, lease))

    def finish(self, lease: Lease, result: JobResult) -> Job | None:
        """Complete the job with its result. Raises LostLeaseError.

        A job being cancelled becomes cancelled; a deleted one is removed (None). Repeating the
        call with the same lease changes nothing.
        """
        with self.database.write() as write:
            stored = select(results.c.job).where(
                results.c.job == lease.job.number, results.c.token == lease.token
            )
            if write.connection.execute(stored).first() is not None:
                return read_job(write.connection, lease.job.number)
            job = _leased_job(write.connection, lease)
            if _requested_action(job) == "cancel":
                return apply_requested_action(write, job, "cancel")
            row = {
                "job": job.number,
                "token": lease.token,
                "assets": dict(result.assets),
                "receipt": dict(result.receipt),
                "created_at": write.now,
            }
            write.connection.execute(insert(results).values(**row))
            keep = self.settings.keep_seconds
            expires_at = None if keep is None else write.now + keep
            return end_attempt(
                write, job, "completed", progress=100, checkpoint={}, expires_at=expires_at
            )

    def fail(
        self,
        lease: Lease,
        failure: JobFailure,
        *,
        retry_in: float | None = None,
        checkpoint: Mapping[str, str] | None = None,
    ) -> Job | None:
        """Report that the attempt failed. Raises LostLeaseError.

        With `retry_in` (seconds) the job is queued again, from `checkpoint` if given, while
        attempts and time are left; without it the job fails.
        """
        with self.database.write() as write:
            job = _leased_job(write.connection, lease)
            if checkpoint is not None and checkpoint != job.checkpoint:
                job = update_job(write, job, checkpoint=dict(checkpoint), attempts=0)
            if failure.rule is not None:
                count_refusal(write, failure.rule, failure.target or "", failure.code)
            return self._fail_attempt(write, job, failure, retry_in)

    def release(self, lease: Lease, checkpoint: Mapping[str, str] | None = None) -> Job | None:
        """Return the job without a failed attempt. Raises LostLeaseError.

        It is cancelled or paused if that was requested, else queued to resume from `checkpoint`.
        """
        with self.database.write() as write:
            job = _leased_job(write.connection, lease)
            action = _requested_action(job)
            if checkpoint is not None:
                job = update_job(write, job, checkpoint=dict(checkpoint))
            if action is None:
                return end_attempt(write, job, "queued")
            return apply_requested_action(write, job, action)

    def unfinished(self, ids: Sequence[str]) -> set[str]:
        """Return those ids whose jobs are active."""
        query = select(jobs.c.id).where(jobs.c.id.in_(ids), IS_ACTIVE)
        with self.database.read() as connection:
            return set(connection.execute(query).scalars())

    def requeue_worker_jobs(self, worker: str) -> int:
        """Remove a dead worker and end its leases at once; return the number of its jobs."""
        with self.database.write() as write:
            write.connection.execute(delete(workers).where(workers.c.name == worker))
            return self._end_leases(write, jobs.c.worker == worker)

    def expire(self) -> int:
        """End leases that ran out, and expire jobs and results; return the number of leases.

        Expires EXPIRE_ROWS of each at most, and deletes workers not seen for KEEP_WORKERS. Any
        worker or server may call it at any time.
        """
        with self.database.write() as write:
            lost = self._end_leases(write, jobs.c.lease_until < write.now)
            for query in _EXPIRED:
                for row in write.connection.execute(query, {"now": write.now}).all():
                    _expire_job(write, as_job(row))
            unseen = workers.c.seen_at < write.now - KEEP_WORKERS
            write.connection.execute(delete(workers).where(unseen))
            return lost

    def _end_leases(self, write: Write, condition: ColumnElement[bool]) -> int:
        """End the attempts of running jobs whose workers are lost; return their number."""
        rows = write.connection.execute(_RUNNING.where(condition)).all()
        for row in rows:
            job = as_job(row)
            count = job.attempts + 1
            lost = JobFailure("worker_lost", f"The worker was lost; failed attempts: {count}.")
            action = _requested_action(job)
            if action is None:
                self._fail_attempt(write, job, lost, retry_in=0.0)
            else:
                apply_requested_action(write, job, action, attempt_error=lost)
        return len(rows)

    def _fail_attempt(
        self, write: Write, job: Job, failure: JobFailure, retry_in: float | None
    ) -> Job | None:
        """End an attempt by a failure: queue or pause the job to retry it, or fail it."""
        if _requested_action(job) == "cancel":
            return apply_requested_action(write, job, "cancel", attempt_error=failure)
        attempts = job.attempts + 1
        used = seconds_used(write.connection, job.number, write.now)
        if retry_in is not None and (limit := job_time_failure(self.settings, used)) is not None:
            failure = limit
            retry_in = None
        if retry_in is None or attempts >= self.settings.max_attempts:
            # a rejected job keeps none of the frames that it made
            kept = {} if failure.rule is not None else job.checkpoint
            return end_attempt(
                write, job, "failed", error=failure, attempts=attempts, checkpoint=kept
            )
        status = "queued" if job.requested_action is None else "paused"
        run_after = write.now + retry_in
        return end_attempt(
            write, job, status, attempt_error=failure, attempts=attempts, run_after=run_after
        )


def _expire_job(write: Write, job: Job) -> None:
    """Expire a job that missed its deadline, or whose result has expired."""
    write.connection.execute(delete(results).where(results.c.job == job.number))
    ended = job.completed_at or write.now
    update_job(write, job, event="expired", status="expired", completed_at=ended)


def _requested_action(job: Job) -> RequestedAction | None:
    """Return what the worker of a job must do with it; a deleted job is cancelled."""
    return "cancel" if job.deleted else job.requested_action


def _leased_job(connection: Connection, lease: Lease) -> Job:
    """Read the job of a valid lease. Raises LostLeaseError."""
    values = {"number": lease.job.number, "token": lease.token}
    row = connection.execute(_LEASED, values).one_or_none()
    if row is None:
        raise LostLeaseError(f"The lease of {lease.worker} on {lease.job.id} has ended.")
    return as_job(row)
