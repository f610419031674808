"""Migrations: atomic, keep every row, and give an older database the tables of a new one."""

import importlib
import json
import logging
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, inspect, select, text

from skyloom.core.errors import ConfigError, DiskFullError
from skyloom.serve.queue.batches import BatchStore, batch_jobs, lines
from skyloom.serve.queue.database import Database, choose_sqlite
from skyloom.serve.queue.jobs import JobStore
from skyloom.serve.queue.migrations import upgrade
from skyloom.serve.queue.migrations.upgrade import VERSION
from skyloom.serve.queue.tables import metadata, schema
from skyloom.serve.settings import Settings
from skyloom.serve.storage.backup import restore_backup

HERE = Path(__file__).parent
V4 = HERE.parents[1] / "fixtures/v4"
OLD_VERSIONS = (1, 2, 3, 4)
VERSION_TABLES = {"schema_version", "alembic_version"}
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
        for index, status in enumerate(_STATUSES)
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


@pytest.fixture
def new_shape(database_url) -> dict[str, object]:
    """Shape of a new database; the database is dropped again."""
    open_and_close(database_url)
    with bare(database_url) as connection:
        shape = read_shape(connection)
    clear(database_url)
    return shape


def test_running_every_revision_gives_the_tables_of_a_new_database(database_url, new_shape):
    with bare(database_url) as connection, connection.begin():
        upgrade._run(connection, metadata, 7.0)
    with bare(database_url) as connection:
        assert read_shape(connection) == new_shape
        versions = connection.execute(select(schema.c.version).order_by(schema.c.version))
        assert versions.scalars().all() == list(range(1, VERSION + 1))
    assert read_versions(database_url) == (VERSION, f"{VERSION:04}")


@pytest.mark.parametrize("version", OLD_VERSIONS)
def test_an_old_database_gets_the_tables_of_a_new_one(database_url, new_shape, version: int):
    make_old(database_url, version)
    database = Database(database_url)
    with database.read() as connection:
        assert read_shape(connection) == new_shape
    assert database.check() == []
    database.close()
    assert read_versions(database_url) == (VERSION, f"{VERSION:04}")


@pytest.mark.parametrize("version", OLD_VERSIONS)
def test_a_migration_keeps_every_row(database_url, version: int):
    make_old(database_url, version)
    with bare(database_url) as connection:
        before = read_rows(connection)
    open_and_close(database_url)
    with bare(database_url) as connection:
        after = read_rows(connection)
    assert any(before.values())
    computed = {"batches": {"total", "next_line", "completed", "failed"}} if version < 4 else {}
    for table, rows in before.items():
        skipped = computed.get(table, set())
        kept = [{name: row[name] for name in row if name not in skipped} for row in rows]
        found = [{name: row[name] for name in kept[0]} for row in after[table]] if kept else []
        assert found == kept, table


def test_a_migration_counts_the_jobs_and_batches_of_version_1(database_url, tmp_path):
    make_version_1(database_url)
    database = Database(database_url)
    store = JobStore(database, Settings(data=tmp_path))
    expected = {status: _STATUSES.count(status) for status in _STATUSES}
    assert store.counts().by_status == expected
    store.delete("video_3")
    store.cancel("video_0")
    left = {**expected, "completed": 1, "cancelled": 2}
    assert store.counts().by_status == {
        status: count for status, count in left.items() if status != "queued"
    }
    batches = BatchStore(database, store)
    open_batch = batches.get("batch_1", "ada")
    done = batches.get("batch_2", "ada")
    assert (open_batch.status, done.status) == ("in_progress", "completed")
    assert (open_batch.total, open_batch.next_line) == (6, 4)
    assert (open_batch.completed, open_batch.failed) == (0, 1)
    assert (done.total, done.next_line, done.completed, done.failed) == (6, 6, 2, 4)
    with database.read() as connection:
        outstanding = connection.execute(select(batch_jobs.c.job, batch_jobs.c.line)).all()
        assert sorted(map(tuple, outstanding)) == [("video_3", 1), ("video_4", 2), ("video_5", 3)]
        assert len(connection.execute(select(lines)).all()) == 12
    database.close()


