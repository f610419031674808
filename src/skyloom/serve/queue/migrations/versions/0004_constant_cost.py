"""Revision 0004: indexes and counters that keep calls independent of the number of jobs."""

from alembic import op
from sqlalchemy import inspect

from skyloom.serve.queue.migrations.job_counters import create_job_counters
from skyloom.serve.queue.migrations.version_4 import create_indexes, create_tables

revision = "0004"
down_revision = "0003"

_CHANGED_INDEXES = (
    "jobs_active",
    "jobs_fingerprint",
    "jobs_expiry",
    "ix_webhook_deliveries_next_at",
)
_LINES = "SELECT count(*) FROM batch_lines WHERE batch_lines.batch = batches.number"
_COUNTS = (
    "INSERT INTO job_counts (status, count) SELECT status, count(*) FROM jobs GROUP BY status",
    f"UPDATE batches SET total = ({_LINES})",
    # lines are submitted in order: those with a job or an error come first
    f"UPDATE batches SET next_line = ({_LINES} AND (job IS NOT NULL OR error IS NOT NULL))",
    f"UPDATE batches SET failed = ({_LINES} AND error IS NOT NULL) WHERE completed_at IS NULL",
    "INSERT INTO batch_jobs (job, batch, line) SELECT job, batch, line FROM batch_lines"
    " JOIN batches ON batches.number = batch_lines.batch"
    " WHERE batches.completed_at IS NULL AND batch_lines.job IS NOT NULL",
    "UPDATE batches SET completed ="
    " (SELECT count(*) FROM batch_lines JOIN jobs ON jobs.id = batch_lines.job"
    " WHERE batch_lines.batch = batches.number AND jobs.status = 'completed')"
    " WHERE completed_at IS NOT NULL",
    "UPDATE batches SET failed = total - completed WHERE completed_at IS NOT NULL",
)


def upgrade() -> None:
    """Add missing tables, indexes and columns; count jobs and lines of batches."""
    connection = op.get_bind()
    create_tables(connection)
    present = {column["name"] for column in inspect(connection).get_columns("batches")}
    for name in ("total", "next_line", "completed", "failed"):
        if name not in present:
            op.execute(f"ALTER TABLE batches ADD COLUMN {name} INTEGER DEFAULT 0 NOT NULL")
    for name in _CHANGED_INDEXES:
        op.execute(f"DROP INDEX IF EXISTS {name}")
    create_indexes(connection)
    for statement in _COUNTS:
        op.execute(statement)
    create_job_counters(connection)
