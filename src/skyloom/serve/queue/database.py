# pyright: basic
"""The database: SQLite by file or Postgres by URL; one write at a time, backup and check.

SQLite is the build of pysqlite3 (>= 3.51.3: older versions can corrupt a WAL written by two
processes), in WAL mode, with every commit on disk before it returns (synchronous=FULL) and without
mmap. On Postgres every write holds one advisory lock, so the queue's rules are the same on both:
what a write transaction reads does not change until it commits.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

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

MAX_PAGE = 100  # rows in a page of a list
_SAFE_SQLITE = (3, 51, 3)
_BUSY_SECONDS = 30
_POOL = {"pool_size": 4, "max_overflow": 60, "pool_timeout": 60}
# No error message may show parameters: they include secrets.
_QUIET = {"hide_parameters": True}
_LOCK = 0x534B594C  # id of the advisory lock, the same in every version
_POSTGRES_LIMITS = (
    "-c statement_timeout=30s -c lock_timeout=20s -c idle_in_transaction_session_timeout=20s"
)
_POSTGRES = {
    "options": _POSTGRES_LIMITS,
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,  # ms; without it a cut connection is noticed after 15 minutes
}


@dataclass(frozen=True)
class Write:
    """A write transaction, exclusive in the whole database, and its start in seconds since 1970."""

    connection: Connection
    now: float


class Database:
    """An open, migrated database. `clock` replaces the clock of the database.

    On Postgres the time is the server's, so hosts with different clocks agree on leases. Raises
    ConfigError for an invalid URL, a missing driver or a file of a newer skyloom, and
    CapacityError when the database cannot be reached.
    """

    def __init__(
        self,
        url: str,
        clock: Callable[[], float] | None = None,
        *,
        backup_before_migration: bool = True,
    ) -> None:
        self._clock = clock
        self._write_lock = threading.RLock()
        parsed = _parse(url)
        self.postgres = parsed.get_backend_name() == "postgresql"
        self._in_memory = not self.postgres and parsed.database in (None, "", ":memory:")
        self.engine = (
            _postgres_engine(parsed)
            if self.postgres
            else _sqlite_engine(parsed, memory=self._in_memory)
        )
        try:
            migrate(self.engine, metadata, lock=self._locked_now, backup=backup_before_migration)
        except OperationalError as error:
            self.close()
            cause = str(error.orig).splitlines()[0]
            hint = "Check its folder, and the file by `skyloom doctor --check-db`."
            if self.postgres:
                hint = "Check that it runs."
            raise CapacityError(f"The database cannot be opened ({cause}).", hint=hint) from error
        except BaseException:
            self.close()
            raise

    @contextmanager
    def write(self) -> Iterator[Write]:
        """Open a write transaction: committed to disk after the block, rolled back if it raises."""
        with self._write_lock, self.engine.connect() as connection, connection.begin():
            if not self.postgres:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            yield Write(connection, self._locked_now(connection))

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Open a read transaction: one consistent snapshot, without waiting for writers."""
        # a database in memory has one connection
        lock = self._write_lock if self._in_memory else nullcontext()
        with lock, self.engine.connect() as connection, connection.begin():
            if not self.postgres:
                connection.exec_driver_sql("BEGIN")
            yield connection

    def now(self) -> float:
        """Return the time by which leases expire, in seconds since 1970."""
        if self._clock or not self.postgres:
            return (self._clock or time.time)()
        with self.read() as connection:
            return _server_time(connection)

    def check(self) -> list[str]:
        """List damage of an SQLite file; on Postgres, read every table. Empty if there is none."""
        with self.read() as connection:
            if self.postgres:
                for table in metadata.sorted_tables:
                    connection.execute(select(func.count()).select_from(table)).scalar_one()
                return []
            found = [str(row[0]) for row in connection.exec_driver_sql("PRAGMA integrity_check")]
            broken = connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall()
        dangling = [f"a row of {row[0]} references a missing row" for row in broken]
        return [line for line in found if line != "ok"] + dangling

    def backup(self, target: Path) -> None:
        """Copy an SQLite database while it is in use. Raises ConfigError for Postgres."""
        if self.postgres:
            raise ConfigError("A Postgres database is backed up by Postgres.", hint="Use pg_dump.")
        if target.exists():
            raise ConfigError(f"{target} exists already.", hint="Name a new file.")
        if not target.absolute().parent.is_dir():
            raise ConfigError(f"The folder {target.parent} does not exist.", hint="Create it.")
        with self.engine.connect() as connection:
            connection.exec_driver_sql("VACUUM INTO ?", (str(target),))

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()

    def _locked_now(self, connection: Connection) -> float:
        """Take Postgres's write lock, then return the time."""
        if not self.postgres:
            return (self._clock or time.time)()
        connection.execute(select(func.pg_advisory_xact_lock(_LOCK)))
        return self._clock() if self._clock else _server_time(connection)


