# pyright: basic
"""Idempotency: find the job that a repeated call has submitted before, by its key or fingerprint.

serve/api/submit.py computes the fingerprint.
"""

from sqlalchemy import bindparam, delete, insert, select

from skyloom.serve.queue.database import Write
from skyloom.serve.queue.errors import JobConflictError
from skyloom.serve.queue.job import Job
from skyloom.serve.queue.tables import idempotency_keys, jobs

KEY_SECONDS = 24 * 3600  # an idempotency key is kept for so long
RETRY_SECONDS = 60  # a client's retry without a key finds a job no older than this

_INSERT_KEY = insert(idempotency_keys)
_IS_KEY = (
    idempotency_keys.c.owner == bindparam("where_owner"),
    idempotency_keys.c.key == bindparam("where_key"),
)
_BY_KEY = select(idempotency_keys).where(*_IS_KEY)
_DELETE_KEY = delete(idempotency_keys).where(*_IS_KEY)
_NEWEST_OF_FINGERPRINT = (
    select(jobs.c.number, jobs.c.created_at)
    .where(
        jobs.c.owner == bindparam("where_owner"),
        jobs.c.fingerprint == bindparam("where_fingerprint"),
    )
    .order_by(jobs.c.number.desc())
    .limit(1)
)


def find_duplicate(
    write: Write, owner: str, key: str | None, fingerprint: str | None, retry_count: int
) -> int | None:
    """Return the number of the job that the same call has submitted before, if any.

    Raises JobConflictError for a key that was used for another request.
    """
    if key is not None:
        values = {"where_owner": owner, "where_key": key}
        found = write.connection.execute(_BY_KEY, values).one_or_none()
        if found is None:
            return None
        if found.created_at <= write.now - KEY_SECONDS:
            write.connection.execute(_DELETE_KEY, values)
            return None
        if found.fingerprint != (fingerprint or ""):
            message = "This idempotency key was used for another request."
            raise JobConflictError(message, hint="Use a new key for a new request.")
        return found.job
    if fingerprint is not None and retry_count > 0:
        values = {"where_owner": owner, "where_fingerprint": fingerprint}
        newest = write.connection.execute(_NEWEST_OF_FINGERPRINT, values).one_or_none()
        if newest is not None and newest.created_at > write.now - RETRY_SECONDS:
            return newest.number
    return None


def keep_key(write: Write, job: Job, key: str, fingerprint: str | None) -> None:
    """Store the key under which `job` was submitted."""
    values = {
        "owner": job.owner,
        "key": key,
        "fingerprint": fingerprint or "",
        "job": job.number,
        "created_at": write.now,
    }
    write.connection.execute(_INSERT_KEY, values)
