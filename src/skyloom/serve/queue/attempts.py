"""Attempts: one row for each time that a worker had a job in its hands, how long that took and why it ended.

Everything here happens inside a write transaction of its caller. A retry by the owner begins the record anew.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, bindparam, delete, insert, select, update

from skyloom.serve.queue.database import Write
from skyloom.serve.queue.tables import attempts

_BEGIN = insert(attempts)
_OF_JOB = select(attempts).where(attempts.c.job == bindparam("which")).order_by(attempts.c.token)
_TIMES = select(attempts.c.began_at, attempts.c.ended_at).where(
    attempts.c.job == bindparam("which")
)
_END = update(attempts).where(attempts.c.job == bindparam("which"), attempts.c.ended_at.is_(None))
_FORGET = delete(attempts).where(attempts.c.job == bindparam("which"))


@dataclass(frozen=True)
class Attempt:
    """One attempt. Times are seconds since 1970; `outcome` is the state into which it left the job, `error` a failure's
    code and message; both None while it runs."""

    token: int
    worker: str
    began_at: float
    ended_at: float | None
    outcome: str | None
    error: Mapping[str, Any] | None


def begin_attempt(write: Write, job: int, token: int, worker: str) -> float:
    """A worker takes a job; how many seconds earlier attempts took."""
    used = seconds_used(write.connection, job, write.now)
    write.connection.execute(
        _BEGIN, {"job": job, "token": token, "worker": worker, "began_at": write.now}
    )
    return used


def end_attempt(write: Write, job: int, outcome: str, error: Mapping[str, Any] | None) -> None:
    """The job has left its worker's hands."""
    values = {"ended_at": write.now, "outcome": outcome, "error": error}
    write.connection.execute(_END, {"which": job, **values})


def seconds_used(connection: Connection, job: int, now: float) -> float:
    """How long workers had a job in their hands, in all attempts together."""
    rows = connection.execute(_TIMES, {"which": job}).all()
    return sum(max(0.0, (now if ended is None else ended) - began) for began, ended in rows)


def forget_attempts(write: Write, job: int) -> None:
    """Begin the record of a job anew."""
    write.connection.execute(_FORGET, {"which": job})


def list_attempts(connection: Connection, job: int) -> list[Attempt]:
    """The attempts of a job, the oldest first."""
    rows = connection.execute(_OF_JOB, {"which": job}).all()
    return [
        Attempt(row.token, row.worker, row.began_at, row.ended_at, row.outcome, row.error)
        for row in rows
    ]