@pytest.mark.parametrize("table", metadata.sorted_tables, ids=lambda table: table.name)
def test_every_foreign_key_has_an_index(table):
    """Without one, deleting the referenced row scans this table."""
    led = {index.columns[0].name for index in table.indexes}
    led.add(next(iter(table.primary_key.columns)).name)
    assert {key.parent.name for key in table.foreign_keys} <= led


@pytest.mark.parametrize("version", [1, 4])
@pytest.mark.parametrize("missing", [(), ("batch", "files", "characters", "likenesses")])
def test_a_process_that_imports_only_the_database_migrates_all_tables(tmp_path, version, missing):
    """A database that only a command has written may lack tables of the server."""
    url = f"sqlite:///{tmp_path / 'old.db'}"
    make_old(url, version)
    tables = [name for name in metadata.tables if name.startswith(missing)] if missing else []
    execute(url, [f"DROP TABLE IF EXISTS {name}" for name in tables])
    program = f"from skyloom.serve.queue.database import Database; print(Database({url!r}).check())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=program_environment(),
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
    with bare(url) as connection:
        shape = read_shape(connection)
    clear(url)
    open_and_close(url)
    with bare(url) as connection:
        assert read_shape(connection) == shape


# a future revision: a new column, changed rows, and a table that SQLite has to copy
NEXT_REVISION = """
import sqlalchemy as sa
from alembic import op
from skyloom.serve.queue.migrations.job_counters import create_job_counters

revision, down_revision = "{next:04}", "{last:04}"


def upgrade():
    op.add_column("owners", sa.Column("colour", sa.String(8)))
    op.execute("UPDATE owners SET colour = 'red'")
    options = {{"table_kwargs": {{"sqlite_autoincrement": True}}}}
    with op.batch_alter_table("jobs", **options) as jobs:
        jobs.alter_column("phase", type_=sa.String(64))
    if op.get_bind().dialect.name == "sqlite":
        create_job_counters(op.get_bind())
    {last_line}
"""


@pytest.fixture
def add_revision(tmp_path, monkeypatch):
    """Add a revision after the newest one for the duration of a test; `last_line` ends it."""

    def add(last_line: str = "pass") -> int:
        scripts = tmp_path / "scripts"
        shutil.rmtree(scripts, ignore_errors=True)
        shutil.copytree(upgrade.__spec__.origin.rpartition("/")[0], scripts)
        number = VERSION + 1
        script = NEXT_REVISION.format(next=number, last=VERSION, last_line=last_line)
        (scripts / f"versions/{number:04}_colour.py").write_text(script)
        monkeypatch.setattr(upgrade, "SCRIPTS", scripts)
        monkeypatch.setattr(upgrade, "VERSION", number)
        return number

    return add


@pytest.mark.parametrize("version", OLD_VERSIONS)
def test_an_added_revision_runs_once_and_keeps_referring_rows(database_url, add_revision, version):
    """A copy of `jobs` in SQLite would delete results and events if foreign keys were on."""
    make_old(database_url, version)
    open_and_close(database_url)
    with bare(database_url) as connection:
        before = read_rows(connection)
        shape = read_shape(connection)
    number = add_revision()
    for _ in range(2):
        open_and_close(database_url)
    assert read_versions(database_url) == (number, f"{number:04}")
    with bare(database_url) as connection:
        after = read_rows(connection)
        assert read_shape(connection)["rest"] == shape["rest"]
    owners = [{**row, "colour": "red"} for row in before["owners"]]
    assert after == {**before, "owners": owners}


