"""Steps that bring the tables of an older skyloom to today's.

Step n brings version n - 1 to n in one transaction. The SQL is frozen: a step never changes with tables.py. A new
database is made by tables.py alone and has to come out the same; tests/serve/queue/test_migrations.py compares both.
"""

from collections.abc import Callable, Mapping

from sqlalchemy import Connection, inspect

Migration = Callable[[Connection], None]

_SQLITE_COUNTERS = (
    "CREATE TRIGGER jobs_count_added AFTER INSERT ON jobs BEGIN"
    " INSERT INTO job_counts (status, count) VALUES (NEW.status, 1)"
    " ON CONFLICT (status) DO UPDATE SET count = count + 1; END",
    "CREATE TRIGGER jobs_count_removed AFTER DELETE ON jobs BEGIN"
    " UPDATE job_counts SET count = count - 1 WHERE status = OLD.status; END",
    "CREATE TRIGGER jobs_count_moved AFTER UPDATE OF status ON jobs WHEN OLD.status <> NEW.status BEGIN"
    " UPDATE job_counts SET count = count - 1 WHERE status = OLD.status;"
    " INSERT INTO job_counts (status, count) VALUES (NEW.status, 1)"
    " ON CONFLICT (status) DO UPDATE SET count = count + 1; END",
)
_POSTGRES_COUNTERS = (
    "CREATE OR REPLACE FUNCTION skyloom_count_jobs() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
    " IF TG_OP <> 'INSERT' THEN UPDATE job_counts SET count = count - 1 WHERE status = OLD.status; END IF;"
    " IF TG_OP <> 'DELETE' THEN INSERT INTO job_counts (status, count) VALUES (NEW.status, 1)"
    " ON CONFLICT (status) DO UPDATE SET count = job_counts.count + 1; END IF;"
    " RETURN NULL; END $$",
    "CREATE TRIGGER jobs_count AFTER INSERT OR DELETE OR UPDATE OF status ON jobs"
    " FOR EACH ROW EXECUTE FUNCTION skyloom_count_jobs()",
)


def create_job_counters(connection: Connection) -> None:
    """The triggers that keep job_counts, whoever writes to jobs and however."""
    for statement in (
        _POSTGRES_COUNTERS if connection.dialect.name == "postgresql" else _SQLITE_COUNTERS
    ):
        connection.exec_driver_sql(statement)


_ENDED = "status = 'failed' OR status = 'cancelled' OR status = 'expired'"
_NOTED = "SELECT count(*) FROM batch_lines WHERE batch_lines.batch = batches.number"
_CONSTANT_COST = (
    "DROP INDEX IF EXISTS jobs_active",
    "DROP INDEX IF EXISTS jobs_fingerprint",
    "DROP INDEX IF EXISTS jobs_expiry",
    "DROP INDEX IF EXISTS ix_webhook_deliveries_next_at",
    "CREATE INDEX IF NOT EXISTS jobs_active ON jobs (status, owner)"
    " WHERE status = 'queued' OR status = 'in_progress' OR status = 'paused'",
    f"CREATE INDEX IF NOT EXISTS jobs_over ON jobs (status, number) WHERE status = 'completed' OR {_ENDED}",
    "CREATE INDEX IF NOT EXISTS jobs_fingerprint ON jobs (owner, fingerprint, number)",
    f"CREATE INDEX IF NOT EXISTS jobs_ended ON jobs (status, completed_at) WHERE {_ENDED}",
    "CREATE INDEX IF NOT EXISTS jobs_expiry ON jobs (status, expires_at)"
    " WHERE status = 'completed' AND expires_at IS NOT NULL",
    "CREATE INDEX IF NOT EXISTS ix_idempotency_keys_job ON idempotency_keys (job)",
    "CREATE INDEX IF NOT EXISTS ix_events_created_at ON events (created_at)",
    "CREATE INDEX IF NOT EXISTS webhook_deliveries_due ON webhook_deliveries (next_at, created_at)",
    "CREATE INDEX IF NOT EXISTS files_of_purpose ON files (owner, purpose, number)",
    "CREATE INDEX IF NOT EXISTS ix_files_created_at ON files (created_at)",
    "CREATE INDEX IF NOT EXISTS ix_batches_completed_at ON batches (completed_at)",
    "INSERT INTO job_counts (status, count) SELECT status, count(*) FROM jobs GROUP BY status",
    f"UPDATE batches SET total = ({_NOTED})",
    # lines were submitted in order: those with a job or an error come first
    f"UPDATE batches SET next_line = ({_NOTED} AND (job IS NOT NULL OR error IS NOT NULL))",
    f"UPDATE batches SET failed = ({_NOTED} AND error IS NOT NULL) WHERE completed_at IS NULL",
    "INSERT INTO batch_jobs (job, batch, line) SELECT job, batch, line FROM batch_lines"
    " JOIN batches ON batches.number = batch_lines.batch"
    " WHERE batches.completed_at IS NULL AND batch_lines.job IS NOT NULL",
    "UPDATE batches SET completed = (SELECT count(*) FROM batch_lines JOIN jobs ON jobs.id = batch_lines.job"
    " WHERE batch_lines.batch = batches.number AND jobs.status = 'completed') WHERE completed_at IS NOT NULL",
    "UPDATE batches SET failed = total - completed WHERE completed_at IS NOT NULL",
)


def make_cost_constant(connection: Connection) -> None:
    """Indexes that answer every call without a scan, counters of jobs by status, and counters of batches."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(
            "SET LOCAL statement_timeout = 0"
        )  # an index of a large table takes a while
    there = {column["name"] for column in inspect(connection).get_columns("batches")}
    for name in ("total", "next_line", "completed", "failed"):
        if name not in there:  # a table that was missing is new already
            connection.exec_driver_sql(
                f"ALTER TABLE batches ADD COLUMN {name} INTEGER DEFAULT 0 NOT NULL"
            )
    for statement in _CONSTANT_COST:
        connection.exec_driver_sql(statement)
    create_job_counters(connection)


MIGRATIONS: Mapping[int, Migration] = {4: make_cost_constant}
