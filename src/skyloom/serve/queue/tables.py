# pyright: basic
"""Tables of the server: jobs, files, characters, batches, API keys, webhooks, workers, assets.

Times are seconds since 1970 by the database's clock.
"""

from typing import Any, Literal, get_args

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
    text,
)

from skyloom.serve.queue.migrations.job_counters import create_job_counters

Status = Literal[
    "queued",  # waits for a worker, until `run_after` at the earliest
    "in_progress",  # leased by a worker until `lease_until`
    "paused",  # held by its owner; keeps its checkpoint
    "completed",  # has a result
    "failed",  # ended by an error, which `error` holds
    "cancelled",  # ended by its owner
    "expired",  # not started before `deadline`, or its result was deleted at `expires_at`
]
"""Status of a job. job.py has the transitions."""

ASSET_SCHEME = "asset:"  # of references to stored files in rows
metadata = MetaData()
_NUMBER = BigInteger().with_variant(Integer, "sqlite")
MAX_RULE = 200  # characters of a moderation rule's name


def _number() -> "Column[int]":
    """A primary key that grows and is never reused."""
    return Column("number", _NUMBER, primary_key=True, autoincrement=True)


def _reference(name: str, target: str, **options: Any) -> "Column[int]":
    """A number of another table's row; deleted with that row."""
    return Column(name, _NUMBER, ForeignKey(target, ondelete="CASCADE"), **options)


schema = Table(
    "schema_version", metadata, Column("version", Integer, primary_key=True), Column("at", Double)
)

# One row: the id that database and storage share, and the tokens of the last two garbage sweeps.
installation = Table(
    "installation",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("sweep", String(64), nullable=False),
    Column("sweep_before", String(64), nullable=False),
    Column("swept_at", Double, nullable=False, default=0.0),
    Column("created_at", Double, nullable=False),
)

# Files in the storage that this installation wrote; garbage collection touches no others.
assets = Table(
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
    Column("extra", JSON, key="metadata", nullable=False),
    Column("fingerprint", String(128)),
    Column("wanted", String(8), key="requested_action"),
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
    Column("needs", Text, nullable=False, server_default=text("""'["diorama"]'""")),
    Index("jobs_of_owner", "owner", "kind", "number"),
    Index("jobs_fingerprint", "owner", "fingerprint", "number"),
    sqlite_autoincrement=True,
)

_HAS_STATUS = {name: jobs.c.status == literal_column(f"'{name}'") for name in get_args(Status)}


def has_status(*names: str) -> ColumnElement[bool]:
    """Build the condition that a job has one of these statuses. Raises KeyError for another name.

    The statuses are literals joined by OR: SQLite uses a partial index only if it can prove the
    index's condition from the query's text, which excludes bound parameters and IN lists.
    """
    return or_(*(_HAS_STATUS[name] for name in names))


IS_ACTIVE = has_status("queued", "in_progress", "paused")
HAS_ENDED_WITHOUT_RESULT = has_status("failed", "cancelled", "expired")
_HAS_ENDED = has_status("completed", "failed", "cancelled", "expired")
_RESULT_MAY_EXPIRE = has_status("completed") & jobs.c.expires_at.is_not(None)

# The status comes first in each index, or SQLite prefers jobs_over to the others.
for _name, _condition, _column in (
    ("jobs_active", IS_ACTIVE, jobs.c.owner),
    ("jobs_over", _HAS_ENDED, jobs.c.number),
    ("jobs_ended", HAS_ENDED_WITHOUT_RESULT, jobs.c.completed_at),
    ("jobs_expiry", _RESULT_MAY_EXPIRE, jobs.c.expires_at),
):
    Index(
        _name,
        jobs.c.status,
        _column,
        sqlite_where=_condition,
        postgresql_where=_condition,
    )

# Number of jobs by status, kept by triggers on jobs so that no reader counts rows.
job_counts = Table(
    "job_counts",
    metadata,
    Column("status", String(16), primary_key=True),
    Column("count", BigInteger, nullable=False),
)
event.listen(jobs, "after_create", lambda _table, connection, **_: create_job_counters(connection))

results = Table(
    "results",
    metadata,
    _reference("job", "jobs.number", primary_key=True, autoincrement=False),
    Column("token", Integer, nullable=False),
    Column("assets", JSON, nullable=False),
    Column("receipt", JSON, nullable=False),
    Column("created_at", Double, nullable=False),
)

