"""Retention: rows that are over go after a while, a bounded number in one transaction.

Completed jobs and their results are not touched here: they stay until they are deleted or `keep_seconds` is over. A
kind whose retention is 0 is kept for good. Idempotency keys go after their 24 hours.
"""

import logging
from collections.abc import Callable
from typing import Any

from sqlalchemy import Delete, Select, delete, select, tuple_

from skyloom.serve.queue.batches import batch_jobs, batches, lines
from skyloom.serve.queue.database import Database, Write
from skyloom.serve.queue.jobs import KEY_SECONDS
from skyloom.serve.queue.library import files
from skyloom.serve.queue.tables import HAS_ENDED_WITHOUT_RESULT, deliveries, events, jobs, keys
from skyloom.serve.settings import Settings

ROWS = 500  # removed in one transaction
ROUNDS = 10  # transactions of one kind in one sweep
_JOBS = 100  # jobs removed in one transaction, when their events are gone
Due = Callable[[float], Select[Any]] | Callable[[float], Select[Any, Any]]
"""The keys of the rows that were over before a time."""
Remove = Callable[[Write, float], int]
"""Removes up to ROWS rows that were over before a time; returns how many."""

log = logging.getLogger(__name__)


def sweep(database: Database, settings: Settings) -> dict[str, int]:
    """Remove what has outlived its retention, at most ROUNDS transactions of each kind; how many rows, by kind."""
    removed: dict[str, int] = {}
    for name, seconds, due, remove in _rules(settings):
        if seconds:
            removed[name] = _sweep_kind(database, seconds, due, remove)
    told = {name: count for name, count in removed.items() if count}
    if told:
        log.info("old rows removed", extra=told)
    return told


def _rules(settings: Settings) -> list[tuple[str, float, Due, Remove]]:
    """Every kind of row: its name, its retention in seconds, a look at what is due, and how that is removed."""
    return [
        ("events", settings.keep_event_seconds, _old_events, _remove_events),
        ("keys", KEY_SECONDS, _old_keys, _remove_keys),
        ("deliveries", settings.keep_delivery_seconds, _old_deliveries, _remove_deliveries),
        ("batches", settings.keep_batch_seconds, _old_batches, _remove_batch),
        ("jobs", settings.keep_ended_seconds, _old_jobs, _remove_jobs),
        ("files", settings.keep_file_seconds, _old_files, _remove_files),
    ]


def _sweep_kind(database: Database, seconds: float, due: Due, remove: Remove) -> int:
    removed = 0
    for _ in range(ROUNDS):
        before = database.now() - seconds
        with database.read() as connection:  # so that a sweep without work takes no lock
            if connection.execute(due(before).limit(1)).first() is None:
                break
        with database.write() as write:
            removed += remove(write, before)
    return removed


def _count(write: Write, statement: Delete) -> int:
    return write.connection.execute(statement).rowcount


def _old_events(before: float) -> Select[Any]:
    return select(events.c.number).where(events.c.created_at < before).order_by(events.c.created_at)


def _remove_events(write: Write, before: float) -> int:
    return _count(write, delete(events).where(events.c.number.in_(_old_events(before).limit(ROWS))))


def _old_keys(before: float) -> Select[Any, Any]:
    return (
        select(keys.c.owner, keys.c.key)
        .where(keys.c.created_at < before)
        .order_by(keys.c.created_at)
    )


def _remove_keys(write: Write, before: float) -> int:
    old = _old_keys(before).limit(ROWS)
    return _count(write, delete(keys).where(tuple_(keys.c.owner, keys.c.key).in_(old)))


def _old_deliveries(before: float) -> Select[Any]:
    over = (deliveries.c.next_at.is_(None), deliveries.c.created_at < before)
    return select(deliveries.c.number).where(*over).order_by(deliveries.c.created_at)


def _remove_deliveries(write: Write, before: float) -> int:
    return _count(
        write,
        delete(deliveries).where(deliveries.c.number.in_(_old_deliveries(before).limit(ROWS))),
    )


def _old_files(before: float) -> Select[Any]:
    return select(files.c.number).where(files.c.created_at < before).order_by(files.c.created_at)


def _remove_files(write: Write, before: float) -> int:
    return _count(write, delete(files).where(files.c.number.in_(_old_files(before).limit(ROWS))))


def _old_jobs(before: float) -> Select[Any]:
    over = (HAS_ENDED_WITHOUT_RESULT, jobs.c.completed_at < before)
    return select(jobs.c.number).where(*over)  # in no order, which would need a sort of all of them


def _remove_jobs(write: Write, before: float) -> int:
    """Some jobs, once their events are gone, whose number nothing bounds."""
    old = write.connection.execute(_old_jobs(before).limit(_JOBS)).scalars().all()
    theirs = select(events.c.number).where(events.c.job.in_(old)).limit(ROWS)
    removed = _count(write, delete(events).where(events.c.number.in_(theirs)))
    if removed < ROWS:
        removed += _count(write, delete(jobs).where(jobs.c.number.in_(old)))
    return removed


def _old_batches(before: float) -> Select[Any]:
    return (
        select(batches.c.number)
        .where(batches.c.completed_at < before)
        .order_by(batches.c.completed_at)
    )


def _remove_batch(write: Write, before: float) -> int:
    """The oldest batch, once its lines are gone, with its output files."""
    look = select(batches).where(batches.c.number.in_(_old_batches(before).limit(1)))
    old = write.connection.execute(look).one_or_none()
    if old is None:
        return 0
    some = (
        select(lines.c.line).where(lines.c.batch == old.number).order_by(lines.c.line).limit(ROWS)
    )
    removed = _count(
        write, delete(lines).where(lines.c.batch == old.number, lines.c.line.in_(some))
    )
    if removed < ROWS:
        removed += _count(
            write, delete(files).where(files.c.id.in_([old.output_file, old.error_file]))
        )
        write.connection.execute(delete(batch_jobs).where(batch_jobs.c.batch == old.number))
        removed += _count(write, delete(batches).where(batches.c.number == old.number))
    return removed
