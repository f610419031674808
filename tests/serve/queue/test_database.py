"""The ground of the queue: durable settings, one writer, migrations that survive a crash, backup and check."""

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import event, func, insert, inspect, select, text, update
from sqlalchemy.exc import OperationalError

from skyloom.core.errors import CapacityError, ConfigError, QueueError
from skyloom.serve.queue.database import VERSION, Database, migrate
from skyloom.serve.queue.tables import owners, schema

from ..conftest import load_beside


def test_sqlite_is_safe_and_waits_for_the_disk(tmp_path):
    database = Database(f"sqlite:///{tmp_path / 'a.db'}")
    with database.read() as connection:
        told = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "mmap_size")
        }
        version = connection.exec_driver_sql("SELECT sqlite_version()").scalar_one()
    assert told == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "mmap_size": 0}
    assert tuple(map(int, version.split("."))) >= (3, 51, 3)


def test_what_raises_is_undone(database):
    with pytest.raises(KeyError), database.write() as write:
        write.connection.execute(insert(owners).values(owner="ada", served=1.0))
        raise KeyError
    with database.read() as connection:
        assert connection.execute(select(owners)).all() == []


def test_writes_are_one_after_another(database):
    with database.write() as write:
        write.connection.execute(insert(owners).values(owner="ada", served=0.0))

    def add(_: int) -> None:
        with database.write() as write:
            served = write.connection.execute(select(owners.c.served)).scalar_one()
            write.connection.execute(update(owners).values(served=served + 1))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(add, range(80)))
    with database.read() as connection:
        assert connection.execute(select(owners.c.served)).scalar_one() == 80


def test_writes_that_wait_together_are_one_commit_and_fail_alone(database):
    commits = []
    event.listen(database.engine, "commit", commits.append)

    def add(number: int) -> int:
        def call(write) -> int:
            write.connection.execute(insert(owners).values(owner=f"owner {number}", served=0.0))
            if number % 7 == 0:
                raise QueueError(f"{number}")
            if number % 11 == 0:
                raise KeyError(number)
            return number

        try:
            return database.write_together(call)
        except (QueueError, KeyError):
            return -1

    with ThreadPoolExecutor(60) as threads:
        with database.write():  # until all wait
            wishes = [threads.submit(add, number) for number in range(60)]
            while database.waiting < 60:
                time.sleep(0.001)
        got = [wish.result() for wish in wishes]
    right = [number for number in range(60) if number % 7 and number % 11]
    assert [number for number in got if number >= 0] == right
    with database.read() as connection:
        assert connection.execute(select(func.count()).select_from(owners)).scalar_one() == len(
            right
        )
    assert len(commits) < 30


def test_a_full_disk_in_a_shared_commit_takes_nothing_from_those_who_were_told_yes():
    """SQLite undoes a whole transaction when a row finds no room, not only the row: nobody may be told otherwise."""
    refused = 0
    for room in range(12):
        database = Database("sqlite://")

        def add(number: int, database: Database = database) -> str | None:
            name = f"{number}" * 300
            row = insert(owners).values(owner=name, served=0.0)
            try:
                database.write_together(lambda write: write.connection.execute(row))
            except OperationalError:
                return None
            return name

        with database.engine.connect() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
            connection.exec_driver_sql(f"PRAGMA max_page_count={pages + room}")
        with ThreadPoolExecutor(40) as threads:
            with database.write():
                wishes = [threads.submit(add, number) for number in range(10, 50)]
                while database.waiting < 40:
                    time.sleep(0.001)
            told = {name for wish in wishes if (name := wish.result()) is not None}
        refused += 40 - len(told)
        with database.read() as connection:
            assert set(connection.execute(select(owners.c.owner)).scalars()) == told
        database.close()
    assert refused > 0


