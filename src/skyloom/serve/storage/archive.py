"""A backup of everything: a folder with the database, the assets that it names, and what lies beside them.

    manifest.json              installation, time, version, and size and sha256 of every other file
    database.sqlite or .dump   SQLite's VACUUM INTO, or pg_dump's custom format
    assets/ab/<sha256>.<kind>  as in a storage
    beside/...                 signing keys, provenance registry, settings.toml: the rest of the data folder

The database is taken first and names what is copied; unnamed assets have days of grace, so none is missing. A restore
adds and never deletes: assets that are newer than the backup stay, and so does what already lies in the data folder.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sqlalchemy.engine import make_url

from skyloom.core.errors import ConfigError, MediaError, RequestError
from skyloom.core.version import __version__
from skyloom.serve.queue.database import Database, choose_sqlite, is_new, sqlite_file
from skyloom.serve.settings import Settings
from skyloom.serve.storage import database_backup as backup
from skyloom.serve.storage.assets import PIECE, Asset, Storage
from skyloom.serve.storage.folder import FolderStorage, open_storage
from skyloom.serve.storage.garbage import bring_back
from skyloom.serve.storage.installation import (
    check_pair,
    holds_newest,
    named_by,
    open_database,
    prepare_restored,
    protect,
    read_note,
    write_note,
)
from skyloom.serve.storage.inventory import Inventory

MANIFEST, FORMAT = "manifest.json", 1
_SQLITE, _DUMP, _ASSETS, _BESIDE = "database.sqlite", "database.dump", "assets/", "beside/"
_NAME = re.compile(r"database\.(sqlite|dump)|(assets|beside)/[^\0]+")
_SQLITE_HEAD = b"SQLite format 3\0"
_LEFT_OUT = re.compile(r"\..*|runs|skyloom\.db.*|cluster\.(json|log)")  # of the data folder
_DAMAGED = "Use another backup."


@dataclass(frozen=True)
class Backup:
    """What was backed up: files and bytes, and references that the database names and the storage does not have."""

    files: int
    bytes: int
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Restored:
    """What a restore did: where the database that was there lies now, how many assets were put back into the storage,
    what of the data folder was there already and stays, and keys of assets that the database does not name."""

    replaced: Path | None
    put_back: int = 0
    kept: tuple[str, ...] = ()
    unnamed: tuple[str, ...] = ()


def back_up(settings: Settings, target: Path) -> Backup:
    """Write a backup of everything into a new folder: whole or not at all. Raises ConfigError where there is no
    database, or where the storage is another installation's."""
    if target.exists():
        raise ConfigError(f"{target} is there already.", hint="Name a new folder.")
    if not target.absolute().parent.is_dir():
        raise ConfigError(
            f"The folder {target.parent} does not exist.", hint="Make it, or name another."
        )
    storage = open_storage(settings.storage)
    with closing(open_database(settings, create=False)) as database:
        inventory = Inventory(database)
        check_pair(inventory, storage, settings)
        partial = Path(tempfile.mkdtemp(dir=target.absolute().parent, prefix=f".{target.name}-"))
        try:
            named = _take_database(database, settings, partial)
            missing = _take_assets(storage, named, partial)
            _take_beside(settings, target, partial)
            mine = inventory.identity()
            written = _write_manifest(partial, None if mine is None else mine.id)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return Backup(len(written), sum(one["size"] for one in written.values()), tuple(missing))


def restore(settings: Settings, source: Path) -> Restored:
    """Put back a backup: a folder of `back_up`'s, or one file with the database alone. All of it is checked first.

    Raises ConfigError for a backup that is damaged or another installation's, and while the database is in use.
    """
    protect(settings)
    storage, named = open_storage(settings.storage), set[str]()
    put_back, kept = 0, ()
    if source.is_dir():
        told = read_manifest(source)
        _check_owner(storage, told)
        _check_reloaded(settings, source)
        put_back = _put_assets(storage, source)
        replaced = _put_database(settings, storage, source, named)
        kept = tuple(_put_beside(settings, source))
    else:
        replaced = backup.restore(settings.database, source, _preparing(settings, storage, named))
    with closing(Database(settings.database)) as database:
        _sign(database, storage)
        bring_back(database, storage, named)
    unnamed = sorted(asset.key for asset, _ in storage.assets() if asset.reference not in named)
    return Restored(replaced, put_back, kept, tuple(unnamed))


