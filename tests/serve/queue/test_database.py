"""The ground of the queue: durable settings, one writer, migrations that survive a crash, backup
and check."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import insert, select, update
from sqlalchemy.exc import OperationalError

from skyloom.core.errors import CapacityError, ConfigError
from skyloom.serve.queue import database as database_module
from skyloom.serve.queue.database import Database, choose_sqlite
from skyloom.serve.queue.tables import owners

from ..conftest import load_beside


def test_sqlite_pragmas_and_version(tmp_path):
    database = Database(f"sqlite:///{tmp_path / 'a.db'}")
    with database.read() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "mmap_size")
        }
        version = connection.exec_driver_sql("SELECT sqlite_version()").scalar_one()
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "mmap_size": 0}
    assert tuple(map(int, version.split("."))) >= (3, 51, 3)


def test_an_exception_rolls_back(database):
    with pytest.raises(KeyError), database.write() as write:
        write.connection.execute(insert(owners).values(owner="ada", served=1.0))
        raise KeyError
    with database.read() as connection:
        assert connection.execute(select(owners)).all() == []


def test_writes_are_serialized(database):
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


def test_writes_of_processes_are_serialized(tmp_path):
    url = f"sqlite:///{tmp_path / 'a.db'}"
    program = (
        "import sys\nfrom sqlalchemy import update\n"
        "from skyloom.serve.queue.database import Database\n"
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
    with pytest.raises(ConfigError, match="exists already"):
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
def test_invalid_urls_are_rejected(url: str):
    with pytest.raises(ConfigError):
        Database(url)


def test_an_unreachable_database_is_an_error(tmp_path):
    with pytest.raises(CapacityError, match="cannot be opened"):
        Database(f"postgresql://nobody@/none?host={tmp_path}")


def test_connections_recover_after_postgres_was_killed():
    postgres = load_beside("postgres")
    if reason := postgres.why_not():
        pytest.skip(reason)
    with postgres.cluster(durable=True) as cluster:
        database = Database(cluster.url)
        with database.write() as write:
            write.connection.execute(insert(owners).values(owner="ada", served=1.0))
        cluster.kill()
        with pytest.raises(OperationalError):
            database.now()
        cluster.start()
        with database.read() as connection:
            assert connection.execute(select(owners.c.owner)).scalars().all() == ["ada"]
        with database.write() as write:
            write.connection.execute(update(owners).values(served=2.0))
        database.close()


def test_a_password_is_in_no_error():
    with pytest.raises(ConfigError) as refused:
        Database("mysql://ada:secret@host/name")
    assert "secret" not in str(refused.value)


class LockedOnce:
    """A driver connection whose first change of the journal mode finds the database locked."""

    def __init__(self) -> None:
        self.statements: list[str] = []

    def execute(self, statement):
        self.statements.append(statement)
        if len(self.statements) == 1:
            raise RuntimeError("database is locked")
        return self

    def close(self) -> None:
        """Nothing to close."""


def test_the_switch_to_wal_waits_for_other_processes():
    connection = LockedOnce()
    database_module._set_wal(connection)
    assert connection.statements == ["PRAGMA journal_mode=WAL"] * 2


def test_other_errors_of_the_switch_to_wal_are_raised():
    connection = choose_sqlite().connect(":memory:")
    connection.close()
    with pytest.raises(Exception, match="closed"):
        database_module._set_wal(connection)
