"""Batches: many videos by one file of JSON lines, one line a job.

A batch's lines become jobs as the owner's queue has room, in order: `next_line` is the first that was not submitted. A
line has its own idempotency key, so a server that dies between two of its writes makes no video twice. Jobs that have
not been counted yet stand in batch_jobs, which holds no more rows than jobs may wait. When all lines are counted, the
answers are written to a file. So a look at a batch reads one row, and a tick costs the same however long a batch is.
"""

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    Row,
    String,
    Table,
    Text,
    delete,
    insert,
    or_,
    select,
    text,
    update,
)

from skyloom.core.errors import CapacityError, SkyloomError
from skyloom.serve.api.errors import missing, to_api_error
from skyloom.serve.queue.database import Database, read_page
from skyloom.serve.queue.jobs import Job, JobStore, MissingJobError
from skyloom.serve.queue.quotas import Quotas
from skyloom.serve.queue.tables import IS_ACTIVE, metadata
from skyloom.serve.queue.tables import jobs as job_table

WINDOW_SECONDS = 24 * 3600
MAX_LINES = 10_000
_NUMBER = BigInteger().with_variant(Integer, "sqlite")
Submit = Callable[[str, Mapping[str, Any], str, float], Job]
Write = Callable[[str, str, bytes], str]

_COUNTERS = ("total", "next_line", "completed", "failed")
LINES_PER_TICK = 100  # of an owner
_FINISH_LINES = 500  # answers written at a time

