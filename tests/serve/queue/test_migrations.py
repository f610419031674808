"""Migrations keep every row and give an older database the tables of a new one."""

import shutil
import subprocess
import sys

import pytest
from sqlalchemy import select

from skyloom.core.errors import ConfigError
from skyloom.serve.queue.batches import BatchStore
from skyloom.serve.queue.database import Database
from skyloom.serve.queue.jobs import JobStore
from skyloom.serve.queue.migrations import upgrade
from skyloom.serve.queue.migrations.upgrade import VERSION
from skyloom.serve.queue.tables import batch_jobs, batch_lines, metadata, schema
from skyloom.serve.settings import Settings

from .old_databases import (
    OLD_VERSIONS,
    STATUSES,
    bare,
    clear,
    execute,
    make_old,
    make_version_1,
    open_and_close,
    program_environment,
    read_rows,
    read_shape,
    read_versions,
)


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
    expected = {status: STATUSES.count(status) for status in STATUSES}
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
        assert len(connection.execute(select(batch_lines)).all()) == 12
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


def test_settings_of_a_connection_are_restored_after_a_migration(tmp_path):
    make_version_1(f"sqlite:///{tmp_path / 'old.db'}")
    database = Database(f"sqlite:///{tmp_path / 'old.db'}")
    with database.read() as connection:
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar_one() == 1
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar_one() == 30_000
    database.close()


def test_an_empty_version_table_is_a_new_database(tmp_path):
    url = f"sqlite:///{tmp_path / 'a.db'}"
    execute(url, ["CREATE TABLE schema_version (version INTEGER PRIMARY KEY, at DOUBLE)"])
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
