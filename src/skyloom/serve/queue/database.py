"""The database: SQLite in a file or Postgres by URL, one write at a time, migrations, backup and check.

SQLite is the build that pysqlite3 brings (>= 3.51.3: older ones can corrupt a WAL that two processes write), in WAL
mode, with every commit on disk before it returns (synchronous=FULL) and no mmap. On Postgres every write holds one
advisory lock, so that the rules of the queue are the same on both: what a write reads, nobody changes meanwhile.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from sqlalchemy import (
    Connection,
    Engine,
    Row,
    Select,
    create_engine,
    event,
    func,
    select,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError
from sqlalchemy.pool import StaticPool

from skyloom.core.errors import CapacityError, ConfigError
from skyloom.serve.queue.migrations.upgrade import has_tables, migrate
from skyloom.serve.queue.tables import metadata

T = TypeVar("T")
_TABLE_MODULES = ("api_keys", "batches", "library", "moderation_counters")  # beside tables.py
MAX_PAGE = 100  # rows of a list, whatever is asked for
_SAFE_SQLITE = (3, 51, 3)
_BUSY_SECONDS = 30
_POOL = {"pool_size": 4, "max_overflow": 60, "pool_timeout": 60}
_QUIET = {
    "hide_parameters": True
}  # what is written, secrets among it, is in no message of an error
_MOST_TOGETHER = 64
_LOCK = 0x534B594C  # any number, the same for every skyloom
_POSTGRES_LIMITS = (
    "-c statement_timeout=30s -c lock_timeout=20s -c idle_in_transaction_session_timeout=20s"
)
_POSTGRES = {
    "options": _POSTGRES_LIMITS,
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,  # milliseconds; or a cable that is cut is noticed after a quarter of an hour
}


@dataclass(frozen=True)
class Write:
    """A transaction that nobody else writes beside, and the time at which it began (seconds since 1970)."""

    connection: Connection
    now: float


class _Call(Generic[T]):
    """What a thread wants to write, and what came of it."""

    def __init__(self, call: Callable[[Write], T]) -> None:
        self.call = call
        self.value: list[T] = []
        self.error: Exception | None = None
        self.done = False


class Database:
    """A database that is ready to use: created, or migrated to this version. `clock` replaces the database's own clock.

    On Postgres the time is the server's, so that hosts whose clocks differ agree on leases. Raises ConfigError for a
    URL that is none, a driver that is missing or a file written by a newer skyloom; CapacityError when it cannot be
    reached.
    """

    def __init__(
        self,
        url: str,
        clock: Callable[[], float] | None = None,
        *,
        backup_before_migration: bool = True,
    ) -> None:
        self._clock = clock
        self._turn = threading.RLock()
        self._waiting: deque[_Call[Any]] = deque()
        parsed = _parse(url)
        self.postgres = parsed.get_backend_name() == "postgresql"
        self._in_memory = not self.postgres and parsed.database in (None, "", ":memory:")
        self.engine = (
            _postgres_engine(parsed)
            if self.postgres
            else _sqlite_engine(parsed, memory=self._in_memory)
        )
        _register_tables()
        try:
            migrate(self.engine, metadata, lock=self._locked_now, backup=backup_before_migration)
        except OperationalError as error:
            self.close()
            cause = str(error.orig).splitlines()[0]
            hint = (
                "Check that it runs."
                if self.postgres
                else "Check its folder, and the file by `skyloom doctor --check-db`."
            )
            raise CapacityError(f"The database cannot be opened ({cause}).", hint=hint) from error
        except BaseException:
            self.close()
            raise

    @contextmanager
    def write(self) -> Iterator[Write]:
        """One write transaction: on disk when the block has ended well, undone when it raises."""
        with self._turn, self.engine.connect() as connection, connection.begin():
            if not self.postgres:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            yield Write(connection, self._locked_now(connection))

    def write_together(self, call: Callable[[Write], T]) -> T:
        """Do one call in a write transaction, and whatever other threads want to write by then in the same one.

        Each is undone alone if it raises; all are on disk when they return. So many clients cost one wait for the disk.
        """
        mine: _Call[T] = _Call(call)
        self._waiting.append(mine)
        with self._turn:
            while not mine.done:
                batch = [
                    self._waiting.popleft() for _ in range(min(len(self._waiting), _MOST_TOGETHER))
                ]
                _do_all(self, batch)
        if mine.error is not None:
            raise mine.error
        return mine.value[0]

    @property
    def waiting(self) -> int:
        """How many calls wait to be written together."""
        return len(self._waiting)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One consistent look that waits for nobody."""
        turn = (
            self._turn if self._in_memory else nullcontext()
        )  # a database in memory has one connection
        with turn, self.engine.connect() as connection, connection.begin():
            if not self.postgres:
                connection.exec_driver_sql("BEGIN")
            yield connection

    def now(self) -> float:
        """Seconds since 1970 by the clock that leases go by."""
        if self._clock or not self.postgres:
            return (self._clock or time.time)()
        with self.read() as connection:
            return float(
                connection.execute(
                    select(func.extract("epoch", func.clock_timestamp()))
                ).scalar_one()
            )

    def check(self) -> list[str]:
        """What is wrong with an SQLite file, or that Postgres cannot read a table; empty when all is well."""
        with self.read() as connection:
            if self.postgres:
                for table in metadata.sorted_tables:
                    connection.execute(select(func.count()).select_from(table)).scalar_one()
                return []
            found = [str(row[0]) for row in connection.exec_driver_sql("PRAGMA integrity_check")]
            broken = connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall()
        return [line for line in found if line != "ok"] + [
            f"a row of {row[0]} points nowhere" for row in broken
        ]

    def backup(self, target: Path) -> None:
        """A whole copy of an SQLite database while it is in use. Raises ConfigError where that is not the way."""
        if self.postgres:
            raise ConfigError("A Postgres database is backed up by Postgres.", hint="Use pg_dump.")
        if target.exists():
            raise ConfigError(f"{target} is there already.", hint="Name a new file.")
        if not target.absolute().parent.is_dir():
            raise ConfigError(
                f"The folder {target.parent} does not exist.", hint="Make it, or name another."
            )
        with self.engine.connect() as connection:
            connection.exec_driver_sql("VACUUM INTO ?", (str(target),))

    def close(self) -> None:
        """Let go of every connection."""
        self.engine.dispose()

    def _locked_now(self, connection: Connection) -> float:
        """The time, once nobody else writes."""
        if not self.postgres:
            return (self._clock or time.time)()
        connection.execute(select(func.pg_advisory_xact_lock(_LOCK)))
        told = connection.execute(
            select(func.extract("epoch", func.clock_timestamp()))
        ).scalar_one()
        return self._clock() if self._clock else float(told)


