"""The ground of the queue: durable settings, one writer, migrations that survive a crash, backup and check."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import event, func, insert, select, update
from sqlalchemy.exc import OperationalError

from skyloom.core.errors import CapacityError, ConfigError, JobError
from skyloom.serve.queue.database import Database
from skyloom.serve.queue.tables import owners

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
                raise JobError(f"{number}")
            if number % 11 == 0:
                raise KeyError(number)
            return number

        try:
            return database.write_together(call)
        except (JobError, KeyError):
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
