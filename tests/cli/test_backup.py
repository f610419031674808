"""`skyloom backup` and `skyloom restore`: complete, verified, and refused while a server runs."""

import subprocess
import sys
from contextlib import closing

import pytest

from skyloom.serve.queue.database import Database, choose_sqlite
from skyloom.serve.queue.jobs import JobStore
from skyloom.serve.queue.library import Library
from skyloom.serve.settings import Settings
from skyloom.serve.storage import FolderStorage

HOLD = """
import sys
from skyloom.serve.queue.database import Database
database = Database(sys.argv[1])
print(1, flush=True)
input()
"""


def submit(data, prompt: str) -> str:
    settings = Settings(data=data)
    with closing(Database(settings.database)) as database:
        return JobStore(database, settings).submit({"prompt": prompt}, owner="ada").id


def listed(skyloom, data) -> list[str]:
    return [line.split()[0] for line in skyloom("jobs", "list", "--data", data).out.splitlines()]


def test_database_backup_and_restore(skyloom, tmp_path):
    data = tmp_path / "data"
    first = submit(data, "a cat")
    ran = skyloom("backup", "copy.db", "--data", data)
    assert (ran.code, ran.out) == (0, "")
    assert str(data / "assets") in ran.err
    second = submit(data, "a dog")
    ran = skyloom("restore", "copy.db", "--data", data)
    assert ran.code == 0
    assert listed(skyloom, data) == [first]
    (kept,) = data.glob("skyloom.db.before-*")
    assert kept.name in ran.err
    assert skyloom("jobs", "show", second, "--database", f"sqlite:///{kept}").code == 0
    assert not list(data.glob("*.restoring*"))
    assert skyloom("restore", "copy.db", "--data", tmp_path / "new").code == 0
    assert listed(skyloom, tmp_path / "new") == [first]


def test_database_in_use_is_copied_but_not_replaced(skyloom, tmp_path):
    first = submit(tmp_path, "a cat")
    skyloom("backup", "copy.db", "--data", tmp_path)
    command = [sys.executable, "-c", HOLD, Settings(data=tmp_path).database]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "1\n"
        assert skyloom("backup", "live.db", "--data", tmp_path).code == 0
        ran = skyloom("restore", "copy.db", "--data", tmp_path)
        assert (ran.code, ran.err) == (
            2,
            "skyloom: A server or worker has the database open. Stop it first.\n",
        )
        server.communicate("\n")
    assert skyloom("restore", "copy.db", "--data", tmp_path).code == 0
    assert listed(skyloom, tmp_path) == [first]


def damaged(path) -> None:
    content = bytearray(path.read_bytes())
    content[4096 * 3 : 4096 * 6] = bytes(4096 * 3)
    path.write_bytes(content)


def other(path) -> None:
    path.unlink()
    with closing(choose_sqlite().connect(str(path))) as connection:
        connection.execute("CREATE TABLE birds (name)")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damaged, "is damaged"),
        (other, "is not a backup"),
        (lambda path: path.write_bytes(b"text"), "is not a backup"),
        (lambda path: path.unlink(), "does not exist"),
    ],
)
def test_invalid_backup_changes_nothing(skyloom, tmp_path, change, message):
    first = submit(tmp_path, "a cat")
    skyloom("backup", "copy.db", "--data", tmp_path)
    change(tmp_path / "copy.db")
    ran = skyloom("restore", "copy.db", "--data", tmp_path)
    assert ran.code == 2
    assert message in ran.err
    assert listed(skyloom, tmp_path) == [first]
    assert not list(tmp_path.glob("skyloom.db.*"))


def test_damaged_database_can_be_replaced(skyloom, tmp_path):
    first = submit(tmp_path, "a cat")
    skyloom("backup", "copy.db", "--data", tmp_path)
    (tmp_path / "skyloom.db").write_bytes(b"nothing of a database" * 1000)
    assert skyloom("restore", "copy.db", "--data", tmp_path).code == 0
    assert listed(skyloom, tmp_path) == [first]


def test_postgres_and_missing_databases_are_errors(skyloom, tmp_path):
    ran = skyloom("restore", "copy.db", "--database", "postgresql://ada@host/x")
    assert (ran.code, "pg_restore" in ran.err) == (2, True)
    ran = skyloom("backup", "copy.db", "--data", tmp_path / "none")
    assert (ran.code, "There is no database" in ran.err) == (2, True)
    assert not (tmp_path / "none").exists()


def test_folder_backup_and_restore(skyloom, tmp_path):
    data = tmp_path / "data"
    first = submit(data, "a cat")
    (data / "settings.toml").write_text("max_queued = 7\n")
    with closing(Database(Settings(data=data).database)) as database:
        Library(database).add_file(
            "ada", "vision", "a.png", FolderStorage(data / "assets").put(b"a", "png").reference, 1
        )
    ran = skyloom("backup", "copy", "--data", data)
    assert (ran.code, ran.out, ran.err) == (
        0,
        "",
        f"copy contains 3 files, {size_of(tmp_path / 'copy'):,} bytes\n",
    )
    newer = FolderStorage(data / "assets").put(b"newer", "png")
    ran = skyloom("restore", "copy", "--data", data)
    assert (ran.code, ran.out) == (0, f"{newer.key}\n")
    assert "1 files in the storage are not referenced" in ran.err
    assert skyloom("restore", "copy", "--data", tmp_path / "new").code == 0
    assert listed(skyloom, tmp_path / "new") == [first]
    assert (tmp_path / "new/settings.toml").read_text() == "max_queued = 7\n"
    assert skyloom("backup", "copy", "--data", data).code == 2


def size_of(folder) -> int:
    """Bytes of all files but the manifest."""
    return sum(
        path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    )


def test_missing_folders_are_errors_and_not_created(skyloom, tmp_path):
    submit(tmp_path / "data", "a cat")
    ran = skyloom("backup", "nowhere/copy.db", "--data", tmp_path / "data")
    assert ran.code != 0
    assert "The folder nowhere does not exist" in ran.err
    ran = skyloom("jobs", "list", "--data", tmp_path / "other")
    assert ran.code != 0
    assert "There is no database" in ran.err
    assert not (tmp_path / "other").exists()
