"""Batches: many videos by one file of JSON lines, one line a job.

A batch's lines become jobs as the owner's queue has room. A line has its own idempotency key, so a server that dies
between two of its writes makes no video twice. When no line is left to wait for, the answers are written to a file.
"""

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
    insert,
    select,
    update,
)

from skyloom.core.errors import CapacityError, SkyloomError
from skyloom.serve.database import Database
from skyloom.serve.faults import missing, tell
from skyloom.serve.jobs import ACTIVE, Job, JobStore
from skyloom.serve.quotas import Quotas
from skyloom.serve.tables import jobs as job_table
from skyloom.serve.tables import metadata

WINDOW_SECONDS = 24 * 3600
MAX_LINES = 10_000
_NUMBER = BigInteger().with_variant(Integer, "sqlite")
Submit = Callable[[str, Mapping[str, Any], str, float], Job]
Write = Callable[[str, str, bytes], str]

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
    Column("completed_at", Double),
    Column("cancelled_at", Double),
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
    completed: int
    failed: int

    @property
    def status(self) -> str:
        """The word that clients know for it."""
        if self.completed_at is not None:
            return "cancelled" if self.cancelled_at is not None else "completed"
        return "cancelling" if self.cancelled_at is not None else "in_progress"


class BatchStore:
    """Batches in the database. What is somebody else's is not there (WireError, 404)."""

    def __init__(self, database: Database, jobs: JobStore, quotas: Quotas | None = None) -> None:
        self._database, self._jobs, self._quotas = database, jobs, quotas or Quotas()

    def check_room(self, owner: str) -> None:
        """Refuse what `create` would, before the file is read. Raises QuotaError."""
        now = self._database.now()
        with self._database.read() as connection:
            self._quotas.take(connection, owner, now, batches=1)

    def create(self, owner: str, input_file: str, metadata: Mapping[str, str], asked: Sequence[Line]) -> Batch:
        """A new batch of at least one line. Raises QuotaError."""
        id = f"batch_{secrets.token_hex(16)}"
        with self._database.write() as write:
            self._quotas.take(write.connection, owner, write.now, batches=1)
            row = {"id": id, "owner": owner, "input_file": input_file, "metadata": dict(metadata)}
            times = {"created_at": write.now, "expires_at": write.now + WINDOW_SECONDS}
            write.connection.execute(insert(batches).values(**row, **times))
            number = write.connection.execute(select(batches.c.number).where(batches.c.id == id)).scalar_one()
            rows = [{"batch": number, "line": index, **vars(line)} for index, line in enumerate(asked)]
            write.connection.execute(insert(lines), rows)
        return self.get(id, owner)

    def get(self, id: str, owner: str) -> Batch:
        """A batch of the owner's."""
        with self._database.read() as connection:
            row = connection.execute(select(batches).where(batches.c.id == id, batches.c.owner == owner)).one_or_none()
        if row is None:
            raise missing("batch", id)
        return self._batch(row)

    def list(self, owner: str, *, after: str | None, limit: int) -> tuple[list[Batch], bool]:
        """A page of batches, the newest first, and whether there are more."""
        wanted = [batches.c.owner == owner]
        if after is not None:
            wanted.append(batches.c.number < self.get(after, owner).number)
        look = select(batches).where(*wanted).order_by(batches.c.number.desc()).limit(limit + 1)
        with self._database.read() as connection:
            rows = connection.execute(look).all()
        return [self._batch(row) for row in rows[:limit]], len(rows) > limit

    def cancel(self, id: str, owner: str) -> Batch:
        """Stop what has not ended yet."""
        found = self.get(id, owner)
        if found.completed_at is None and found.cancelled_at is None:
            with self._database.write() as write:
                change = update(batches).where(batches.c.number == found.number)
                write.connection.execute(change.values(cancelled_at=write.now))
            for row in self._lines(found.number):
                if row.job is not None and row.status in ACTIVE:
                    self._jobs.cancel(row.job, owner)
        return self.get(id, owner)

    def advance(self, submit: Submit, write_file: Write, show: Callable[[Job], Mapping[str, Any]]) -> None:
        """Turn lines into jobs as far as there is room, and end the batches that are through."""
        with self._database.read() as connection:
            rows = connection.execute(select(batches).where(batches.c.completed_at.is_(None))).all()
        for row in rows:
            batch = self._batch(row)
            self._submit(batch, submit)
            after = self._lines(batch.number)
            if all(line.error is not None or (line.job is not None and line.status not in ACTIVE) for line in after):
                self._finish(batch, after, write_file, show)

    def _submit(self, batch: Batch, submit: Submit) -> None:
        """Submit the lines that wait. Where waiting helps, as for a full queue, they go on waiting; any other error is
        the line's own."""
        stopped = batch.cancelled_at is not None or batch.expires_at <= self._database.now()
        for row in self._lines(batch.number):
            if row.job is not None or row.error is not None:
                continue
            if stopped:
                code = "batch_cancelled" if batch.cancelled_at is not None else "batch_expired"
                self._note(batch, row.line, error={"code": code, "message": "The batch ended before this line."})
                continue
            try:
                job = submit(batch.owner, row.body, f"{batch.id}:{row.line}", batch.expires_at)
            except SkyloomError as error:
                if isinstance(error, CapacityError) and error.retry_after is not None:
                    return
                told = tell(error, batch.id)
                self._note(batch, row.line, error={"status": told.status, **told.body["error"]})
            else:
                self._note(batch, row.line, job=job.id)

    def _finish(
        self, batch: Batch, rows: Sequence[Row[Any]], write_file: Write, show: Callable[[Job], Mapping[str, Any]]
    ) -> None:
        outputs, errors = [], []
        for row in rows:
            if row.error is not None:
                errors.append(_answer(row, batch, int(row.error.get("status", 400)), {"error": row.error}))
            elif row.status is None:
                errors.append(_answer(row, batch, 404, {"error": {"code": "not_found", "message": "It was deleted."}}))
            else:
                outputs.append(_answer(row, batch, 200, dict(show(self._jobs.get(row.job, batch.owner)))))
        files = {
            name: write_file(batch.owner, f"{batch.id}_{name}.jsonl", "".join(answers).encode()) if answers else None
            for name, answers in (("output", outputs), ("error", errors))
        }
        with self._database.write() as write:
            change = update(batches).where(batches.c.number == batch.number, batches.c.completed_at.is_(None))
            values = {"output_file": files["output"], "error_file": files["error"], "completed_at": write.now}
            write.connection.execute(change.values(**values))

    def _note(self, batch: Batch, line: int, **values: Any) -> None:
        with self._database.write() as write:
            mine = (lines.c.batch == batch.number, lines.c.line == line)
            write.connection.execute(update(lines).where(*mine).values(**values))

    def _lines(self, number: int) -> Sequence[Row[Any]]:
        """The lines in order, with the status of their jobs; None for a job that was deleted."""
        look = select(lines, job_table.c.status).outerjoin(job_table, job_table.c.id == lines.c.job)
        with self._database.read() as connection:
            return connection.execute(look.where(lines.c.batch == number).order_by(lines.c.line)).all()

    def _batch(self, row: Row[Any]) -> Batch:
        states = [(line.error, line.job, line.status) for line in self._lines(row.number)]
        completed = sum(status == "completed" for _, _, status in states)
        ended = sum(error is not None or (job is not None and status not in ACTIVE) for error, job, status in states)
        return Batch(**row._mapping, total=len(states), completed=completed, failed=ended - completed)


def _answer(row: Row[Any], batch: Batch, status: int, body: Mapping[str, Any]) -> str:
    """One line of an output file."""
    response = {"status_code": status, "request_id": f"{batch.id}_{row.line}", "body": body}
    told = {"id": f"batch_req_{batch.number}_{row.line}", "custom_id": row.custom_id, "response": response}
    return json.dumps({**told, "error": None}, ensure_ascii=False) + "\n"
