# pyright: basic
"""Batches: many videos from one file of JSON lines, one job per line.

Lines become jobs in order, as the owner's queue has room; `next_line` is the first that was not
submitted. Each line has its own idempotency key, so a server that dies between two writes submits
no line twice. batch_jobs holds the jobs whose end is not counted yet, at most as many as may be
queued. When all lines are counted, the responses are written to files. Reading a batch reads one
row, and the cost of a tick does not depend on the length of a batch.
"""

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from sqlalchemy import Row, delete, insert, or_, select, update

from skyloom.core.errors import CapacityError, SkyloomError
from skyloom.serve.queue.database import Database, read_page
from skyloom.serve.queue.errors import NotFoundError
from skyloom.serve.queue.jobs import Job, JobStore
from skyloom.serve.queue.quotas import Quotas
from skyloom.serve.queue.tables import IS_ACTIVE, batch_jobs, batch_lines, batches, jobs

WINDOW_SECONDS = 24 * 3600  # until a batch expires
MAX_LINES = 10_000
LINES_PER_TICK = 100  # submitted per owner
_FINISH_LINES = 500  # responses written at a time
_ENDED_ROWS = 1_000  # ended jobs counted in one tick

# Jobs of batches that have ended or were deleted since the last tick.
_ENDED = (
    select(batch_jobs.c.job, batch_jobs.c.batch, jobs.c.status)
    .outerjoin(jobs, jobs.c.id == batch_jobs.c.job)
    .where(or_(jobs.c.status.is_(None), ~IS_ACTIVE))
    .limit(_ENDED_ROWS)
)
_OPEN = select(batches).where(batches.c.completed_at.is_(None)).order_by(batches.c.number)


@dataclass(frozen=True)
class BatchActions:
    """Functions of the API that `BatchStore.advance` calls."""

    submit: Callable[[str, Mapping[str, Any], str, float], Job]  # owner, body, key, deadline
    write_file: Callable[[str, str, bytes], str]  # owner, name, content; returns the file's id
    describe_job: Callable[[Job], Mapping[str, Any]]  # body of a response
    describe_error: Callable[[SkyloomError, str], Mapping[str, Any]]  # with its HTTP `status`


@dataclass(frozen=True)
class Line:
    """A request of a batch."""

    custom_id: str
    body: Mapping[str, Any]


@dataclass(frozen=True)
class Batch:
    """A batch and its progress. Times are seconds since 1970."""

    number: int
    id: str
    owner: str
    input_file: str
    metadata: Mapping[str, str]
    output_file: str | None
    error_file: str | None
    created_at: float
    expires_at: float
    completed_at: float | None
    cancelled_at: float | None
    total: int
    next_line: int
    completed: int
    failed: int

    @property
    def status(self) -> str:
        """Status in the words of OpenAI's API."""
        if self.completed_at is not None:
            return "cancelled" if self.cancelled_at is not None else "completed"
        return "cancelling" if self.cancelled_at is not None else "in_progress"


