"""Whether a database is whole, and how one comes back from a backup (of the database alone; archive.py has all).

The backup is copied and checked before it takes the old one's place, and nobody may have that open meanwhile.
"""

import os
import shutil
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from sqlalchemy.exc import DatabaseError

from skyloom.core.errors import ConfigError
from skyloom.serve.queue.database import Database, choose_sqlite, sqlite_file
from skyloom.serve.queue.tables import schema

_HEAD = b"SQLite format 3\0"
_BESIDE = ("-wal", "-shm")
_OTHER = "Use another backup."


def restore(
    url: str, source: Path, prepare: Callable[[Database], object] = lambda _: None
) -> Path | None:
    """Put a backup in the place of an SQLite database; where the one that was there lies now, if there was one.

    It is there whole or not at all, also after a crash; `prepare` may change the copy, or refuse it, before. Raises
    ConfigError for a backup that is none, damaged or of a newer skyloom, while a server or worker has it open,
    and for Postgres.
    """
    target = _file(url)
    target.parent.mkdir(parents=True, exist_ok=True)
    copy = target.with_name(f"{target.name}.restoring")
    _remove(copy)
    try:
        _copy(source, copy)
        _check(copy, source)
        with closing(Database(f"sqlite:///{copy}", backup_before_migration=False)) as database:
            prepare(database)
        return _replace(target, copy)
    finally:
        _remove(copy)


def examine(url: str, *, backup: bool = True) -> list[str]:
    """What is wrong with a database, also with one that is too damaged to open; empty when all is well."""
    try:
        with closing(Database(url, backup_before_migration=backup)) as database:
            return database.check()
    except DatabaseError as error:
        return [str(error.orig)]


def _file(url: str) -> Path:
    file = sqlite_file(url)
    if file is not None:
        return file
    if url.startswith("sqlite"):
        raise ConfigError("A database in memory cannot be restored.", hint="Name a file.")
    raise ConfigError("A Postgres database is restored by Postgres.", hint="Use pg_restore.")


def _copy(source: Path, copy: Path) -> None:
    """The backup's bytes, on disk. Raises ConfigError for what is no SQLite file."""
    try:
        with source.open("rb") as file:
            if file.read(len(_HEAD)) != _HEAD:
                raise ConfigError(
                    f"{source} is no backup of skyloom's.", hint="Name a file of skyloom backup."
                )
            file.seek(0)
            with copy.open("xb") as made:
                shutil.copyfileobj(file, made)
    except FileNotFoundError as error:
        raise ConfigError(f"{source} does not exist.", hint="Check the path.") from error


def _check(copy: Path, source: Path) -> None:
    """Raise ConfigError unless the copy is a database of ours, whole, and brought to this version."""
    try:
        ours = _has_schema(copy)
    except choose_sqlite().DatabaseError as error:
        raise ConfigError(f"{source} is damaged ({error}).", hint=_OTHER) from error
    if not ours:
        raise ConfigError(
            f"{source} is no backup of skyloom's.", hint="Name a file of skyloom backup."
        )
    if damage := examine(f"sqlite:///{copy}", backup=False):
        raise ConfigError(f"{source} is damaged ({damage[0]:.80}).", hint=_OTHER)


def _has_schema(path: Path) -> bool:
    with closing(choose_sqlite().connect(str(path))) as connection:
        return bool(
            connection.execute(
                "SELECT 1 FROM sqlite_master WHERE name = ?", (schema.name,)
            ).fetchall()
        )


def _replace(target: Path, copy: Path) -> Path | None:
    """Move the database aside and the copy to its place, while nobody else has it open."""
    kept = None
    if target.exists():
        _let_go(target)
        kept = target.with_name(f"{target.name}.before-{time.strftime('%Y%m%dT%H%M%S')}")
        if kept.exists():
            raise ConfigError(f"{kept} is there already.", hint="Try again in a second.")
        os.link(target, kept)
    for end in _BESIDE:
        target.with_name(target.name + end).unlink(missing_ok=True)
    with copy.open("rb") as file:
        os.fsync(file.fileno())
    copy.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return kept


def _let_go(target: Path) -> None:
    """Bring what is in the log into the file, which works only while nobody else has it open. Raises ConfigError.

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
                "A server or worker has the database open.", hint="End it first."
            ) from error
    except sqlite.DatabaseError:
        return
    finally:
        connection.close()


def _remove(copy: Path) -> None:
    for end in ("", *_BESIDE):
        copy.with_name(copy.name + end).unlink(missing_ok=True)