def test_a_revision_that_fails_changes_nothing(database_url, add_revision):
    make_old(database_url, 4)
    open_and_close(database_url)
    with bare(database_url) as connection:
        before = (read_rows(connection), read_shape(connection))
    add_revision("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        open_and_close(database_url)
    with bare(database_url) as connection:
        assert (read_rows(connection), read_shape(connection)) == before
    assert read_versions(database_url) == (VERSION, f"{VERSION:04}")
    number = add_revision()
    open_and_close(database_url)
    assert read_versions(database_url) == (number, f"{number:04}")


def test_a_revision_that_leaves_dangling_references_is_undone(tmp_path, add_revision):
    url = f"sqlite:///{tmp_path / 'old.db'}"
    make_old(url, 4)
    open_and_close(url)
    add_revision("""op.execute("DELETE FROM jobs")""")
    with pytest.raises(ConfigError, match="references to missing rows"):
        open_and_close(url)
    assert read_versions(url) == (VERSION, f"{VERSION:04}")


@pytest.mark.parametrize("table", ["schema_version", "alembic_version"])
def test_a_newer_database_is_refused(database_url, table: str):
    open_and_close(database_url)
    newer = {
        "schema_version": f"INSERT INTO schema_version (version, at) VALUES ({VERSION + 3}, 0)",
        "alembic_version": f"UPDATE alembic_version SET version_num = '{VERSION + 3:04}'",
    }
    execute(database_url, [newer[table]])
    with pytest.raises(ConfigError) as refused:
        Database(database_url)
    assert str(refused.value) == (
        f"The database has version {VERSION + 3}, and this skyloom knows versions up to {VERSION}."
        " Install a newer skyloom, or restore the copy from before the update"
        f" (DATABASE.before-{VERSION + 3:04}.backup)."
    )


# Migrate a copy of the database in a child that kills itself after a number of steps of SQLite's
# virtual machine, so that a number always means the same place. Prints the steps of a migration.
KILLS = """
import os, shutil, signal, sys
from pathlib import Path
from sqlalchemy import Engine, event
import alembic.command
from skyloom.serve.queue.database import Database

old, count = Path(sys.argv[1]), int(sys.argv[2])
steps, last = 0, -1

def step():
    global steps
    steps += 1
    if steps == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return 0

@event.listens_for(Engine, "connect")
def watch(connection, _record):
    connection.set_progress_handler(step, 5)

def migrate(name):
    path = old.with_name(name)
    shutil.copy(old, path)
    Database(f"sqlite:///{path}", lambda: 7.0).close()

migrate("whole.db")
total, steps = steps, 0
for number in range(count):
    last = 1 + number * total // count
    child = os.fork()
    if child == 0:
        migrate(f"{number}.db")
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
print(total)
"""


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


def test_a_migration_killed_at_100_places_is_whole_when_opened_again(tmp_path):
    old = tmp_path / "old.db"
    make_version_1(f"sqlite:///{old}")
    before = read_all(old)
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(old), "100"],
        capture_output=True,
        text=True,
        env=program_environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1_000, "the places lie far apart"
    after = read_all(tmp_path / "whole.db")
    in_backup = 0
    for number in range(100):
        path = tmp_path / f"{number}.db"
        backup = tmp_path / f"{path.name}.before-{VERSION:04}.backup"
        assert read_all(path) in (before, after), number
        in_backup += not backup.exists()
        open_and_close(f"sqlite:///{path}")
        assert read_all(path) == after, number
        assert read_all(backup) == before, number
        assert not list(tmp_path.glob(f"{path.name}*.partial*"))
    assert 0 < in_backup < 100


PROCESS = """
import logging, sys
logging.basicConfig(stream=sys.stdout, format="%(message)s")
from skyloom.serve.queue.database import Database
print("ready", flush=True)
input()
Database(sys.argv[1]).close()
"""


@pytest.mark.parametrize("version", [None, 1, 4])
def test_of_processes_that_start_at_once_one_migrates(database_url, version):
    if version is not None:
        make_old(database_url, version)
    command = [sys.executable, "-c", PROCESS, database_url]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = [
        subprocess.Popen(command, text=True, env=program_environment(), **pipes) for _ in range(2)
    ]
    for process in started:
        assert process.stdout.readline() == "ready\n"
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    written = "".join(output for output, _ in outputs)
    assert written.count("is migrated") == (1 if version == 1 else 0)
    assert read_versions(database_url) == (VERSION, f"{VERSION:04}")


@pytest.mark.parametrize("version", [None, 1, 4])
def test_a_process_that_waited_for_the_lock_finds_the_new_version(
    database_url, version, monkeypatch
):
    """Another process creates or migrates the database between this one's look and its lock."""
    if version is not None:
        make_old(database_url, version)
    real = upgrade._migration

    def overtaken(engine):
        monkeypatch.undo()
        open_and_close(database_url)
        return real(engine)

    monkeypatch.setattr(upgrade, "_migration", overtaken)
    open_and_close(database_url)
    assert read_versions(database_url) == (VERSION, f"{VERSION:04}")


