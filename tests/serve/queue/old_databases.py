"""Databases of versions 1 to 4 with rows, and what a database holds, read without a migration."""

import importlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, inspect, text

from skyloom.serve.queue.database import Database, choose_sqlite

HERE = Path(__file__).parent
V4 = HERE.parents[1] / "fixtures/v4"
OLD_VERSIONS = (1, 2, 3, 4)
VERSION_TABLES = {"schema_version", "alembic_version"}
STATUSES = (
    "queued",
    "in_progress",
    "paused",
    "completed",
    "completed",
    "failed",
    "cancelled",
    "expired",
)
Rows = dict[str, list[dict[str, Any]]]


def execute(url: str, statements: list[str]) -> None:
    """Execute statements with the bare driver, in WAL mode on SQLite."""
    if url.startswith("sqlite"):
        connection = choose_sqlite().connect(url.removeprefix("sqlite:///"))
        connection.execute("PRAGMA journal_mode=WAL")
        for statement in statements:
            connection.executescript(statement)
    else:
        connection = importlib.import_module("psycopg").connect(url)
        for statement in statements:
            connection.execute(statement)
    connection.commit()
    connection.close()


def make_version_1(url: str, version: int = 1) -> None:
    """Create tables of version 1 with jobs of every status, an open and a completed batch."""
    name = "sqlite" if url.startswith("sqlite") else "postgres"
    ddl = (HERE / f"version_1_{name}.sql").read_text().split(";\n")
    false = "0" if name == "sqlite" else "false"
    rows = [f"INSERT INTO schema_version (version, at) VALUES ({version}, 0)"]
    rows += [
        "INSERT INTO jobs (id, owner, kind, status, priority, cost, request, extra, deleted,"
        " progress, checkpoint, attempts, token, run_after, created_at)"
        f" VALUES ('video_{index}', 'ada', 'video', '{status}', 0, 1, '{{}}', '{{}}', {false}, 0,"
        " '{}', 0, 0, 0, 1)"
        for index, status in enumerate(STATUSES)
    ]
    error_json = json.dumps({"code": "x", "message": "wrong", "status": 400})
    for number, (completed_at, submitted) in enumerate(((None, 4), ("5", 6)), start=1):
        completed = completed_at or "NULL"
        rows.append(
            "INSERT INTO batches"
            " (id, owner, input_file, metadata, created_at, expires_at, completed_at)"
            f" VALUES ('batch_{number}', 'ada', 'file-1', '{{}}', 1, 9e12, {completed})"
        )
        for line in range(6):
            job = f"'video_{line + 2}'" if line < submitted and line else "NULL"
            error = f"'{error_json}'" if line == 0 else "NULL"
            rows.append(
                "INSERT INTO batch_lines (batch, line, custom_id, body, job, error)"
                f" VALUES ({number}, {line}, 'l{line}', '{{}}', {job}, {error})"
            )
    execute(url, [statement for statement in [*ddl, *rows] if statement.strip()])


def make_old(url: str, version: int) -> None:
    """Create a database of version 1, 2, 3 or 4 with rows."""
    if version < max(OLD_VERSIONS):
        make_version_1(url, version)
        return
    kind = "sqlite" if url.startswith("sqlite") else "postgres"
    execute(url, [(V4 / f"jobs_{kind}.sql").read_text()])


def clear(url: str) -> None:
    """Drop everything."""
    if url.startswith("sqlite"):
        for path in Path(url.removeprefix("sqlite:///")).parent.glob("*.db*"):
            path.unlink()
    else:
        psycopg = importlib.import_module("psycopg")
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")


@contextmanager
def bare(url: str) -> Iterator[Connection]:
    """Connect without a migration."""
    sqlalchemy = importlib.import_module("sqlalchemy")
    module = {"module": choose_sqlite()} if url.startswith("sqlite") else {}
    engine = sqlalchemy.create_engine(url.replace("postgresql:", "postgresql+psycopg:"), **module)
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def read_rows(connection: Connection) -> Rows:
    """Every row by table, in order of the primary key, but for the version."""
    inspector = inspect(connection)
    found: Rows = {}
    for table in sorted(set(inspector.get_table_names()) - VERSION_TABLES):
        keys = inspector.get_pk_constraint(table)["constrained_columns"]
        order = ", ".join(f'"{key}"' for key in keys)
        look = text(f"SELECT * FROM {table} ORDER BY {order}")
        found[table] = [dict(row) for row in connection.execute(look).mappings()]
    return found


def read_shape(connection: Connection) -> dict[str, object]:
    """Tables, columns, keys, indexes, triggers and functions as the database reports them."""
    inspector = inspect(connection)
    shape: dict[str, object] = {}
    for table in sorted(inspector.get_table_names()):
        columns = [
            (one["name"], str(one["type"]), one["nullable"], one["default"])
            for one in inspector.get_columns(table)
        ]
        keys = inspector.get_pk_constraint(table)["constrained_columns"]
        shape[table] = (columns, keys, inspector.get_foreign_keys(table))
    if connection.dialect.name == "postgresql":
        queries = (
            "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'"
            " ORDER BY indexname",
            "SELECT tgname, pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal"
            " ORDER BY tgname",
            "SELECT proname, prosrc FROM pg_proc WHERE proname LIKE 'skyloom%'",
        )
    else:
        queries = (
            "SELECT name, sql FROM sqlite_master WHERE type IN ('index', 'trigger') ORDER BY name",
            "SELECT name FROM sqlite_master WHERE sql LIKE '%AUTOINCREMENT%' ORDER BY name",
        )
    shape["rest"] = [[tuple(row) for row in connection.execute(text(one))] for one in queries]
    return shape


def read_versions(url: str) -> tuple[int, str | None]:
    """The version that an older skyloom reads, and alembic's revision."""
    with bare(url) as connection:
        version = connection.execute(text("SELECT max(version) FROM schema_version")).scalar_one()
        if not inspect(connection).has_table("alembic_version"):
            return version, None
        return version, connection.execute(text("SELECT * FROM alembic_version")).scalar_one()


def open_and_close(url: str, **options: Any) -> None:
    Database(url, lambda: 7.0, **options).close()


def program_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def read_all(path: Path) -> dict[str, list[tuple[object, ...]]]:
    """Every row and every definition of a whole SQLite database."""
    with closing(choose_sqlite().connect(str(path))) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        look = "SELECT type, name, sql FROM sqlite_master ORDER BY type, name"
        found = {"definitions": connection.execute(look).fetchall()}
        for kind, name, _ in found["definitions"]:
            if kind == "table":
                found[name] = sorted(connection.execute(f"SELECT * FROM {name}"), key=repr)
        return found
