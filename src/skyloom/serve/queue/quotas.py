"""Quotas: how much each owner may have at once.

`Quotas.check` runs inside the write transaction that creates the thing, so two calls cannot use the
same room. Called earlier in a read transaction, it rejects a request before work is done for it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import Connection, Select, bindparam, func, or_, select

from skyloom.serve.queue.errors import QuotaError
from skyloom.serve.queue.tables import IS_ACTIVE, metadata
from skyloom.serve.settings import Settings

__all__ = ["MIN_COST", "QUOTAS", "UNIT", "Quota", "QuotaError", "Quotas", "job_cost"]

UNIT = 128 * 128 * 4  # pixels x steps of one second of video at cost 1
MIN_COST = 0.1
_BATCH_SECONDS = 86_400  # a batch counts for this long, and until it has ended


@dataclass(frozen=True)
class Quota:
    """A limit per owner: its setting, its unit in messages, the table counted, and a hint.

    `sum` is a column to add up; None counts rows.
    """

    setting: str
    unit: str
    table: str
    hint: str
    sum: str | None = None


# By name; the error code of the API is "<name>_quota_exceeded".
QUOTAS = {
    "queued_jobs": Quota("max_queued_per_owner", "active jobs", "jobs", "Wait for some."),
    "queued_cost": Quota(
        "max_queued_cost_per_owner",
        "units of active work (seconds x pixels x steps / 65,536)",
        "jobs",
        "Wait for some, or ask for fewer seconds or steps.",
        sum="cost",
    ),
    "files": Quota("max_files_per_owner", "files", "files", "Delete some."),
    "file_bytes": Quota(
        "max_file_bytes_per_owner", "bytes of files", "files", "Delete some.", "size"
    ),
    "characters": Quota(
        "max_characters_per_owner", "characters", "characters", "Use an existing one."
    ),
    "batches": Quota(
        "max_batches_per_owner",
        "batches that run or are less than a day old",
        "batches",
        "Wait a day.",
    ),
    "webhooks": Quota(
        "max_webhooks_per_owner", "webhook endpoints", "webhook_endpoints", "Delete some."
    ),
}


class Quotas:
    """The quotas of a server's settings. A limit of 0 means unlimited."""

    def __init__(self, settings: Settings | None = None) -> None:
        self._settings = settings or Settings()

    def limit(self, name: str) -> float:
        """Return the limit of a quota; 0 for unlimited."""
        return getattr(self._settings, QUOTAS[name].setting)

    def usage(self, connection: Connection, owner: str, name: str, now: float) -> float:
        """Return how much of a quota an owner uses."""
        values = {"where_owner": owner, "since": now - _BATCH_SECONDS}
        return float(connection.execute(_usage_query(name), values).scalar_one())

    def check(self, connection: Connection, owner: str, now: float, **more: float) -> None:
        """Check that an owner may have more of each quota, such as `files=1`. Raises QuotaError."""
        for name, amount in more.items():
            if self.limit(name):
                self.check_usage(name, self.usage(connection, owner, name, now), amount)

    def check_usage(
        self, name: str, used: float, more: float, retry_after: Callable[[], float] | None = None
    ) -> None:
        """Check that `used + more` is within a quota. Raises QuotaError.

        `retry_after` estimates the seconds until there may be room.
        """
        limit = self.limit(name)
        quota = QUOTAS[name]
        if limit == 0 or used + more <= limit:
            return
        requested = "" if more == 1 else f" and ask for {more:,.0f} more"
        usage = f"You have {used:,.0f} of {limit:,.0f} {quota.unit}{requested}"
        seconds = retry_after() if retry_after is not None and more <= limit else None
        raise QuotaError(
            f"{usage}; the limit is {quota.setting}.",
            hint=quota.hint if seconds is None else f"Try again in {seconds:.0f} s.",
            retry_after=seconds,
            quota=name,
            limit=limit,
        )


def job_cost(seconds: float, width: int, height: int, steps: int) -> float:
    """Compute a job's cost: 1 for a second of 128x128 pixels in four steps, at least MIN_COST."""
    return max(MIN_COST, seconds * width * height * steps / UNIT)


@cache
def _usage_query(name: str) -> Select[Any]:
    """Build the query of an owner's usage; batches count while they run and for a day."""
    quota = QUOTAS[name]
    table = metadata.tables[quota.table]
    count = func.count() if quota.sum is None else func.coalesce(func.sum(table.c[quota.sum]), 0)
    query = select(count).select_from(table).where(table.c.owner == bindparam("where_owner"))
    if quota.table == "jobs":
        query = query.where(IS_ACTIVE)
    if quota.table == "batches":
        recent = table.c.created_at > bindparam("since")
        query = query.where(or_(table.c.completed_at.is_(None), recent))
    return query
