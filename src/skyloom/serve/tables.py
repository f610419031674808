"""The tables of the server: jobs and what they made, events, webhooks, owners and workers.

Times are seconds since 1970 by the database's clock. What changes the shape of a table that exists takes a numbered
step in database.py; a new table only has to stand here.
"""

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

metadata = MetaData()
_NUMBER = BigInteger().with_variant(Integer, "sqlite")
_ACTIVE = text("status IN ('queued', 'in_progress', 'paused')")


def _number() -> "Column[int]":
    return Column("number", _NUMBER, primary_key=True, autoincrement=True)


def _owned_job() -> "Column[int]":
    return Column("job", _NUMBER, ForeignKey("jobs.number", ondelete="CASCADE"), nullable=False)


schema = Table("schema_version", metadata, Column("version", Integer, primary_key=True), Column("at", Double))

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
    Index("jobs_active", "status", "owner", sqlite_where=_ACTIVE, postgresql_where=_ACTIVE),
    Index("jobs_of_owner", "owner", "kind", "number"),
    Index("jobs_fingerprint", "owner", "fingerprint"),
    Index("jobs_expiry", "expires_at"),
    sqlite_autoincrement=True,
)

results = Table(
    "results",
    metadata,
    Column("job", _NUMBER, ForeignKey("jobs.number", ondelete="CASCADE"), primary_key=True, autoincrement=False),
    Column("token", Integer, nullable=False),
    Column("assets", JSON, nullable=False),
    Column("receipt", JSON, nullable=False),
    Column("created_at", Double, nullable=False),
)

attempts = Table(
    "job_attempts",
    metadata,
    Column("job", _NUMBER, ForeignKey("jobs.number", ondelete="CASCADE"), primary_key=True, autoincrement=False),
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
    _owned_job(),
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
    Column("created_at", Double, nullable=False),
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
    Column("endpoint", String(64), ForeignKey("webhook_endpoints.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("event", String(64), nullable=False),
    Column("payload", JSON, nullable=False),
    Column("attempts", Integer, nullable=False, default=0),
    Column("next_at", Double, index=True),
    Column("status_code", Integer),
    Column("created_at", Double, nullable=False),
    UniqueConstraint("endpoint", "event"),
    sqlite_autoincrement=True,
)