def _server_time(connection: Connection) -> float:
    """Return the Postgres server's clock in seconds since 1970."""
    epoch = func.extract("epoch", func.clock_timestamp())
    return float(connection.execute(select(epoch)).scalar_one())


def read_page(
    connection: Connection, query: Select[Any], limit: int
) -> tuple[Sequence[Row[Any]], bool]:
    """Return the first `limit` rows, MAX_PAGE at most, and whether there are more."""
    limit = min(max(limit, 0), MAX_PAGE)
    rows = connection.execute(query.limit(limit + 1)).all()
    return rows[:limit], len(rows) > limit


def is_new(url: str) -> bool:
    """Whether no skyloom database exists at a URL; creates nothing.

    False if the database cannot be reached or read; opening it with `Database` reports the reason.
    Raises ConfigError if the URL is invalid.
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
    """Return the resolved file of an SQLite database; None for Postgres and `:memory:`.

    Raises ConfigError for an invalid URL.
    """
    parsed = _parse(url)
    if parsed.get_backend_name() != "sqlite" or parsed.database in (None, "", ":memory:"):
        return None
    return Path(str(parsed.database)).resolve()


def redacted_url(url: str) -> str:
    """Return the URL without its password. Raises ConfigError for an invalid URL."""
    return _parse(url).render_as_string(hide_password=True)


def _parse(url: str) -> URL:
    hint = "Write sqlite:////folder/file.db or postgresql://user@host/name."
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        scheme = url.split("://", maxsplit=1)[0]
        message = f"database_url must be a database URL, got {scheme!r:.40}."
        raise ConfigError(message, hint=hint) from error
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        message = f"database_url must be of sqlite or postgresql, got {parsed.get_backend_name()}."
        raise ConfigError(message, hint=hint)
    return parsed


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
        hint = "Run pip install 'skyloom[postgres]'."
        raise ConfigError("The Postgres driver is not installed.", hint=hint) from error


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
        connection.isolation_level = None  # no implicit transactions
        _set_wal(connection)
        for pragma in ("synchronous=FULL", "foreign_keys=ON", "mmap_size=0"):
            connection.execute(f"PRAGMA {pragma}").close()

    return engine


def _set_wal(connection: Any) -> None:
    """Set the journal mode to WAL. SQLite does not wait for other processes that do so too."""
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL").close()
        except Exception as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def choose_sqlite() -> ModuleType:
    """Return an SQLite module that two processes may write with: pysqlite3's, else Python's own.

    Raises ConfigError when both are too old.
    """
    for name in ("pysqlite3", "sqlite3"):
        try:
            module = import_module(name)
        except ImportError:
            continue
        if module.sqlite_version_info >= _SAFE_SQLITE:
            return module
    message = "SQLite must be 3.51.3 or newer: older versions can corrupt a database."
    raise ConfigError(message, hint="pip install pysqlite3")
