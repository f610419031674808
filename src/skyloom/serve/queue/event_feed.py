"""Read job events in the order in which they were committed, with the jobs as they are now.

Write transactions are serialised, so event numbers grow in commit order: a reader that has seen a
number has seen every event before it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from sqlalchemy import Connection, bindparam, func, select

from skyloom.serve.queue.database import MAX_PAGE, Database
from skyloom.serve.queue.job import ACTIVE, WHOLE_JOBS, Job, NotFoundError, as_job
from skyloom.serve.queue.jobs import Event
from skyloom.serve.queue.tables import events, jobs

_AFTER = (
    select(events, jobs.c.id)
    .join(jobs)
    .where(events.c.number > bindparam("after"), ~jobs.c.deleted)
    .order_by(events.c.number)
    .limit(MAX_PAGE)
)
_OF_JOB = _AFTER.where(jobs.c.id == bindparam("id"))
_NEWEST = select(func.coalesce(func.max(events.c.number), 0))


@dataclass(frozen=True)
class JobUpdate:
    """New events of a job, oldest first, and the job as it is now; `job` None: it was deleted."""

    events: tuple[Event, ...]
    job: Job | None


class EventFeed:
    """Events of all jobs. Every method is one read transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def newest(self) -> int:
        """Return the number of the newest event; 0 if there is none."""
        with self._database.read() as connection:
            return connection.execute(_NEWEST).scalar_one()

    def history(self, id: str, owner: str, after: int) -> JobUpdate:
        """Return all events of a job after a number. Raises NotFoundError."""
        with self._database.read() as connection:
            job = _find_jobs(connection, [id]).get(id)
            if job is None or job.owner != owner:
                raise NotFoundError("video", id)
            found: list[Event] = []
            while True:
                page = connection.execute(_OF_JOB, {"id": id, "after": after}).all()
                found += [
                    Event(row.number, row.id, row.type, row.data, row.created_at) for row in page
                ]
                if len(page) < MAX_PAGE:
                    return JobUpdate(tuple(found), job)
                after = page[-1].number

    def poll(self, after: int, ids: Collection[str]) -> tuple[int, Mapping[str, JobUpdate]]:
        """Read all events after a number.

        Returns the number of the last event, and by job id an update for every job of `ids` that
        has new events, has ended or was deleted.
        """
        found: dict[str, list[Event]] = {}
        with self._database.read() as connection:
            while True:
                page = connection.execute(_AFTER, {"after": after}).all()
                for row in page:
                    event = Event(row.number, row.id, row.type, row.data, row.created_at)
                    found.setdefault(row.id, []).append(event)
                after = page[-1].number if page else after
                if len(page) < MAX_PAGE:
                    break
            statuses = select(jobs.c.id, jobs.c.status).where(jobs.c.id.in_(ids), ~jobs.c.deleted)
            status_of = {row.id: row.status for row in connection.execute(statuses)}
            changed = [id for id in ids if id in found or status_of.get(id) not in ACTIVE]
            current = _find_jobs(connection, changed) if changed else {}
        return after, {id: JobUpdate(tuple(found.get(id, ())), current.get(id)) for id in changed}


def _find_jobs(connection: Connection, ids: Collection[str]) -> dict[str, Job]:
    """Return the jobs with these ids, by id, leaving out those that are deleted."""
    rows = connection.execute(WHOLE_JOBS.where(jobs.c.id.in_(ids), ~jobs.c.deleted))
    return {row.id: as_job(row) for row in rows}