attempts = Table(
    "job_attempts",
    metadata,
    _reference("job", "jobs.number", primary_key=True, autoincrement=False),
    Column("token", Integer, primary_key=True, autoincrement=False),
    Column("worker", String(128), nullable=False),
    Column("began_at", Double, nullable=False),
    Column("ended_at", Double),
    Column("outcome", String(16)),
    Column("error", JSON(none_as_null=True)),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("owner", String(128), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("fingerprint", String(128), nullable=False),
    # the index keeps the deletion of a job from scanning this table
    _reference("job", "jobs.number", nullable=False, index=True),
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
    Column("capabilities", JSON(none_as_null=True)),
)

events = Table(
    "events",
    metadata,
    _number(),
    _reference("job", "jobs.number", nullable=False),
    Column("owner", String(128), nullable=False),
    Column("type", String(64), nullable=False),
    Column("data", JSON, nullable=False),
    Column("created_at", Double, nullable=False, index=True),
    Index("events_of_job", "job", "number"),
    sqlite_autoincrement=True,
)

# Rejections by the moderation policy; counted here because workers on other hosts reject too.
refusals = Table(
    "refusals",
    metadata,
    Column("rule", String(MAX_RULE), primary_key=True),
    Column("target", String(16), primary_key=True),
    Column("code", String(32), primary_key=True),
    Column("count", BigInteger, nullable=False),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(12), primary_key=True),
    Column("owner", String(128), nullable=False),
    Column("name", Text, nullable=False),
    Column("scopes", JSON, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double),
    Column("last_used_at", Double),
    Column("revoked_at", Double),
)


def _grant_table(name: str) -> Table:
    """Sessions and sign-in codes: a digest, whose it is, and the key or run that it came from."""
    return Table(
        name,
        metadata,
        Column("digest", String(64), primary_key=True),
        Column("owner", String(128), nullable=False),
        Column("scopes", JSON, nullable=False),
        Column("key_id", String(12)),
        Column("token_digest", String(64)),
        Column("created_at", Double, nullable=False),
        Column("expires_at", Double, nullable=False),
        Index(f"{name}_of_owner", "owner", "created_at"),
    )


sessions = _grant_table("sessions")
sign_in_codes = _grant_table("sign_in_codes")

files = Table(
    "files",
    metadata,
    _number(),
    Column("id", String(64), nullable=False, unique=True),
    Column("owner", String(128), nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("name", Text, nullable=False),
    Column("asset", Text, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("created_at", Double, nullable=False, index=True),
    Index("files_of_owner", "owner", "number"),
    Index("files_of_purpose", "owner", "purpose", "number"),
    sqlite_autoincrement=True,
)

characters = Table(
    "characters",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("owner", String(128), nullable=False),
    Column("name", Text, nullable=False),
    Column("asset", Text, nullable=False),
    Column("created_at", Double, nullable=False),
)

# What is recognised in a character's clip; characters of older versions have no row.
likenesses = Table(
    "likenesses",
    metadata,
    Column(
        "character", String(64), ForeignKey("characters.id", ondelete="CASCADE"), primary_key=True
    ),
    Column("likeness", JSON, nullable=False),
    Column("consent", JSON(none_as_null=True)),
)

batches = Table(
    "batches",
    metadata,
    _number(),
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
    *(
        Column(name, Integer, nullable=False, server_default=text("0"))
        for name in ("total", "next_line", "completed", "failed")
    ),
    Index("batches_of_owner", "owner", "number"),
    sqlite_autoincrement=True,
)

batch_lines = Table(
    "batch_lines",
    metadata,
    _reference("batch", "batches.number", primary_key=True),
    Column("line", Integer, primary_key=True),
    Column("custom_id", Text, nullable=False),
    Column("body", JSON, nullable=False),
    Column("job", String(64)),
    Column("error", JSON(none_as_null=True)),
)

# Jobs of batch lines whose end is not yet counted in `batches`.
batch_jobs = Table(
    "batch_jobs",
    metadata,
    Column("job", String(64), primary_key=True),
    _reference("batch", "batches.number", nullable=False, index=True),
    Column("line", Integer, nullable=False),
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