def test_processes_write_one_after_another(tmp_path):
    url = f"sqlite:///{tmp_path / 'a.db'}"
    program = (
        "import sys; from sqlalchemy import update; from skyloom.serve.queue.database import Database\n"
        "from skyloom.serve.queue.tables import owners\n"
        "database = Database(sys.argv[1])\n"
        "for _ in range(40):\n"
        "    with database.write() as write:\n"
        "        write.connection.execute(update(owners).values(served=owners.c.served + 1))\n"
    )
    database = Database(url)
    with database.write() as write:
        write.connection.execute(insert(owners).values(owner="ada", served=0.0))
    writers = [subprocess.Popen([sys.executable, "-c", program, url]) for _ in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    with database.read() as connection:
        assert connection.execute(select(owners.c.served)).scalar_one() == 120
    assert database.check() == []


def add_column(connection) -> None:
    """A step of a migration, in three statements."""
    connection.execute(text("ALTER TABLE owners ADD COLUMN colour VARCHAR(8)"))
    connection.execute(text("UPDATE owners SET colour = 'red'"))
    connection.execute(text("CREATE INDEX owners_colour ON owners (colour)"))


def version_of(database) -> int:
    """The version that the tables have."""
    with database.read() as connection:
        return max(connection.execute(select(schema.c.version)).scalars())


def test_a_migration_is_done_once_and_whole(database):
    with database.write() as write:
        write.connection.execute(insert(owners).values(owner="ada", served=1.0))
    for _ in range(2):
        migrate(database, VERSION + 1, {VERSION + 1: add_column})
        assert version_of(database) == VERSION + 1
    with database.read() as connection:
        assert connection.execute(text("SELECT owner, colour FROM owners")).all() == [
            ("ada", "red")
        ]


def test_a_migration_that_stops_midway_leaves_the_version_before(database):
    def torn(connection) -> None:
        add_column(connection)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        migrate(database, VERSION + 1, {VERSION + 1: torn})
    assert version_of(database) == VERSION
    with database.read() as connection:
        assert "colour" not in {
            column["name"] for column in inspect(connection).get_columns("owners")
        }
    migrate(database, VERSION + 1, {VERSION + 1: add_column})
    assert version_of(database) == VERSION + 1


KILLED_IN_A_MIGRATION = """
import os, signal, sys
from sqlalchemy import text
from skyloom.serve.queue.database import VERSION, Database, migrate

def torn(connection):
    for statement in ("ALTER TABLE owners ADD COLUMN a INT", "UPDATE owners SET a = 1")[: int(sys.argv[2])]:
        connection.execute(text(statement))
    os.kill(os.getpid(), signal.SIGKILL)

migrate(Database(sys.argv[1]), VERSION + 1, {VERSION + 1: torn})
"""


def test_a_process_killed_in_a_migration_leaves_the_version_before(tmp_path):
    url = f"sqlite:///{tmp_path / 'a.db'}"
    for statements in ("0", "1", "2"):
        killed = subprocess.run(
            [sys.executable, "-c", KILLED_IN_A_MIGRATION, url, statements], check=False
        )
        assert killed.returncode == -signal.SIGKILL
        database = Database(url)
        assert version_of(database) == VERSION
        assert database.check() == []
        database.close()


def test_a_newer_database_is_left_alone(database_url):
    database = Database(database_url)
    with database.write() as write:
        write.connection.execute(insert(schema).values(version=VERSION + 1, at=0.0))
    database.close()
    with pytest.raises(ConfigError, match="newer skyloom"):
        Database(database_url)


def test_a_backup_taken_in_use_is_whole(tmp_path):
    database = Database(f"sqlite:///{tmp_path / 'a.db'}")
    with database.write() as write:
        write.connection.execute(insert(owners).values(owner="ada", served=1.0))
    database.backup(tmp_path / "copy.db")
    with database.write() as write:
        write.connection.execute(insert(owners).values(owner="bob", served=1.0))
    copy = Database(f"sqlite:///{tmp_path / 'copy.db'}")
    with copy.read() as connection:
        assert connection.execute(select(owners.c.owner)).scalars().all() == ["ada"]
    assert copy.check() == []
    with pytest.raises(ConfigError, match="there already"):
        database.backup(tmp_path / "copy.db")


def test_damage_is_found(tmp_path):
    path = tmp_path / "a.db"
    database = Database(f"sqlite:///{path}")
    with database.write() as write:
        rows = [{"owner": f"owner {number}", "served": 1.0} for number in range(2_000)]
        write.connection.execute(insert(owners), rows)
    with database.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    content = bytearray(path.read_bytes())
    place = content.index(b"owner 1500")
    content[place : place + 10] = b"owner 9999"
    path.write_bytes(content)
    assert Database(f"sqlite:///{path}").check() != []


@pytest.mark.parametrize("url", ["", "jobs.db", "mysql://host/name", "://"])
def test_wrong_urls_are_refused(url: str):
    with pytest.raises(ConfigError):
        Database(url)


def test_an_absent_database_is_a_sentence(tmp_path):
    with pytest.raises(CapacityError, match="cannot be opened"):
        Database(f"postgresql://nobody@/none?host={tmp_path}")


def test_a_postgres_that_was_killed_is_found_again():
    postgres = load_beside("postgres")
    if reason := postgres.why_not():
        pytest.skip(reason)
    row = insert(owners).values(owner="ada", served=1.0)
    with postgres.cluster(durable=True) as cluster:
        database = Database(cluster.url)
        database.write_together(lambda write: write.connection.execute(row))
        cluster.kill()
        with pytest.raises(OperationalError):
            database.now()
        cluster.start()
        with database.read() as connection:
            assert connection.execute(select(owners.c.owner)).scalars().all() == ["ada"]
        database.write_together(
            lambda write: write.connection.execute(update(owners).values(served=2.0))
        )
        database.close()


def test_a_password_is_in_no_error():
    with pytest.raises(ConfigError) as refused:
        Database("mysql://ada:secret@host/name")
    assert "secret" not in str(refused.value)
