"""Leases: the workers' side of the queue. Who holds a job, for how long, and what becomes of it.

A lease lasts for `lease_seconds` from its last heartbeat and carries a token, one more than the lease before. A write
with an older token, or of a job that was taken back, raises LostLeaseError and changes nothing. What workers lose goes
back to the queue until it was lost `max_attempts` times without a new checkpoint, or was worked on for
`max_job_seconds` in all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, and_, bindparam, delete, insert, select, update

from skyloom.serve.queue.attempts import begin_attempt, seconds_used
from skyloom.serve.queue.database import Database, Write
from skyloom.serve.queue.job import (
    WHOLE_JOBS,
    Job,
    JobFailure,
    JobResult,
    LostLeaseError,
    Wanted,
    as_job,
    change,
    charge,
    leave,
    read_job,
    settle,
)
from skyloom.serve.queue.moderation_counters import count_refusal
from skyloom.serve.queue.tables import IS_ACTIVE, has_status, jobs, owners, results, workers
from skyloom.serve.queue.time_limits import job_time_failure
from skyloom.serve.settings import Settings

__all__ = ["Lease", "Leases", "LostLeaseError"]

KEEP_WORKERS = 3_600  # seconds
EXPIRE_ROWS = 500  # jobs that expire in one transaction
_ALMOST = 99  # the progress of a job that is not finished

_READY = and_(has_status("queued"), jobs.c.run_after <= bindparam("now"))
_ANY_WAITS = select(jobs.c.number).where(has_status("queued")).limit(1)
_LEAST_SERVED = (
    select(jobs.c.owner)
    .outerjoin(owners, owners.c.owner == jobs.c.owner)
    .where(_READY)
    .order_by(owners.c.served, jobs.c.number)
    .limit(1)
)
_FIRST_OF = (
    select(jobs.c.number, jobs.c.token, jobs.c.started_at, jobs.c.cost)
    .where(_READY, jobs.c.owner == bindparam("who"))
    .order_by(jobs.c.priority.desc(), jobs.c.number)
    .limit(1)
)
_HELD = WHOLE_JOBS.where(
    jobs.c.number == bindparam("number"),
    jobs.c.token == bindparam("token"),
    jobs.c.status == "in_progress",
)
_SEEN = update(workers).where(workers.c.name == bindparam("who")).values(seen_at=bindparam("now"))
_LOST = WHOLE_JOBS.where(has_status("in_progress"))
_OUTLIVED = [
    WHOLE_JOBS.where(outlived).limit(EXPIRE_ROWS)
    for outlived in (
        and_(has_status("queued"), jobs.c.started_at.is_(None), jobs.c.deadline < bindparam("now")),
        and_(has_status("completed"), jobs.c.expires_at < bindparam("now")),
    )
]


@dataclass(frozen=True)
class Lease:
    """A job in a worker's hands; `token` is larger than any that the job had before, `used` is how many seconds earlier
    attempts took."""

    job: Job
    token: int
    worker: str
    used: float = 0.0


@dataclass(frozen=True)
class Hand:
    """A worker that was seen: its device, since when it works, the job that it holds and when that was first begun."""

    device: str
    started_at: float
    job: str | None
    job_begun_at: float | None


class Leases:
    """The workers' side of the queue. Every method is one transaction."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self.database = database
        self.settings = settings

    def greet(self, worker: str, device: str) -> None:
        """Be seen."""
        with self.database.write() as write:
            seen = (
                update(workers)
                .where(workers.c.name == worker)
                .values(seen_at=write.now, device=device)
            )
            if not write.connection.execute(seen).rowcount:
                row = {
                    "name": worker,
                    "device": device,
                    "started_at": write.now,
                    "seen_at": write.now,
                }
                write.connection.execute(insert(workers).values(**row))

    def hands(self) -> dict[str, Hand]:
        """Every worker that said hello and was not forgotten, by its name."""
        held = and_(jobs.c.worker == workers.c.name, has_status("in_progress"))
        look = select(workers, jobs.c.id, jobs.c.started_at.label("begun")).select_from(workers)
        look = look.outerjoin(jobs, held)
        with self.database.read() as connection:
            rows = connection.execute(look).all()
        return {row.name: Hand(row.device, row.started_at, row.id, row.begun) for row in rows}

    def lease(self, worker: str) -> Lease | None:
        """The next job, if one waits: of the owner who was served least, the one of highest priority, then the oldest.

        A look that writes nothing comes first, so that idle workers disturb nobody.
        """
        with self.database.read() as connection:
            if connection.execute(_ANY_WAITS).first() is None:
                return None
        with self.database.write() as write:
            owner = write.connection.execute(_LEAST_SERVED, {"now": write.now}).scalar()
            if owner is None:
                return None
            row = write.connection.execute(_FIRST_OF, {"now": write.now, "who": owner}).one()
            if row.started_at is None:
                charge(write, owner, row.cost)
            values = {"status": "in_progress", "worker": worker, "token": row.token + 1}
            values |= {
                "lease_until": write.now + self.settings.lease_seconds,
                "started_at": row.started_at or write.now,
            }
            used = begin_attempt(write, row.number, row.token + 1, worker)
            job = read_job(write.connection, row.number)
            return Lease(
                change(write, job, event="in_progress", **values), row.token + 1, worker, used
            )

    def heartbeat(
        self,
        lease: Lease,
        *,
        progress: int = 0,
        phase: str | None = None,
        checkpoint: Mapping[str, str] | None = None,
    ) -> Wanted | None:
        """Keep the lease, say how far it is (percent), and hear what is wanted. Raises LostLeaseError.

        `checkpoint` names the stored assets from which another worker could go on.
        """
        with self.database.write() as write:
            job = _held(write.connection, lease)
            write.connection.execute(_SEEN, {"who": lease.worker, "now": write.now})
            values: dict[str, object] = {"lease_until": write.now + self.settings.lease_seconds}
            values |= {
                "progress": max(job.progress, min(progress, _ALMOST)),
                "phase": phase or job.phase,
            }
            if checkpoint is not None and checkpoint != job.checkpoint:
                values |= {"checkpoint": dict(checkpoint), "attempts": 0}
            moved = values["progress"] != job.progress or values["phase"] != job.phase
            data = {"progress": values["progress"], "phase": values["phase"]}
            change(write, job, event="progress" if moved else None, data=data, **values)
            return "cancel" if job.deleted else job.wanted

    def wanted(self, lease: Lease) -> Wanted | None:
        """What is wanted, without a write; the lease is no longer for it. Raises LostLeaseError."""
        with self.database.read() as connection:
            job = _held(connection, lease)
            return "cancel" if job.deleted else job.wanted

    def finish(self, lease: Lease, result: JobResult) -> Job | None:
        """Hand in what was made: once for each job, whoever made it. Raises LostLeaseError.

        A job that was to be cancelled is cancelled, one that was deleted is None. The same call twice is one call.
        """
        with self.database.write() as write:
            made = select(results.c.job).where(
                results.c.job == lease.job.number, results.c.token == lease.token
            )
            if write.connection.execute(made).first() is not None:
                return read_job(write.connection, lease.job.number)
            job = _held(write.connection, lease)
            if job.deleted or job.wanted == "cancel":
                return settle(write, job, "cancel")
            row = {"job": job.number, "token": lease.token, "assets": dict(result.assets)}
            row |= {"receipt": dict(result.receipt), "created_at": write.now}
            write.connection.execute(insert(results).values(**row))
            keep = self.settings.keep_seconds
            expires = None if keep is None else write.now + keep
            return leave(write, job, "completed", progress=100, checkpoint={}, expires_at=expires)

    def fail(
        self,
        lease: Lease,
        failure: JobFailure,
        *,
        retry_in: float | None = None,
        checkpoint: Mapping[str, str] | None = None,
    ) -> Job | None:
        """Say that it went wrong. With `retry_in` (seconds) it is tried again, from a last `checkpoint` if there is
        one, so long as attempts and time are left. Raises LostLeaseError.
        """
        with self.database.write() as write:
            job = _held(write.connection, lease)
            if checkpoint is not None and checkpoint != job.checkpoint:
                job = change(write, job, checkpoint=dict(checkpoint), attempts=0)
            if failure.rule is not None:
                count_refusal(write, failure.rule, failure.target or "", failure.code)
            return self._gone_wrong(write, job, failure, retry_in)

    def release(self, lease: Lease, checkpoint: Mapping[str, str] | None = None) -> Job | None:
        """Let a job go, which is no failed attempt: cancelled or paused where that was wanted, else to be gone on with,
        from a last `checkpoint` if there is one. Raises LostLeaseError.
        """
        with self.database.write() as write:
            job = _held(write.connection, lease)
            wanted = "cancel" if job.deleted else job.wanted
            if checkpoint is not None:
                job = change(write, job, checkpoint=dict(checkpoint))
            return leave(write, job, "queued") if wanted is None else settle(write, job, wanted)

    def unfinished(self, ids: Sequence[str]) -> set[str]:
        """Which of these jobs may still be worked on."""
        look = select(jobs.c.id).where(jobs.c.id.in_(ids), IS_ACTIVE)
        with self.database.read() as connection:
            return set(connection.execute(look).scalars())

    def forget(self, worker: str) -> int:
        """A worker is known to be dead: what it held is lost now. Returns how many jobs that were."""
        with self.database.write() as write:
            write.connection.execute(delete(workers).where(workers.c.name == worker))
            return self._take_back(write, jobs.c.worker == worker)

    def expire(self) -> int:
        """Take back leases that ran out, drop results and deadlines that are over (EXPIRE_ROWS of each at most), forget
        workers. Returns how many leases were taken back. Any worker or server may call it at any time."""
        with self.database.write() as write:
            lost = self._take_back(write, jobs.c.lease_until < write.now)
            outlived = [
                row
                for look in _OUTLIVED
                for row in write.connection.execute(look, {"now": write.now})
            ]
            for job in map(as_job, outlived):
                write.connection.execute(delete(results).where(results.c.job == job.number))
                change(
                    write,
                    job,
                    event="expired",
                    status="expired",
                    completed_at=job.completed_at or write.now,
                )
            write.connection.execute(
                delete(workers).where(workers.c.seen_at < write.now - KEEP_WORKERS)
            )
            return lost

    def _take_back(self, write: Write, which: ColumnElement[bool]) -> int:
        """Jobs whose workers are lost, as each deserves."""
        rows = write.connection.execute(_LOST.where(which)).all()
        for row in rows:
            job = as_job(row)
            if job.deleted or job.wanted is not None:
                settle(write, job, "cancel" if job.deleted else job.wanted or "cancel")
            else:
                lost = JobFailure(
                    "worker_lost",
                    f"The worker was lost {job.attempts + 1} times while it made this.",
                )
                self._gone_wrong(write, job, lost, retry_in=0.0)
        return len(rows)

    def _gone_wrong(
        self, write: Write, job: Job, failure: JobFailure, retry_in: float | None
    ) -> Job | None:
        if job.deleted or job.wanted == "cancel":
            return settle(write, job, "cancel")
        attempts = job.attempts + 1
        used = seconds_used(write.connection, job.number, write.now)
        if retry_in is not None and (late := job_time_failure(self.settings, used)) is not None:
            failure, retry_in = late, None
        if retry_in is None or attempts >= self.settings.max_attempts:
            kept = {} if failure.rule is not None else job.checkpoint  # nothing of what was refused
            return leave(write, job, "failed", error=failure, attempts=attempts, checkpoint=kept)
        status = "queued" if job.wanted is None else "paused"
        return leave(
            write, job, status, cause=failure, attempts=attempts, run_after=write.now + retry_in
        )


def _held(connection: Connection, lease: Lease) -> Job:
    """The job, if it is still this lease's. Raises LostLeaseError."""
    row = connection.execute(
        _HELD, {"number": lease.job.number, "token": lease.token}
    ).one_or_none()
    if row is None:
        raise LostLeaseError(f"{lease.job.id} is no longer in the hands of {lease.worker}.")
    return as_job(row)
