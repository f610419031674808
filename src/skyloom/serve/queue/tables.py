"""The tables of the server: jobs and what they made, events, webhooks, owners and workers.

Times are seconds since 1970 by the database's clock. What changes the shape of a table that exists takes a numbered
step in database.py; a new table only has to stand here.
"""

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    event,
    literal_column,
    or_,
)

from skyloom.serve.queue.migrations.job_counters import create_job_counters

metadata = MetaData()
_NUMBER = BigInteger().with_variant(Integer, "sqlite")


def _number() -> "Column[int]":
    return Column("number", _NUMBER, primary_key=True, autoincrement=True)


def _owned_job(*, index: bool = False) -> "Column[int]":
    return Column(
        "job", _NUMBER, ForeignKey("jobs.number", ondelete="CASCADE"), nullable=False, index=index
    )


schema = Table(
    "schema_version", metadata, Column("version", Integer, primary_key=True), Column("at", Double)
)

installation = Table(  # one row: the identity that the storage must have too, and the token of its last sweep and the one before
    "installation",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("sweep", String(64), nullable=False),
    Column("sweep_before", String(64), nullable=False),
    Column("swept_at", Double, nullable=False, default=0.0),
    Column("created_at", Double, nullable=False),
)

assets = Table(  # the inventory: what this installation has stored. Nothing else is ever collected
    "assets",
    metadata,
    Column("name", String(96), primary_key=True),
    Column("stored_at", Double, nullable=False),
    Column("unnamed_since", Double, index=True),
    Column("trashed_at", Double, index=True),
)

jobs = Table(
    "jobs",
    metadata,
    _number(),
    Column("id", String(64), nullable=False, unique=True),
    Column("owner", String(128), nullable=False),
    Column("kind", String(32), nullable=False),
    Column("status", String(16), nullable=False),
    Column("priority", Integer, nullable=False, default=0),
    Column("cost", Double, nullable=False, default=1.0),
    Column("request", JSON, nullable=False),
    Column("extra", JSON, nullable=False),
    Column("fingerprint", String(128)),
    Column("wanted", String(8)),
    Column("deleted", Boolean, nullable=False, default=False),
    Column("progress", Integer, nullable=False, default=0),
    Column("phase", String(32)),
    Column("checkpoint", JSON, nullable=False),
    Column("attempts", Integer, nullable=False, default=0),
    Column("token", Integer, nullable=False, default=0),
    Column("worker", String(128)),
    Column("lease_until", Double),
    Column("run_after", Double, nullable=False, default=0.0),
    Column("error", JSON(none_as_null=True)),
    Column("created_at", Double, nullable=False),
    Column("started_at", Double),
    Column("completed_at", Double),
    Column("deadline", Double),
    Column("expires_at", Double),
    Index("jobs_of_owner", "owner", "kind", "number"),
    Index("jobs_fingerprint", "owner", "fingerprint", "number"),
    sqlite_autoincrement=True,
)


_STATUSES = ("queued", "in_progress", "paused", "completed", "failed", "cancelled", "expired")
_HAS_STATUS = {name: jobs.c.status == literal_column(f"'{name}'") for name in _STATUSES}


def has_status(*names: str) -> ColumnElement[bool]:
    """The condition that a job has one of these statuses, for queries and for the conditions of partial indexes.

    The statuses are literals joined by OR: SQLite uses a partial index only if it can prove its condition from the
    query's text, which it cannot for a bound parameter or an IN list. Raises KeyError for another name.
    """
    return or_(*(_HAS_STATUS[name] for name in names))


IS_ACTIVE = has_status("queued", "in_progress", "paused")
HAS_ENDED_WITHOUT_RESULT = has_status("failed", "cancelled", "expired")
_RESULT_MAY_EXPIRE = has_status("completed") & jobs.c.expires_at.is_not(None)


def _index_where(name: str, condition: ColumnElement[bool], *columns: "Column[Any]") -> None:
    """A partial index of jobs on both databases."""
    Index(name, *columns, sqlite_where=condition, postgresql_where=condition)