def test_a_migration_copies_the_database_first(tmp_path, caplog):
    path = tmp_path / "old.db"
    make_version_1(f"sqlite:///{path}")
    path.chmod(0o600)
    before = read_all(path)
    with caplog.at_level(logging.WARNING):
        open_and_close(f"sqlite:///{path}")
    backup = tmp_path / f"old.db.before-{VERSION:04}.backup"
    assert read_all(backup) == before
    assert stat.S_IMODE(backup.stat().st_mode) == 0o600
    assert str(backup) in caplog.text
    content = backup.read_bytes()
    open_and_close(f"sqlite:///{path}")
    assert backup.read_bytes() == content
    assert {one.name for one in tmp_path.iterdir()} == {path.name, backup.name}


def test_the_copy_holds_what_is_only_in_the_write_ahead_log(tmp_path):
    path = tmp_path / "old.db"
    make_version_1(f"sqlite:///{path}")
    with closing(choose_sqlite().connect(str(path))) as server:
        server.execute("INSERT INTO owners (owner, served) VALUES ('only in the log', 1)")
        server.commit()
        open_and_close(f"sqlite:///{path}")
    copied = read_all(tmp_path / f"old.db.before-{VERSION:04}.backup")
    assert ("only in the log", 1.0) in copied["owners"]


@pytest.mark.parametrize("version", [None, 4])
def test_no_copy_is_written_where_nothing_is_migrated(tmp_path, version):
    url = f"sqlite:///{tmp_path / 'a.db'}"
    if version is not None:
        make_old(url, version)
    open_and_close(url)
    assert not list(tmp_path.glob("*.backup"))


def test_the_copy_is_restored_and_migrated_again(tmp_path):
    settings = Settings(data=tmp_path / "data")
    settings.data.mkdir()
    make_version_1(settings.database)
    open_and_close(settings.database)
    path = settings.data / "skyloom.db"
    backup = path.with_name(f"skyloom.db.before-{VERSION:04}.backup")
    content = backup.read_bytes()
    after = read_all(path)["jobs"]
    execute(settings.database, ["DELETE FROM jobs"])
    done = restore_backup(settings, backup)
    assert read_all(path)["jobs"] == after
    assert read_versions(settings.database) == (VERSION, f"{VERSION:04}")
    assert done.replaced is not None
    assert backup.read_bytes() == content
    assert not list(settings.data.glob("*.restoring*"))


def fill(path: Path) -> None:
    """Add a megabyte to a database."""
    many = "WITH RECURSIVE n(i) AS (SELECT 1 UNION SELECT i + 1 FROM n WHERE i < 1000)"
    rows = f"{many} INSERT INTO owners SELECT printf('%01000d', i), 1 FROM n"
    execute(f"sqlite:///{path}", [rows])


LIMITED = """
import resource, sys
from skyloom.serve.queue.database import Database
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
Database(sys.argv[1])
"""


def test_a_copy_that_cannot_be_written_refuses_the_migration(tmp_path):
    path = tmp_path / "old.db"
    make_version_1(f"sqlite:///{path}")
    fill(path)
    before = (read_all(path), path.read_bytes())
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, f"sqlite:///{path}"],
        capture_output=True,
        text=True,
        env=program_environment(),
        check=False,
    )
    assert f"old.db is not migrated to version {VERSION}: its backup failed" in done.stderr
    assert (read_all(path), path.read_bytes()) == before
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    open_and_close(f"sqlite:///{path}")
    assert read_versions(f"sqlite:///{path}") == (VERSION, f"{VERSION:04}")


def test_a_full_disk_refuses_the_migration(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={24 * 2**20}", "none", str(disk)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        path = disk / "old.db"
        make_version_1(f"sqlite:///{path}")
        fill(path)
        room = path.stat().st_size // 2
        (disk / "other").write_bytes(bytes(shutil.disk_usage(disk).free - room))
        before = (read_all(path), path.read_bytes())
        with pytest.raises(DiskFullError, match="its backup failed"):
            open_and_close(f"sqlite:///{path}")
        assert (read_all(path), path.read_bytes()) == before
        (disk / "other").unlink()
        open_and_close(f"sqlite:///{path}")
        assert read_versions(f"sqlite:///{path}") == (VERSION, f"{VERSION:04}")
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