class BatchStore:
    """Batches in the database. Methods raise NotFoundError for batches of another owner."""

    def __init__(self, database: Database, jobs: JobStore, quotas: Quotas | None = None) -> None:
        self._database = database
        self._jobs = jobs
        self._quotas = quotas or Quotas()

    def check_room(self, owner: str) -> None:
        """Check the owner's quota before the input file is read. Raises QuotaError."""
        now = self._database.now()
        with self._database.read() as connection:
            self._quotas.check(connection, owner, now, batches=1)

    def create(
        self, owner: str, input_file: str, metadata: Mapping[str, str], lines: Sequence[Line]
    ) -> Batch:
        """Add a batch of at least one line. Raises QuotaError."""
        with self._database.write() as write:
            self._quotas.check(write.connection, owner, write.now, batches=1)
            values = {
                "id": f"batch_{secrets.token_hex(16)}",
                "owner": owner,
                "input_file": input_file,
                "metadata": dict(metadata),
                "created_at": write.now,
                "expires_at": write.now + WINDOW_SECONDS,
                "total": len(lines),
            }
            row = write.connection.execute(
                insert(batches).values(**values).returning(batches)
            ).one()
            rows = [
                {"batch": row.number, "line": index, **vars(line)}
                for index, line in enumerate(lines)
            ]
            write.connection.execute(insert(batch_lines), rows)
            return Batch(**row._mapping)

    def get(self, id: str, owner: str) -> Batch:
        """Read a batch."""
        query = select(batches).where(batches.c.id == id, batches.c.owner == owner)
        with self._database.read() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            raise NotFoundError("batch", id)
        return Batch(**row._mapping)

    def list(self, owner: str, *, after: str | None, limit: int) -> tuple[list[Batch], bool]:
        """Read a page of batches, the newest first, and whether there are more."""
        query = select(batches).where(batches.c.owner == owner)
        if after is not None:
            query = query.where(batches.c.number < self.get(after, owner).number)
        with self._database.read() as connection:
            rows, more = read_page(connection, query.order_by(batches.c.number.desc()), limit)
        return [Batch(**row._mapping) for row in rows], more

    def cancel(self, id: str, owner: str) -> Batch:
        """Cancel the jobs that have not ended and the lines that were not submitted."""
        batch = self.get(id, owner)
        if batch.completed_at is None and batch.cancelled_at is None:
            with self._database.write() as write:
                change = update(batches).where(batches.c.number == batch.number)
                write.connection.execute(change.values(cancelled_at=write.now))
            self._stop(self.get(id, owner))
        return self.get(id, owner)

    def advance(self, actions: BatchActions) -> None:
        """Count ended jobs, submit lines for which there is room, and finish complete batches.

        Submits at most LINES_PER_TICK lines per owner, of her oldest batch that has lines left.
        """
        self._count_ended()
        submitting: set[str] = set()
        for batch in self._open_batches():
            if batch.cancelled_at is not None or batch.expires_at <= self._database.now():
                self._stop(batch)
            elif batch.next_line < batch.total and batch.owner not in submitting:
                submitting.add(batch.owner)
                self._submit_lines(batch, actions)
        for batch in self._open_batches():
            if batch.completed + batch.failed >= batch.total:
                self._finish(batch, actions)

    def _open_batches(self) -> Sequence[Batch]:
        with self._database.read() as connection:
            return [Batch(**row._mapping) for row in connection.execute(_OPEN)]

    def _count_ended(self) -> None:
        """Add the jobs that have ended since the last tick to the counters of their batches."""
        with self._database.read() as connection:
            rows = connection.execute(_ENDED).all()
        if not rows:
            return
        with self._database.write() as write:
            for row in rows:
                uncounted = delete(batch_jobs).where(batch_jobs.c.job == row.job)
                if write.connection.execute(uncounted).rowcount:  # 0 if another server counted it
                    counter = batches.c.completed if row.status == "completed" else batches.c.failed
                    change = update(batches).where(batches.c.number == row.batch)
                    write.connection.execute(change.values({counter: counter + 1}))

    def _stop(self, batch: Batch) -> None:
        """Cancel the jobs of a cancelled batch, and count the lines not submitted as failed."""
        if batch.cancelled_at is not None:
            query = select(batch_jobs.c.job).where(batch_jobs.c.batch == batch.number)
            with self._database.read() as connection:
                ids = connection.execute(query).scalars().all()
            for id in ids:
                with suppress(NotFoundError):
                    self._jobs.cancel(id, batch.owner)
        if batch.next_line < batch.total:
            left = batches.c.total - batches.c.next_line
            change = update(batches).where(batches.c.number == batch.number)
            change = change.values(failed=batches.c.failed + left, next_line=batches.c.total)
            with self._database.write() as write:
                write.connection.execute(change)

    def _submit_lines(self, batch: Batch, actions: BatchActions) -> None:
        """Submit the next lines.

        An error that passes by waiting, such as a full queue, ends the tick; any other is recorded
        as the line's error.
        """
        room = min(self._jobs.room(batch.owner), LINES_PER_TICK)
        if not room:
            return
        for row in self._read_lines(batch.number, batch.next_line, room):
            key = f"{batch.id}:{row.line}"
            try:
                job = actions.submit(batch.owner, row.body, key, batch.expires_at)
            except SkyloomError as error:
                if isinstance(error, CapacityError) and error.retry_after is not None:
                    return
                details = dict(actions.describe_error(error, batch.id))
                self._record_line(batch, row.line, error=details)
            else:
                if not self._record_line(batch, row.line, job=job.id):
                    self._cancel_unrecorded(batch, row.line, job)

    def _record_line(self, batch: Batch, line: int, **values: Any) -> bool:
        """Record the `job` or `error` of the next line; False if the line is not the next."""
        is_next = (batches.c.number == batch.number, batches.c.next_line == line)
        with self._database.write() as write:
            change = update(batches).where(*is_next).values(next_line=line + 1)
            if "error" in values:
                change = change.values(failed=batches.c.failed + 1)
            if not write.connection.execute(change).rowcount:
                return False
            is_line = (batch_lines.c.batch == batch.number, batch_lines.c.line == line)
            write.connection.execute(update(batch_lines).where(*is_line).values(**values))
            if "job" in values:
                row = {"job": values["job"], "batch": batch.number, "line": line}
                write.connection.execute(insert(batch_jobs).values(**row))
        return True

    def _cancel_unrecorded(self, batch: Batch, line: int, job: Job) -> None:
        """Cancel the job of a line stopped meanwhile, unless another server recorded it."""
        if all(row.job != job.id for row in self._read_lines(batch.number, line, 1)):
            with suppress(NotFoundError):
                self._jobs.cancel(job.id, batch.owner)

    def _finish(self, batch: Batch, actions: BatchActions) -> None:
        """Write the responses of all lines to an output and an error file."""
        outputs = BytesIO()
        errors = BytesIO()
        for first in range(0, batch.total, _FINISH_LINES):
            rows = self._read_lines(batch.number, first, _FINISH_LINES)
            found = self._jobs.find([row.job for row in rows if row.job is not None], batch.owner)
            for row in rows:
                job = found.get(row.job)
                if job is not None and row.error is None:
                    body = dict(actions.describe_job(job))
                    outputs.write(_response_line(row, batch, 200, body))
                else:
                    error = row.error or _missing_job_error(row, batch)
                    status = int(error.get("status", 400))
                    errors.write(_response_line(row, batch, status, {"error": error}))
        values: dict[str, Any] = {}
        for name, content in (("output", outputs.getvalue()), ("error", errors.getvalue())):
            if content:
                file = actions.write_file(batch.owner, f"{batch.id}_{name}.jsonl", content)
                values[f"{name}_file"] = file
        with self._database.write() as write:
            is_open = (batches.c.number == batch.number, batches.c.completed_at.is_(None))
            change = update(batches).where(*is_open)
            write.connection.execute(change.values(**values, completed_at=write.now))

    def _read_lines(self, number: int, first: int, count: int) -> Sequence[Row[Any]]:
        """Read lines of a batch in order, from line `first`."""
        query = select(batch_lines).where(
            batch_lines.c.batch == number, batch_lines.c.line >= first
        )
        with self._database.read() as connection:
            return connection.execute(query.order_by(batch_lines.c.line).limit(count)).all()


def _missing_job_error(row: Row[Any], batch: Batch) -> dict[str, Any]:
    """Build the error of a line whose job was deleted or never submitted."""
    if row.job is not None:
        return {"status": 404, "code": "not_found", "message": "It was deleted."}
    code = "batch_cancelled" if batch.cancelled_at is not None else "batch_expired"
    return {"code": code, "message": "The batch ended before this line."}


def _response_line(row: Row[Any], batch: Batch, status: int, body: Mapping[str, Any]) -> bytes:
    """Encode one line of an output or error file."""
    line = {
        "id": f"batch_req_{batch.number}_{row.line}",
        "custom_id": row.custom_id,
        "response": {
            "status_code": status,
            "request_id": f"{batch.id}_{row.line}",
            "body": body,
        },
        "error": None,
    }
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"