def read_page(
    connection: Connection, look: Select[Any], limit: int
) -> tuple[Sequence[Row[Any]], bool]:
    """The first `limit` rows of a query, MAX_PAGE at most, and whether there are more."""
    limit = min(max(limit, 0), MAX_PAGE)
    rows = connection.execute(look.limit(limit + 1)).all()
    return rows[:limit], len(rows) > limit


class _TornError(Exception):
    """The database refused one of several calls."""


def _do_all(database: Database, batch: Sequence[_Call[Any]]) -> None:
    """Do calls in one transaction, each of them whole or not at all.

    When the database itself refuses a call, what the others wrote may be gone as well (SQLite undoes the whole
    transaction when its disk is full): then everything is undone, and each is done alone.
    """
    try:
        with database.write() as write:
            for one in batch:
                try:
                    with write.connection.begin_nested() if len(batch) > 1 else nullcontext():
                        one.value = [one.call(write)]
                except DBAPIError as error:
                    if len(batch) == 1 or error.connection_invalidated:
                        raise
                    raise _TornError from error
                except Exception as error:
                    one.error = error
                    if len(batch) == 1:
                        raise
    except _TornError:
        for one in batch:
            one.error = None
            _do_all(database, [one])
    except Exception as error:  # the database said no: nothing was written, for nobody
        for one in batch:
            one.error = one.error or error
    finally:
        for one in batch:
            one.done = True


def is_new(url: str) -> bool:
    """Whether there is no database of skyloom's at a URL; looks only, and makes nothing.

    False for one that cannot be reached or read: `Database` says why. Raises ConfigError for a URL that is none.
    """
    parsed, file = _parse(url), sqlite_file(url)
    postgres = parsed.get_backend_name() == "postgresql"
    if not postgres and (file is None or not file.exists()):
        return True
    engine = _postgres_engine(parsed) if postgres else _sqlite_engine(parsed, memory=False)
    try:
        with engine.connect() as connection:
            return not has_tables(connection)
    except DBAPIError:
        return False
    finally:
        engine.dispose()


def sqlite_file(url: str) -> Path | None:
    """The file of an SQLite database, behind symbolic links; None for Postgres and for one in memory.

    Raises ConfigError for a URL that is none.
    """
    parsed = _parse(url)
    if parsed.get_backend_name() != "sqlite" or parsed.database in (None, "", ":memory:"):
        return None
    return Path(str(parsed.database)).resolve()


def name_of(url: str) -> str:
    """A database's URL as people may see it: without its password. Raises ConfigError for a URL that is none."""
    return _parse(url).render_as_string(hide_password=True)


def _register_tables() -> None:
    """Import the modules that add tables to `metadata`."""
    for name in _TABLE_MODULES:
        import_module(f"skyloom.serve.queue.{name}")


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ConfigError(
            f"{url.split('://', maxsplit=1)[0]!r:.40} is no database URL.", hint=_URLS
        ) from error
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise ConfigError(f"{parsed.get_backend_name()!r} is no database of skyloom's.", hint=_URLS)
    return parsed


_URLS = "Write sqlite:////a/file.db or postgresql://user@host/name."


def _postgres_engine(url: URL) -> Engine:
    try:
        return create_engine(
            url.set(drivername="postgresql+psycopg"),
            connect_args=_POSTGRES,
            pool_pre_ping=True,
            **_QUIET,
            **_POOL,
        )
    except ImportError as error:
        raise ConfigError(
            "Postgres needs its driver.", hint="Run pip install 'skyloom[postgres]'."
        ) from error


def _sqlite_engine(url: URL, *, memory: bool) -> Engine:
    if not memory:
        Path(str(url.database)).parent.mkdir(parents=True, exist_ok=True)
    pool: dict[str, Any] = {"poolclass": StaticPool} if memory else _POOL
    arguments = {"check_same_thread": False, "timeout": _BUSY_SECONDS}
    engine = create_engine(
        url.set(drivername="sqlite"),
        module=choose_sqlite(),
        connect_args=arguments,
        **_QUIET,
        **pool,
    )

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # transactions begin where we say so
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "mmap_size=0"):
            connection.execute(f"PRAGMA {pragma}").close()

    return engine


def choose_sqlite() -> ModuleType:
    """The first SQLite that is safe to write from two processes: pysqlite3's, or Python's own where it is new.

    Raises ConfigError when there is none.
    """
    for name in ("pysqlite3", "sqlite3"):
        try:
            module = import_module(name)
        except ImportError:
            continue
        if module.sqlite_version_info >= _SAFE_SQLITE:
            return module
    raise ConfigError(
        "This Python's SQLite can corrupt a database (before 3.51.3).", hint="pip install pysqlite3"
    )