_index_where("jobs_active", IS_ACTIVE, jobs.c.status, jobs.c.owner)
_index_where(
    "jobs_over",
    has_status("completed", "failed", "cancelled", "expired"),
    jobs.c.status,
    jobs.c.number,
)
# with the status first, or SQLite prefers jobs_over
_index_where("jobs_ended", HAS_ENDED_WITHOUT_RESULT, jobs.c.status, jobs.c.completed_at)
_index_where("jobs_expiry", _RESULT_MAY_EXPIRE, jobs.c.status, jobs.c.expires_at)

job_counts = Table(  # kept by triggers on jobs, so that no reader has to count rows
    "job_counts",
    metadata,
    Column("status", String(16), primary_key=True),
    Column("count", BigInteger, nullable=False),
)
event.listen(jobs, "after_create", lambda _table, connection, **_: create_job_counters(connection))

results = Table(
    "results",
    metadata,
    Column(
        "job",
        _NUMBER,
        ForeignKey("jobs.number", ondelete="CASCADE"),
        primary_key=True,
        autoincrement=False,
    ),
    Column("token", Integer, nullable=False),
    Column("assets", JSON, nullable=False),
    Column("receipt", JSON, nullable=False),
    Column("created_at", Double, nullable=False),
)

attempts = Table(
    "job_attempts",
    metadata,
    Column(
        "job",
        _NUMBER,
        ForeignKey("jobs.number", ondelete="CASCADE"),
        primary_key=True,
        autoincrement=False,
    ),
    Column("token", Integer, primary_key=True, autoincrement=False),
    Column("worker", String(128), nullable=False),
    Column("began_at", Double, nullable=False),
    Column("ended_at", Double),
    Column("outcome", String(16)),
    Column("error", JSON(none_as_null=True)),
)

keys = Table(
    "idempotency_keys",
    metadata,
    Column("owner", String(128), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("fingerprint", String(128), nullable=False),
    _owned_job(index=True),  # or every job that is deleted scans this table for its keys
    Column("created_at", Double, nullable=False, index=True),
)

owners = Table(
    "owners",
    metadata,
    Column("owner", String(128), primary_key=True),
    Column("served", Double, nullable=False, default=0.0),
)

workers = Table(
    "workers",
    metadata,
    Column("name", String(128), primary_key=True),
    Column("device", String(64), nullable=False),
    Column("started_at", Double, nullable=False),
    Column("seen_at", Double, nullable=False),
)

events = Table(
    "events",
    metadata,
    _number(),
    _owned_job(),
    Column("owner", String(128), nullable=False),
    Column("type", String(64), nullable=False),
    Column("data", JSON, nullable=False),
    Column("created_at", Double, nullable=False, index=True),
    Index("events_of_job", "job", "number"),
    sqlite_autoincrement=True,
)

endpoints = Table(
    "webhook_endpoints",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("owner", String(128), nullable=False, index=True),
    Column("name", Text, nullable=False),
    Column("url", Text, nullable=False),
    Column("event_types", JSON, nullable=False),
    Column("secret", Text, nullable=False),
    Column("old_secret", Text),
    Column("old_secret_until", Double),
    Column("created_at", Double, nullable=False),
    Column("updated_at", Double, nullable=False),
)

deliveries = Table(
    "webhook_deliveries",
    metadata,
    _number(),
    Column(
        "endpoint",
        String(64),
        ForeignKey("webhook_endpoints.id", ondelete="CASCADE"),
        nullable=False,
        index=True,
    ),
    Column("event", String(64), nullable=False),
    Column("payload", JSON, nullable=False),
    Column("attempts", Integer, nullable=False, default=0),
    Column("next_at", Double),
    Column("status_code", Integer),
    Column("created_at", Double, nullable=False),
    UniqueConstraint("endpoint", "event"),
    Index("webhook_deliveries_due", "next_at", "created_at"),
    sqlite_autoincrement=True,
)
