# pyright: basic
"""Create a database, or bring an older one to this version, in one transaction.

SQLite runs the transaction under BEGIN IMMEDIATE, Postgres under the advisory lock of every write:
of several processes one migrates, and the others find the new version when they get the lock. A
process that is killed leaves the version before. Before the migration of an SQLite file a copy is
written beside it; a Postgres database has no such copy.
"""

import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, Engine, MetaData, inspect, text
from sqlalchemy.exc import DBAPIError

from skyloom.core.errors import ConfigError, DiskFullError
from skyloom.serve.queue.migrations.version_4 import create_indexes, create_tables

if TYPE_CHECKING:
    from alembic.config import Config

SCRIPTS = Path(str(files("skyloom.serve.queue.migrations")))
VERSION = max(int(path.name[:4]) for path in (SCRIPTS / "versions").glob("[0-9]*.py"))
_LAST_UNSTAMPED = 4  # newest version from before alembic
_LOCK_MILLISECONDS = 600_000  # wait of a process while another one migrates an SQLite file
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _State:
    """Version of a database; whether alembic's table holds it (older skyloom has no such table)."""

    version: int
    stamped: bool


def migrate(
    engine: Engine,
    metadata: MetaData,
    *,
    lock: Callable[[Connection], float],
    backup: bool = True,
) -> None:
    """Create a new database from `metadata`, or run the revisions that an older one lacks.

    `lock` waits for the database's writers on Postgres and returns the time, in seconds since 1970.
    `backup` copies an SQLite file first. Raises ConfigError for a database of a newer skyloom,
    DiskFullError where the copy does not fit.
    """
    with engine.connect() as connection, connection.begin():
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN")
        state = _read_state(connection)
    if state == _State(VERSION, stamped=True):
        return
    with _migration(engine) as connection:
        now = lock(connection)
        state = _read_state(connection)
        if state is None:
            metadata.create_all(connection)
            _run(connection, metadata, now, stamp=VERSION)
            return
        if backup and state.version < VERSION:
            _back_up(engine, state.version)
        if not state.stamped:
            _run(connection, metadata, now, stamp=state.version)
            if state.version == _LAST_UNSTAMPED:
                create_tables(connection)
                create_indexes(connection)
        if state.version < VERSION:
            _run(connection, metadata, now)
            log.warning("the database is migrated from version %d to %d", state.version, VERSION)


def has_tables(connection: Connection) -> bool:
    """Whether a database holds skyloom's tables."""
    return inspect(connection).has_table("schema_version")


def _read_state(connection: Connection) -> _State | None:
    """Read the state of a database; None for one without skyloom's tables.

    Raises ConfigError for a newer version.
    """
    if not has_tables(connection):
        return None
    version = connection.execute(text("SELECT max(version) FROM schema_version")).scalar_one()
    stamp = None
    if inspect(connection).has_table("alembic_version"):
        stamp = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    if version is None and stamp is None:
        return None
    newest = max(int(version or 0), int(stamp or 0))
    if newest > VERSION:
        raise ConfigError(
            f"The database has version {newest}, and this skyloom knows versions up to {VERSION}.",
            hint="Install a newer skyloom, or restore the copy from before the update"
            f" (DATABASE.before-{newest:04}.backup).",
        )
    return _State(newest, stamped=stamp is not None)


@contextmanager
def _migration(engine: Engine) -> Iterator[Connection]:
    """Open the one transaction of a migration."""
    with engine.connect() as connection:
        if connection.dialect.name == "postgresql":
            with connection.begin():
                for limit in ("statement", "lock", "idle_in_transaction_session"):
                    connection.exec_driver_sql(f"SET LOCAL {limit}_timeout = 0")
                yield connection
            return
        # a copy of a table drops the original, which would delete the rows that refer to it
        busy = connection.exec_driver_sql("PRAGMA busy_timeout").scalar_one()
        connection.rollback()
        _configure_sqlite(connection, foreign_keys="OFF", busy_timeout=_LOCK_MILLISECONDS)
        try:
            with connection.begin():
                connection.exec_driver_sql("BEGIN IMMEDIATE")
                before = _count_dangling(connection)
                yield connection
                if _count_dangling(connection) > before:
                    raise ConfigError("The migration would leave references to missing rows.")
        finally:
            _configure_sqlite(connection, foreign_keys="ON", busy_timeout=busy)


def _configure_sqlite(connection: Connection, *, foreign_keys: str, busy_timeout: int) -> None:
    with connection.begin():
        connection.exec_driver_sql(f"PRAGMA foreign_keys={foreign_keys}")
        connection.exec_driver_sql(f"PRAGMA busy_timeout={busy_timeout}")


def _count_dangling(connection: Connection) -> int:
    return len(connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall())


def _run(
    connection: Connection, metadata: MetaData, now: float, *, stamp: int | None = None
) -> None:
    """Run the missing revisions, or only mark a database as being of version `stamp`."""
    from alembic import command

    config = _make_config()
    config.attributes.update(connection=connection, metadata=metadata, now=now)
    if stamp is None:
        command.upgrade(config, "head")
    else:
        command.stamp(config, f"{stamp:04}")


def _make_config() -> "Config":
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(SCRIPTS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def _back_up(engine: Engine, version: int) -> None:
    """Copy an SQLite file while this process holds its write lock; nothing for other databases."""
    name = engine.url.database
    if engine.dialect.name != "sqlite" or name in (None, "", ":memory:"):
        return
    database = Path(str(name)).resolve()
    target = database.with_name(f"{database.name}.before-{VERSION:04}.backup")
    partial = target.with_name(f"{target.name}.partial")
    _remove(partial)
    try:
        mode = stat.S_IMODE(database.stat().st_mode)
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
        with engine.connect() as reader:
            reader.exec_driver_sql("VACUUM INTO ?", (str(partial),))
        _flush(partial)
        partial.replace(target)
        _flush(target.parent)
    except (DBAPIError, OSError) as error:
        raise _explain(error, database) from error
    finally:
        _remove(partial)
    log.warning("the database of version %d is copied to %s before its migration", version, target)


def _remove(partial: Path) -> None:
    for suffix in ("", "-journal"):
        partial.with_name(partial.name + suffix).unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explain(error: DBAPIError | OSError, database: Path) -> ConfigError | DiskFullError:
    cause = str(error.orig if isinstance(error, DBAPIError) else error.strerror)
    message = f"{database.name} is not migrated to version {VERSION}: its backup failed ({cause})."
    size = database.stat().st_size / 2**20
    hint = f"Free {size:.0f} MB in {database.parent} and check its permissions, then start again."
    kind = DiskFullError if "full" in cause or "No space" in cause else ConfigError
    return kind(message, hint=hint)
