"""A database of an older skyloom comes out as a new one is, with everything in it and its counters right."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import inspect, select, text

from skyloom.serve.queue.batches import BatchStore
from skyloom.serve.queue.database import VERSION, Database
from skyloom.serve.queue.jobs import JobStore
from skyloom.serve.queue.tables import batch_jobs, batch_lines, metadata, schema
from skyloom.serve.settings import Settings

HERE = Path(__file__).parent
_STATUSES = (
    "queued",
    "in_progress",
    "paused",
    "completed",
    "completed",
    "failed",
    "cancelled",
    "expired",
)


def run_on(url: str, statements: list[str]) -> None:
    """Do statements by the bare driver."""
    if url.startswith("sqlite"):
        sqlite = importlib.import_module("skyloom.serve.queue.database").choose_sqlite()
        connection = sqlite.connect(url.removeprefix("sqlite:///"))
    else:
        connection = importlib.import_module("psycopg").connect(url)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


def make_version_1(url: str) -> None:
    """The tables as version 1 had them, with jobs in every state and batches that wait, were cancelled and are done."""
    name = "sqlite" if url.startswith("sqlite") else "postgres"
    ddl = (HERE / f"version_1_{name}.sql").read_text().split(";\n")
    false = "0" if name == "sqlite" else "false"
    rows = ["INSERT INTO schema_version (version, at) VALUES (1, 0)"]
    rows += [
        "INSERT INTO jobs (id, owner, kind, status, priority, cost, request, extra, deleted, progress, checkpoint,"
        " attempts, token, run_after, created_at)"
        f" VALUES ('video_{index}', 'ada', 'video', '{status}', 0, 1, '{{}}', '{{}}', {false}, 0, '{{}}', 0, 0, 0, 1)"
        for index, status in enumerate(_STATUSES)
    ]
    told = json.dumps({"code": "x", "message": "wrong", "status": 400})
    for number, (completed_at, noted) in enumerate(((None, 4), ("5", 6)), start=1):
        completed = completed_at or "NULL"
        rows.append(
            "INSERT INTO batches (id, owner, input_file, metadata, created_at, expires_at, completed_at)"
            f" VALUES ('batch_{number}', 'ada', 'file-1', '{{}}', 1, 9e12, {completed})"
        )
        for line in range(6):
            job = f"'video_{line + 2}'" if line < noted and line else "NULL"
            error = f"'{told}'" if line == 0 else "NULL"
            rows.append(
                "INSERT INTO batch_lines (batch, line, custom_id, body, job, error)"
                f" VALUES ({number}, {line}, 'l{line}', '{{}}', {job}, {error})"
            )
    run_on(url, [statement for statement in [*ddl, *rows] if statement.strip()])


def shape(database: Database) -> dict[str, object]:
    """Tables, columns, indexes, keys and triggers as the database has them."""
    with database.read() as connection:
        look = inspect(connection)
        found: dict[str, object] = {}
        for table in sorted(look.get_table_names()):
            columns = [
                (c["name"], str(c["type"]), c["nullable"], c["default"])
                for c in look.get_columns(table)
            ]
            found[table] = (
                columns,
                look.get_pk_constraint(table)["constrained_columns"],
                look.get_foreign_keys(table),
            )
        if database.postgres:
            indexes = "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public' ORDER BY indexname"
            triggers = "SELECT tgname, pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal ORDER BY tgname"
            functions = "SELECT proname, prosrc FROM pg_proc WHERE proname LIKE 'skyloom%'"
            asked = (indexes, triggers, functions)
        else:
            asked = (
                "SELECT name, sql FROM sqlite_master WHERE type IN ('index', 'trigger') ORDER BY name",
            )
        found["rest"] = [[tuple(row) for row in connection.execute(text(ask))] for ask in asked]
    return found


def empty(url: str) -> None:
    """Drop everything."""
    if url.startswith("sqlite"):
        for path in Path(url.removeprefix("sqlite:///")).parent.glob("*.db*"):
            path.unlink()
    else:
        psycopg = importlib.import_module("psycopg")
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")


def test_an_old_database_comes_out_like_a_new_one(database_url):
    new = Database(database_url)
    wanted = shape(new)
    new.close()
    empty(database_url)
    make_version_1(database_url)
    old = Database(database_url)
    assert shape(old) == wanted
    with old.read() as connection:
        assert max(connection.execute(select(schema.c.version)).scalars()) == VERSION
    assert old.check() == []
    old.close()


def test_what_an_old_database_held_is_counted(database_url, tmp_path):
    make_version_1(database_url)
    database = Database(database_url)
    store = JobStore(database, Settings(data=tmp_path))
    wanted = {status: _STATUSES.count(status) for status in _STATUSES}
    assert store.counts().by_status == wanted
    store.delete("video_3")
    store.cancel("video_0")
    left = {**wanted, "completed": 1, "cancelled": 2}
    assert store.counts().by_status == {
        status: count for status, count in left.items() if status != "queued"
    }
    waits, done = (BatchStore(database, store).get(f"batch_{number}", "ada") for number in (1, 2))
    assert (waits.status, waits.total, waits.next_line, waits.completed, waits.failed) == (
        "in_progress",
        6,
        4,
        0,
        1,
    )
    assert (done.status, done.total, done.next_line, done.completed, done.failed) == (
        "completed",
        6,
        6,
        2,
        4,
    )
    with database.read() as connection:
        outstanding = connection.execute(select(batch_jobs.c.job, batch_jobs.c.line)).all()
        assert sorted(map(tuple, outstanding)) == [("video_3", 1), ("video_4", 2), ("video_5", 3)]
        assert len(connection.execute(select(batch_lines)).all()) == 12
    database.close()


@pytest.mark.parametrize("table", metadata.sorted_tables, ids=lambda table: table.name)
def test_every_reference_to_another_table_has_an_index(table):
    """Or a row that is deleted there scans this table for what goes with it; no plan shows that."""
    led = {index.columns[0].name for index in table.indexes} | {
        next(iter(table.primary_key.columns)).name
    }
    assert {key.parent.name for key in table.foreign_keys} <= led


@pytest.mark.parametrize("without", [(), ("batch", "files", "characters", "api_keys")])
def test_every_opener_migrates_also_where_nothing_else_is_imported(tmp_path, without):
    """A worker, a backup or a restore opens the database before any module of the server's calls is loaded, and a
    database that only a command has written may lack tables of the server."""
    url = f"sqlite:///{tmp_path / 'old.db'}"
    make_version_1(url)
    tables = [name for name in metadata.tables if name.startswith(without)] if without else []
    run_on(url, [f"DROP TABLE IF EXISTS {name}" for name in tables])
    program = f"from skyloom.serve.queue.database import Database; print(Database({url!r}).check())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
    database = Database(url)
    with database.read() as connection:
        assert set(metadata.tables) <= set(inspect(connection).get_table_names())
    assert sum(JobStore(database, Settings(data=tmp_path)).counts().by_status.values()) == len(
        _STATUSES
    )
    database.close()