batches = Table(
    "batches",
    metadata,
    Column("number", _NUMBER, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("owner", String(128), nullable=False),
    Column("input_file", String(64), nullable=False),
    Column("metadata", JSON, nullable=False),
    Column("output_file", String(64)),
    Column("error_file", String(64)),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
    Column("completed_at", Double, index=True),
    Column("cancelled_at", Double),
    *(Column(name, Integer, nullable=False, server_default=text("0")) for name in _COUNTERS),
    Index("batches_of_owner", "owner", "number"),
    sqlite_autoincrement=True,
)

lines = Table(
    "batch_lines",
    metadata,
    Column("batch", _NUMBER, ForeignKey("batches.number", ondelete="CASCADE"), primary_key=True),
    Column("line", Integer, primary_key=True),
    Column("custom_id", Text, nullable=False),
    Column("body", JSON, nullable=False),
    Column("job", String(64)),
    Column("error", JSON(none_as_null=True)),
)

batch_jobs = Table(  # jobs of lines, until their end is counted
    "batch_jobs",
    metadata,
    Column("job", String(64), primary_key=True),
    Column(
        "batch",
        _NUMBER,
        ForeignKey("batches.number", ondelete="CASCADE"),
        nullable=False,
        index=True,
    ),
    Column("line", Integer, nullable=False),
)

# Jobs of batches that have ended or were deleted since the last tick, and who may submit.
_ENDED = (
    select(batch_jobs.c.job, batch_jobs.c.batch, job_table.c.status)
    .outerjoin(job_table, job_table.c.id == batch_jobs.c.job)
    .where(or_(job_table.c.status.is_(None), ~IS_ACTIVE))
    .limit(1_000)
)
_OPEN = select(batches).where(batches.c.completed_at.is_(None)).order_by(batches.c.number)


@dataclass(frozen=True)
class Line:
    """A request of a batch."""

    custom_id: str
    body: Mapping[str, Any]


@dataclass(frozen=True)
class Batch:
    """A batch and how far it is."""

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
        """The word that clients know for it."""
        if self.completed_at is not None:
            return "cancelled" if self.cancelled_at is not None else "completed"
        return "cancelling" if self.cancelled_at is not None else "in_progress"


class BatchStore:
    """Batches in the database. What is somebody else's is not there (ApiError, 404)."""

    def __init__(self, database: Database, jobs: JobStore, quotas: Quotas | None = None) -> None:
        self._database, self._jobs, self._quotas = database, jobs, quotas or Quotas()

    def check_room(self, owner: str) -> None:
        """Refuse what `create` would, before the file is read. Raises QuotaError."""
        now = self._database.now()
        with self._database.read() as connection:
            self._quotas.take(connection, owner, now, batches=1)

    def create(
        self, owner: str, input_file: str, metadata: Mapping[str, str], asked: Sequence[Line]
    ) -> Batch:
        """A new batch of at least one line. Raises QuotaError."""
        id = f"batch_{secrets.token_hex(16)}"
        with self._database.write() as write:
            self._quotas.take(write.connection, owner, write.now, batches=1)
            row = {"id": id, "owner": owner, "input_file": input_file, "metadata": dict(metadata)}
            times = {"created_at": write.now, "expires_at": write.now + WINDOW_SECONDS}
            write.connection.execute(insert(batches).values(**row, **times, total=len(asked)))
            number = write.connection.execute(
                select(batches.c.number).where(batches.c.id == id)
            ).scalar_one()
            rows = [
                {"batch": number, "line": index, **vars(line)} for index, line in enumerate(asked)
            ]
            write.connection.execute(insert(lines), rows)
        return self.get(id, owner)

    def get(self, id: str, owner: str) -> Batch:
        """A batch of the owner's."""
        with self._database.read() as connection:
            row = connection.execute(
                select(batches).where(batches.c.id == id, batches.c.owner == owner)
            ).one_or_none()
        if row is None:
            raise missing("batch", id)
        return Batch(**row._mapping)

    def list(self, owner: str, *, after: str | None, limit: int) -> tuple[list[Batch], bool]:
        """A page of batches, the newest first, and whether there are more."""
        wanted = [batches.c.owner == owner]
        if after is not None:
            wanted.append(batches.c.number < self.get(after, owner).number)
        with self._database.read() as connection:
            look = select(batches).where(*wanted).order_by(batches.c.number.desc())
            rows, more = read_page(connection, look, limit)
        return [Batch(**row._mapping) for row in rows], more

    def cancel(self, id: str, owner: str) -> Batch:
        """Stop what has not ended yet."""
        found = self.get(id, owner)
        if found.completed_at is None and found.cancelled_at is None:
            with self._database.write() as write:
                change = update(batches).where(batches.c.number == found.number)
                write.connection.execute(change.values(cancelled_at=write.now))
            self._stop(self.get(id, owner))
        return self.get(id, owner)

    def advance(
        self, submit: Submit, write_file: Write, show: Callable[[Job], Mapping[str, Any]]
    ) -> None:
        """Count what has ended, turn lines into jobs as far as there is room, and end the batches that are through.

        At most LINES_PER_TICK lines of each owner are submitted, of her oldest batch that has some left.
        """
        self._count_ended()
        served: set[str] = set()
        for batch in self._open():
            if batch.cancelled_at is not None or batch.expires_at <= self._database.now():
                self._stop(batch)
            elif batch.next_line < batch.total and batch.owner not in served:
                served.add(batch.owner)
                self._submit(batch, submit)
        for batch in self._open():
            if batch.completed + batch.failed >= batch.total:
                self._finish(batch, write_file, show)

    def _open(self) -> Sequence[Batch]:
        with self._database.read() as connection:
            return [Batch(**row._mapping) for row in connection.execute(_OPEN)]

    def _count_ended(self) -> None:
        """Add the jobs that have ended since the last tick to their batches' counters."""
        with self._database.read() as connection:
            rows = connection.execute(_ENDED).all()
        if not rows:
            return
        with self._database.write() as write:
            for row in rows:
                mine = delete(batch_jobs).where(batch_jobs.c.job == row.job)
                if write.connection.execute(mine).rowcount:  # another server may have been faster
                    counter = batches.c.completed if row.status == "completed" else batches.c.failed
                    add = update(batches).where(batches.c.number == row.batch)
                    write.connection.execute(add.values({counter: counter + 1}))

    def _stop(self, batch: Batch) -> None:
        """Cancel the jobs of a batch that was cancelled, and count the lines that will never be submitted as failed."""
        if batch.cancelled_at is not None:
            with self._database.read() as connection:
                mine = connection.execute(
                    select(batch_jobs.c.job).where(batch_jobs.c.batch == batch.number)
                )
                ids = mine.scalars().all()
            for id in ids:
                with suppress(MissingJobError):
                    self._jobs.cancel(id, batch.owner)
        if batch.next_line < batch.total:
            left = batches.c.total - batches.c.next_line
            change = update(batches).where(batches.c.number == batch.number)
            change = change.values(failed=batches.c.failed + left, next_line=batches.c.total)
            with self._database.write() as write:
                write.connection.execute(change)

    def _submit(self, batch: Batch, submit: Submit) -> None:
        """Submit the next lines. Where waiting helps, as for a full queue, they go on waiting; any other error is the
        line's own."""
        room = min(self._jobs.room(batch.owner), LINES_PER_TICK)
        if not room:
            return
        for row in self._lines(batch.number, batch.next_line, room):
            try:
                job = submit(batch.owner, row.body, f"{batch.id}:{row.line}", batch.expires_at)
            except SkyloomError as error:
                if isinstance(error, CapacityError) and error.retry_after is not None:
                    return
                told = to_api_error(error, batch.id)
                self._note(batch, row.line, error={"status": told.status, **told.body["error"]})
            else:
                if not self._note(batch, row.line, job=job.id):
                    self._drop_unless_noted(batch, row.line, job)

    def _note(self, batch: Batch, line: int, **values: Any) -> bool:
        """What became of the next line. False where it is not the next any more."""
        next_one = (batches.c.number == batch.number, batches.c.next_line == line)
        with self._database.write() as write:
            change = update(batches).where(*next_one).values(next_line=line + 1)
            if "error" in values:
                change = change.values(failed=batches.c.failed + 1)
            if not write.connection.execute(change).rowcount:
                return False
            mine = (lines.c.batch == batch.number, lines.c.line == line)
            write.connection.execute(update(lines).where(*mine).values(**values))
            if "job" in values:
                row = {"job": values["job"], "batch": batch.number, "line": line}
                write.connection.execute(insert(batch_jobs).values(**row))
        return True

    def _drop_unless_noted(self, batch: Batch, line: int, job: Job) -> None:
        """Cancel the job of a line that was given up meanwhile; one that another server has noted is the same job."""
        if all(row.job != job.id for row in self._lines(batch.number, line, 1)):
            with suppress(MissingJobError):
                self._jobs.cancel(job.id, batch.owner)

    def _finish(
        self, batch: Batch, write_file: Write, show: Callable[[Job], Mapping[str, Any]]
    ) -> None:
        """Write the answers of all lines to files, _FINISH_LINES at a time."""
        outputs, errors = BytesIO(), BytesIO()
        for first in range(0, batch.total, _FINISH_LINES):
            rows = self._lines(batch.number, first, _FINISH_LINES)
            made = self._jobs.find([row.job for row in rows if row.job is not None], batch.owner)
            for row in rows:
                job = made.get(row.job)
                if job is not None and row.error is None:
                    outputs.write(_answer(row, batch, 200, dict(show(job))))
                else:
                    error = row.error or _never_made(row, batch)
                    errors.write(
                        _answer(row, batch, int(error.get("status", 400)), {"error": error})
                    )
        files = {
            name: write_file(batch.owner, f"{batch.id}_{name}.jsonl", text.getvalue())
            if text.tell()
            else None
            for name, text in (("output", outputs), ("error", errors))
        }
        with self._database.write() as write:
            change = update(batches).where(
                batches.c.number == batch.number, batches.c.completed_at.is_(None)
            )
            values = {
                "output_file": files["output"],
                "error_file": files["error"],
                "completed_at": write.now,
            }
            write.connection.execute(change.values(**values))

    def _lines(self, number: int, first: int, count: int) -> Sequence[Row[Any]]:
        """Some lines in order, from the one with a number."""
        look = (
            select(lines)
            .where(lines.c.batch == number, lines.c.line >= first)
            .order_by(lines.c.line)
            .limit(count)
        )
        with self._database.read() as connection:
            return connection.execute(look).all()


def _never_made(row: Row[Any], batch: Batch) -> dict[str, Any]:
    """Why a line without an error has no job: it was deleted, or the batch ended before the line was submitted."""
    if row.job is not None:
        return {"status": 404, "code": "not_found", "message": "It was deleted."}
    code = "batch_cancelled" if batch.cancelled_at is not None else "batch_expired"
    return {"code": code, "message": "The batch ended before this line."}


def _answer(row: Row[Any], batch: Batch, status: int, body: Mapping[str, Any]) -> bytes:
    """One line of an output file."""
    response = {"status_code": status, "request_id": f"{batch.id}_{row.line}", "body": body}
    told = {
        "id": f"batch_req_{batch.number}_{row.line}",
        "custom_id": row.custom_id,
        "response": response,
    }
    return json.dumps({**told, "error": None}, ensure_ascii=False).encode() + b"\n"