def read_manifest(folder: Path) -> dict[str, Any]:
    """A backup's manifest, once every file in it is what it says. Raises ConfigError."""
    try:
        told = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {
            str(name): (int(one["size"]), str(one["sha256"])) for name, one in told["files"].items()
        }
        version = int(told["format"])
    except FileNotFoundError as error:
        raise ConfigError(
            f"{folder} is no backup of skyloom's.", hint="Name a folder of skyloom backup."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{folder / MANIFEST} is damaged.", hint=_DAMAGED) from error
    if version > FORMAT:
        raise ConfigError(
            f"The backup has format {version}, this skyloom knows {FORMAT}.",
            hint="Use a newer skyloom.",
        )
    for name, (size, digest) in files.items():
        path = folder / name
        if (
            not _NAME.fullmatch(name)
            or ".." in PurePosixPath(name).parts
            or not _lies_in(path, folder)
        ):
            raise ConfigError(f"The backup names the file {name!r:.80}.", hint=_DAMAGED)
        if not path.is_file() or path.stat().st_size != size or _hash(path) != digest:
            raise ConfigError(f"{path} is damaged.", hint=_DAMAGED)
    if not {_SQLITE, _DUMP} & files.keys():
        raise ConfigError(f"{folder} holds no database.", hint=_DAMAGED)
    return told


def _take_database(database: Database, settings: Settings, folder: Path) -> set[str]:
    """Copy the database; gives the references that the copy names."""
    if not database.postgres:
        database.backup(folder / _SQLITE)
        with closing(Database(f"sqlite:///{folder / _SQLITE}")) as copy:
            return named_by(copy, settings)
    before = named_by(database, settings)
    url = make_url(settings.database).set(drivername="postgresql")
    password = {"PGPASSWORD": url.password} if url.password else {}
    place = url.set(password=None).render_as_string()  # arguments can be read by others
    command = ["pg_dump", "--format=custom", f"--file={folder / _DUMP}", f"--dbname={place}"]
    try:
        subprocess.run(
            command, env={**os.environ, **password}, check=True, capture_output=True, text=True
        )
    except FileNotFoundError as error:
        raise ConfigError(
            "pg_dump is not on this machine.", hint="Install Postgres' client programs."
        ) from error
    except subprocess.CalledProcessError as error:
        raise ConfigError(
            f"pg_dump failed: {error.stderr.strip():.300}", hint="Use that of the server's version."
        ) from error
    return before | named_by(database, settings)


def _take_assets(storage: Storage, named: set[str], folder: Path) -> list[str]:
    """Copy assets by their hashes; gives the references that the storage does not have."""
    missing: list[str] = []
    for reference in sorted(named):
        try:
            asset = Asset.parse(reference)
        except RequestError:
            continue  # a text of a client's
        path = folder / _ASSETS / asset.key
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            storage.fetch(asset, path)
        except MediaError:
            missing.append(reference)
    return missing


def _take_beside(settings: Settings, target: Path, folder: Path) -> None:
    """Copy what else lies in the data folder, but no storage, no work in progress and no backups."""
    data = settings.data.resolve()
    skipped = {target.resolve(), folder.resolve()}
    if (place := _folder_of(settings)) is not None:
        skipped.add(place)
    if (file := sqlite_file(settings.database)) is not None:
        skipped |= {file.with_name(file.name + end) for end in ("", "-wal", "-shm")}
    for path in _files_beside(data, skipped):
        copy = folder / _BESIDE / path.relative_to(data)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if _begins_like_sqlite(path):
            with closing(choose_sqlite().connect(str(path), timeout=30)) as connection:
                connection.execute("VACUUM INTO ?", (str(copy),))
        else:
            shutil.copyfile(path, copy)


def _files_beside(folder: Path, skipped: set[Path]) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path in skipped or path.is_symlink() or path.name.endswith(("-wal", "-shm", "-journal")):
            continue
        if path.parent == folder and _LEFT_OUT.fullmatch(path.name):
            continue
        if path.is_dir() and not (path / MANIFEST).exists():
            yield from _files_beside(path, skipped)
        elif path.is_file():
            yield path


def _write_manifest(folder: Path, installation: str | None) -> dict[str, dict[str, Any]]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _hash(path)}
        for path in paths
    }
    made_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    told = {
        "format": FORMAT,
        "skyloom": __version__,
        "made_at": made_at,
        "installation": installation,
        "files": files,
    }
    with (folder / MANIFEST).open("x", encoding="utf-8") as file:
        json.dump(told, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    return files


def _check_owner(storage: Storage, told: dict[str, Any]) -> None:
    note = read_note(storage)
    if note is not None and told["installation"] not in (None, note.id):
        raise ConfigError(
            f"The backup is of installation {told['installation']}, and the storage belongs to {note.id}.",
            hint="Name that installation's storage, or a new folder.",
        )


def _put_assets(storage: Storage, source: Path) -> int:
    """Store what the storage does not have."""
    count = 0
    for asset, _ in FolderStorage(source / _ASSETS).assets():
        if storage.find(asset.key) is None:
            storage.put(source / _ASSETS / asset.key, asset.suffix)
            count += 1
    return count


def _put_database(
    settings: Settings, storage: Storage, source: Path, named: set[str]
) -> Path | None:
    prepare = _preparing(settings, storage, named)
    if (source / _SQLITE).exists():
        return backup.restore(settings.database, source / _SQLITE, prepare)
    with closing(Database(settings.database)) as database:
        prepare(database)
    return None


def _check_reloaded(settings: Settings, source: Path) -> None:
    """Raise ConfigError unless a dump of Postgres is in its database already, which pg_restore does."""
    postgres = sqlite_file(settings.database) is None
    if postgres != (source / _DUMP).exists():
        kind = "SQLite" if postgres else "Postgres"
        raise ConfigError(
            f"The backup is of {kind}, and the database is not.",
            hint="Name another with --database.",
        )
    if postgres and is_new(settings.database):
        hint = f"Run pg_restore --no-owner --dbname=URL {source / _DUMP} first, then this again."
        raise ConfigError("The database is empty.", hint=hint)


def _preparing(settings: Settings, storage: Storage, named: set[str]) -> Any:
    def prepare(database: Database) -> None:
        named.update(prepare_restored(Inventory(database), storage, settings))

    return prepare


def _sign(database: Database, storage: Storage) -> None:
    """Write the installation's note where the storage has none and holds what the database names."""
    inventory = Inventory(database)
    mine = inventory.identity()
    if mine is not None and (not inventory.newest_results(1) or holds_newest(inventory, storage)):
        write_note(storage, mine, replace=False)


def _put_beside(settings: Settings, source: Path) -> Iterator[str]:
    """Put back what the data folder does not have; gives what it has, which is newer and stays."""
    folder = source / _BESIDE
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        target = settings.data / name
        if not path.is_file():
            continue
        if target.exists():
            if _hash(target) != _hash(path):
                yield name.as_posix()
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def _folder_of(settings: Settings) -> Path | None:
    """The storage's folder; None for an object store."""
    storage = open_storage(settings.storage)
    return storage.folder.resolve() if isinstance(storage, FolderStorage) else None


def _lies_in(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _begins_like_sqlite(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_SQLITE_HEAD)) == _SQLITE_HEAD


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
