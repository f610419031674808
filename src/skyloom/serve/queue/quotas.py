"""Quotas: how much each owner may have at once, one row for each kind of thing.

`Quotas.take` is called inside the write transaction that creates the thing, so that no two calls take the same room;
asked in a look before it, it refuses before work is done for the thing. A limit of 0 is none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import Connection, Select, bindparam, func, or_, select

from skyloom.core.errors import CapacityError
from skyloom.serve.queue.tables import IS_ACTIVE, metadata
from skyloom.serve.settings import Settings

UNIT = 128 * 128 * 4  # pixels times steps of a second that costs 1: the bundled model's usual video
LEAST_COST = 0.1
_BATCH_SECONDS = 86_400  # so long a batch counts, and until it has ended


class QuotaError(CapacityError):
    """An owner has no room for more. `quota` is the row's name; `retry_after` None means that waiting does not help."""

    code = "quota"

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        retry_after: float | None = None,
        quota: str = "",
        limit: float = 0,
    ) -> None:
        super().__init__(message, hint=hint, retry_after=retry_after)
        self.quota, self.limit = quota, limit


@dataclass(frozen=True)
class Quota:
    """One kind of thing: the setting that bounds it, what it is called, the table whose rows of an owner count, and how
    to have fewer. `sum` is the column that is added up instead of rows."""

    setting: str
    what: str
    table: str
    fewer: str
    sum: str | None = None


# name -> row; the wire's code is "<name>_quota_exceeded"
QUOTAS = {
    "queued_jobs": Quota("max_queued_per_owner", "jobs that wait or run", "jobs", "Wait for some."),
    "queued_cost": Quota(
        "max_queued_cost_per_owner",
        "of work that waits or runs (seconds x pixels x steps / 65,536)",
        "jobs",
        "Wait for some, or ask for fewer seconds or steps.",
        sum="cost",
    ),
    "files": Quota("max_files_per_owner", "files", "files", "Delete some."),
    "file_bytes": Quota(
        "max_file_bytes_per_owner", "bytes of files", "files", "Delete some.", sum="size"
    ),
    "characters": Quota(
        "max_characters_per_owner", "characters", "characters", "Use those that are there."
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
    """The quotas of a server's settings."""

    def __init__(self, settings: Settings | None = None) -> None:
        self._settings = settings or Settings()

    def limit(self, name: str) -> float:
        """The most that an owner may have; 0 for no limit."""
        return getattr(self._settings, QUOTAS[name].setting)

    def used(self, connection: Connection, owner: str, name: str, now: float) -> float:
        """How much an owner has."""
        return float(
            connection.execute(
                _usage(name), {"who": owner, "since": now - _BATCH_SECONDS}
            ).scalar_one()
        )

    def take(self, connection: Connection, owner: str, now: float, **more: float) -> None:
        """Raise QuotaError unless an owner may have so much more of each thing, told by name, like `files=1`."""
        for name, one in more.items():
            if self.limit(name):
                self.refuse(name, self.used(connection, owner, name, now), one)

    def refuse(
        self, name: str, used: float, more: float, wait: Callable[[], float] | None = None
    ) -> None:
        """Raise QuotaError unless one who has so much may have so much `more`; `wait` says in how many seconds there
        may be room."""
        limit, quota = self.limit(name), QUOTAS[name]
        if limit == 0 or used + more <= limit:
            return
        asked = "" if more == 1 else f" and ask for {more:,.0f} more"
        message = f"You have {used:,.0f} of {limit:,.0f} {quota.what}{asked}; the limit is {quota.setting}."
        seconds = wait() if wait is not None and more <= limit else None
        hint = quota.fewer if seconds is None else f"Try again in {seconds:.0f} s."
        raise QuotaError(message, hint=hint, retry_after=seconds, quota=name, limit=limit)


def cost_of(seconds: float, width: int, height: int, steps: int) -> float:
    """What a job counts for: a second of 128x128 pixels in four steps is 1."""
    return max(LEAST_COST, seconds * width * height * steps / UNIT)


@cache
def _usage(name: str) -> Select[Any]:
    """How much an owner ("who") has; batches count while they run and for a day ("since"). Built once for each name."""
    quota = QUOTAS[name]
    table = metadata.tables[quota.table]
    count = func.count() if quota.sum is None else func.coalesce(func.sum(table.c[quota.sum]), 0)
    look = select(count).select_from(table).where(table.c.owner == bindparam("who"))
    if quota.table == "jobs":
        look = look.where(IS_ACTIVE)
    if quota.table == "batches":
        look = look.where(
            or_(table.c.completed_at.is_(None), table.c.created_at > bindparam("since"))
        )
    return look
