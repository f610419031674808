"""SQLite database files: find damage, and replace a database by a backup atomically."""

import os
import shutil
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from sqlalchemy.exc import DatabaseError

from skyloom.core.errors import ConfigError
from skyloom.serve.queue.database import Database, choose_sqlite, is_new, sqlite_file

WAL_SUFFIXES = ("-wal", "-shm")
DAMAGED_HINT = "Use another backup."
_HEADER = b"SQLite format 3\0"


def find_damage(url: str, *, backup_before_migration: bool = True) -> list[str]:
    """Check a database, even one that is too damaged to open. Returns a line per problem."""
    try:
        with closing(Database(url, backup_before_migration=backup_before_migration)) as database:
            return database.check()
    except DatabaseError as error:
        return [str(error.orig)]


def replace_sqlite(url: str, source: Path, prepare: Callable[[Database], None]) -> Path | None:
    """Replace an SQLite database by a backup file, atomically.

    Returns the path of the previous database, if any.

    The copy is checked, migrated and passed to `prepare` before it takes the database's place.
    Raises ConfigError for a file that is not a backup, is damaged or of a newer skyloom, while a
    process has the database open, and for Postgres.
    """
    target = sqlite_file(url)
    if target is None and url.startswith("sqlite"):
        raise ConfigError("A database in memory cannot be restored.", hint="Name a file.")
    if target is None:
        raise ConfigError("Postgres restores its own databases.", hint="Use pg_restore.")
    target.parent.mkdir(parents=True, exist_ok=True)
    copy = target.with_name(f"{target.name}.restoring")
    _remove_sqlite(copy)
    try:
        _copy_checked(source, copy)
        with closing(Database(f"sqlite:///{copy}", backup_before_migration=False)) as database:
            prepare(database)
        return _swap_in(copy, target)
    finally:
        _remove_sqlite(copy)


def _copy_checked(source: Path, copy: Path) -> None:
    """Copy a backup file and migrate the copy.

    Raises ConfigError unless it is a whole database of skyloom.
    """
    not_a_backup = ConfigError(
        f"{source} is not a backup of skyloom.", hint="Name a file that skyloom backup wrote."
    )
    try:
        if not has_sqlite_header(source):
            raise not_a_backup
        shutil.copyfile(source, copy)
    except FileNotFoundError as error:
        raise ConfigError(f"{source} does not exist.", hint="Check the path.") from error
    url = f"sqlite:///{copy}"
    if is_new(url):
        raise not_a_backup
    if damage := find_damage(url, backup_before_migration=False):
        raise ConfigError(f"{source} is damaged ({damage[0]:.80}).", hint=DAMAGED_HINT)


def _swap_in(copy: Path, target: Path) -> Path | None:
    """Rename the copy to the database while no process has it open.

    Returns the path of the previous one.
    """
    previous = None
    if target.exists():
        _close_log(target)
        previous = target.with_name(f"{target.name}.before-{time.strftime('%Y%m%dT%H%M%S')}")
        if previous.exists():
            raise ConfigError(f"{previous} already exists.", hint="Try again in a second.")
        os.link(target, previous)
    for suffix in WAL_SUFFIXES:
        target.with_name(target.name + suffix).unlink(missing_ok=True)
    with copy.open("rb") as file:
        os.fsync(file.fileno())
    copy.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return previous


def _close_log(target: Path) -> None:
    """Move the write-ahead log into the file.

    Raises ConfigError if a process has the database open.

    A database that is too damaged for that may be replaced.
    """
    sqlite = choose_sqlite()
    connection = sqlite.connect(str(target), timeout=1, isolation_level=None)
    try:
        for statement in (
            "PRAGMA locking_mode=EXCLUSIVE",
            "PRAGMA journal_mode=DELETE",
            "BEGIN EXCLUSIVE",
            "COMMIT",
        ):
            connection.execute(statement).fetchall()
    except sqlite.OperationalError as error:
        if "locked" in str(error):
            raise ConfigError(
                "A server or worker has the database open.", hint="Stop it first."
            ) from error
    except sqlite.DatabaseError:
        return
    finally:
        connection.close()


def _remove_sqlite(path: Path) -> None:
    for suffix in ("", *WAL_SUFFIXES):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def has_sqlite_header(path: Path) -> bool:
    """Whether a file is an SQLite database, by its first bytes."""
    with path.open("rb") as file:
        return file.read(len(_HEADER)) == _HEADER
