"""Triggers that keep `job_counts` equal to the number of jobs per status.

Frozen: revision 0004 and new databases both create these triggers. A revision that changes them, or
that rebuilds the table `jobs` in SQLite (which drops its triggers), creates them again itself.
"""

from sqlalchemy import Connection

_SQLITE = (
    "CREATE TRIGGER jobs_count_added AFTER INSERT ON jobs BEGIN"
    " INSERT INTO job_counts (status, count) VALUES (NEW.status, 1)"
    " ON CONFLICT (status) DO UPDATE SET count = count + 1; END",
    "CREATE TRIGGER jobs_count_removed AFTER DELETE ON jobs BEGIN"
    " UPDATE job_counts SET count = count - 1 WHERE status = OLD.status; END",
    "CREATE TRIGGER jobs_count_moved AFTER UPDATE OF status ON jobs"
    " WHEN OLD.status <> NEW.status BEGIN"
    " UPDATE job_counts SET count = count - 1 WHERE status = OLD.status;"
    " INSERT INTO job_counts (status, count) VALUES (NEW.status, 1)"
    " ON CONFLICT (status) DO UPDATE SET count = count + 1; END",
)
_POSTGRES = (
    "CREATE OR REPLACE FUNCTION skyloom_count_jobs() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
    " IF TG_OP <> 'INSERT' THEN"
    " UPDATE job_counts SET count = count - 1 WHERE status = OLD.status; END IF;"
    " IF TG_OP <> 'DELETE' THEN INSERT INTO job_counts (status, count) VALUES (NEW.status, 1)"
    " ON CONFLICT (status) DO UPDATE SET count = job_counts.count + 1; END IF;"
    " RETURN NULL; END $$",
    "CREATE TRIGGER jobs_count AFTER INSERT OR DELETE OR UPDATE OF status ON jobs"
    " FOR EACH ROW EXECUTE FUNCTION skyloom_count_jobs()",
)


def create_job_counters(connection: Connection) -> None:
    """Create the triggers on `jobs`."""
    for statement in _POSTGRES if connection.dialect.name == "postgresql" else _SQLITE:
        connection.exec_driver_sql(statement)
