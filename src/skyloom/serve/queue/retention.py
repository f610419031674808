"""Retention: delete old rows, a bounded number per transaction.

Completed jobs and their results stay until they are deleted or `keep_seconds` is over. A retention
of 0 keeps rows for good. Idempotency keys are deleted after 24 hours.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from sqlalchemy import Delete, Select, Table, delete, select, tuple_

from skyloom.serve.queue.database import Database, Write
from skyloom.serve.queue.idempotency import KEY_SECONDS
from skyloom.serve.queue.tables import (
    HAS_ENDED_WITHOUT_RESULT,
    batch_jobs,
    batch_lines,
    batches,
    deliveries,
    events,
    files,
    idempotency_keys,
    jobs,
)
from skyloom.serve.settings import Settings

ROWS = 500  # deleted in one transaction
ROUNDS = 10  # transactions per kind of row in one call
_JOBS = 100  # jobs deleted in one transaction, after their events
FindOld = Callable[[float], Select[Any]] | Callable[[float], Select[Any, Any]]
"""Builds the query of the keys of rows that are older than a time."""
DeleteOld = Callable[[Write, float], int]
"""Deletes up to ROWS rows older than a time; returns their number."""

log = logging.getLogger(__name__)


def delete_old_rows(database: Database, settings: Settings) -> dict[str, int]:
    """Delete the rows whose retention is over; return their numbers by kind.

    Runs at most ROUNDS transactions per kind.
    """
    counts: dict[str, int] = {}
    for name, seconds, find, delete_old in _rules(settings):
        if seconds and (count := _delete_kind(database, seconds, find, delete_old)):
            counts[name] = count
    if counts:
        log.info("old rows removed", extra=counts)
    return counts


def _rules(settings: Settings) -> list[tuple[str, float, FindOld, DeleteOld]]:
    """Return every kind of row: name, retention in seconds, query and deletion."""
    return [
        (
            "events",
            settings.keep_event_seconds,
            _old_events,
            partial(_delete_numbers, events, _old_events),
        ),
        ("keys", KEY_SECONDS, _old_keys, _delete_keys),
        (
            "deliveries",
            settings.keep_delivery_seconds,
            _old_deliveries,
            partial(_delete_numbers, deliveries, _old_deliveries),
        ),
        ("batches", settings.keep_batch_seconds, _old_batches, _delete_batch),
        ("jobs", settings.keep_ended_seconds, _old_jobs, _delete_jobs),
        (
            "files",
            settings.keep_file_seconds,
            _old_files,
            partial(_delete_numbers, files, _old_files),
        ),
    ]


def _delete_kind(database: Database, seconds: float, find: FindOld, delete_old: DeleteOld) -> int:
    count = 0
    for _ in range(ROUNDS):
        before = database.now() - seconds
        with database.read() as connection:  # takes no write lock where there is nothing to do
            if connection.execute(find(before).limit(1)).first() is None:
                break
        with database.write() as write:
            count += delete_old(write, before)
    return count


def _delete(write: Write, statement: Delete) -> int:
    return write.connection.execute(statement).rowcount


def _delete_numbers(
    table: Table, find: Callable[[float], Select[Any]], write: Write, before: float
) -> int:
    """Delete rows of a table with the primary key `number`."""
    old = find(before).limit(ROWS)
    return _delete(write, delete(table).where(table.c.number.in_(old)))


def _old_events(before: float) -> Select[Any]:
    return select(events.c.number).where(events.c.created_at < before).order_by(events.c.created_at)


def _old_keys(before: float) -> Select[Any, Any]:
    keys = idempotency_keys.c
    return select(keys.owner, keys.key).where(keys.created_at < before).order_by(keys.created_at)


def _delete_keys(write: Write, before: float) -> int:
    key = tuple_(idempotency_keys.c.owner, idempotency_keys.c.key)
    return _delete(write, delete(idempotency_keys).where(key.in_(_old_keys(before).limit(ROWS))))


def _old_deliveries(before: float) -> Select[Any]:
    ended = (deliveries.c.next_at.is_(None), deliveries.c.created_at < before)
    return select(deliveries.c.number).where(*ended).order_by(deliveries.c.created_at)


def _old_files(before: float) -> Select[Any]:
    return select(files.c.number).where(files.c.created_at < before).order_by(files.c.created_at)


def _old_jobs(before: float) -> Select[Any]:
    ended = (HAS_ENDED_WITHOUT_RESULT, jobs.c.completed_at < before)
    return select(jobs.c.number).where(*ended)  # unordered: an order would sort all of them


def _delete_jobs(write: Write, before: float) -> int:
    """Delete jobs, but first their events, whose number is not bounded."""
    old = write.connection.execute(_old_jobs(before).limit(_JOBS)).scalars().all()
    theirs = select(events.c.number).where(events.c.job.in_(old)).limit(ROWS)
    count = _delete(write, delete(events).where(events.c.number.in_(theirs)))
    if count < ROWS:
        count += _delete(write, delete(jobs).where(jobs.c.number.in_(old)))
    return count


def _old_batches(before: float) -> Select[Any]:
    old = select(batches.c.number).where(batches.c.completed_at < before)
    return old.order_by(batches.c.completed_at)


def _delete_batch(write: Write, before: float) -> int:
    """Delete the oldest batch and its output files, but first its lines."""
    query = select(batches).where(batches.c.number.in_(_old_batches(before).limit(1)))
    old = write.connection.execute(query).one_or_none()
    if old is None:
        return 0
    of_batch = batch_lines.c.batch == old.number
    some = select(batch_lines.c.line).where(of_batch).order_by(batch_lines.c.line).limit(ROWS)
    count = _delete(write, delete(batch_lines).where(of_batch, batch_lines.c.line.in_(some)))
    if count < ROWS:
        outputs = files.c.id.in_([old.output_file, old.error_file])
        count += _delete(write, delete(files).where(outputs))
        write.connection.execute(delete(batch_jobs).where(batch_jobs.c.batch == old.number))
        count += _delete(write, delete(batches).where(batches.c.number == old.number))
    return count
