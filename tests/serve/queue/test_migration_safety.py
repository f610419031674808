"""Migrations are atomic, run in one process at a time, and copy an SQLite database first."""

import logging
import os
import shutil
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from skyloom.core.errors import DiskFullError
from skyloom.serve.queue.database import choose_sqlite
from skyloom.serve.queue.migrations import upgrade
from skyloom.serve.queue.migrations.upgrade import VERSION
from skyloom.serve.settings import Settings
from skyloom.serve.storage.backup import restore_backup

from .old_databases import (
    execute,
    make_old,
    make_version_1,
    open_and_close,
    program_environment,
    read_all,
    read_versions,
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
    assert written.count("is migrated") == (0 if version is None else 1)
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


def test_no_copy_is_written_where_nothing_is_migrated(tmp_path):
    url = f"sqlite:///{tmp_path / 'a.db'}"
    for _ in range(2):
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
