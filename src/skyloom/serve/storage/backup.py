"""Backup and restore of an installation: database, referenced assets, rest of the data folder.

    manifest.json              installation, time, version; size and SHA-256 of every other file
    database.sqlite or .dump   SQLite's VACUUM INTO, or pg_dump's custom format
    assets/ab/<sha256>.<kind>  as in a storage
    beside/...                 rest of the data folder: signing keys, registry, settings.toml

The database is copied first and defines which assets are copied; garbage collection leaves them for
days. A restore adds and never deletes: newer assets stay, and so do existing files of the data
folder. One file with the database alone can be restored too: a copy by `skyloom backup NAME.db`, or
the copy from before a migration.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sqlalchemy.engine import make_url

from skyloom import __version__
from skyloom.core.errors import ConfigError, MediaError, RequestError
from skyloom.serve.queue.database import Database, choose_sqlite, is_new, sqlite_file
from skyloom.serve.settings import Settings
from skyloom.serve.storage import FolderStorage, open_storage
from skyloom.serve.storage.assets import Asset, AssetStorage
from skyloom.serve.storage.garbage import return_from_trash
from skyloom.serve.storage.installation import (
    check_ids,
    holds_newest_results,
    open_database,
    prepare_restored,
    read_marker,
    referenced_assets,
    restrict_permissions,
    write_marker,
)
from skyloom.serve.storage.inventory import Inventory
from skyloom.serve.storage.sqlite_files import (
    DAMAGED_HINT,
    WAL_SUFFIXES,
    has_sqlite_header,
    replace_sqlite,
)

MANIFEST = "manifest.json"
FORMAT = 1
_SQLITE = "database.sqlite"
_DUMP = "database.dump"
_ASSETS = "assets/"
_BESIDE = "beside/"
_MEMBER_NAME = re.compile(r"database\.(sqlite|dump)|(assets|beside)/[^\0]+")
_EXCLUDED = re.compile(r"\..*|runs|skyloom\.db.*|cluster\.(json|log)")  # in the data folder


@dataclass(frozen=True)
class BackupReport:
    """Files and bytes of a backup; references to assets that the storage has lost."""

    files: int
    bytes: int
    missing: tuple[str, ...]


@dataclass(frozen=True)
class RestoreReport:
    """Outcome of a restore.

    `replaced`: path of the previous database. `put_back`: number of assets added to the storage.
    `kept`: files of the data folder that differ from the backup and stay. `unnamed`: keys of assets
    that the database does not reference.
    """

    replaced: Path | None
    put_back: int = 0
    kept: tuple[str, ...] = ()
    unnamed: tuple[str, ...] = ()


def create_backup(settings: Settings, target: Path) -> BackupReport:
    """Write a backup into a new folder, atomically.

    Raises ConfigError if there is no database or the storage belongs to another installation.
    """
    if target.exists():
        raise ConfigError(f"{target} already exists.", hint="Name a new folder.")
    if not target.absolute().parent.is_dir():
        raise ConfigError(
            f"The folder {target.parent} does not exist.", hint="Create it, or name another."
        )
    storage = open_storage(settings.storage)
    with closing(open_database(settings, create=False)) as database:
        inventory = Inventory(database)
        check_ids(inventory, storage, settings)
        partial = Path(tempfile.mkdtemp(dir=target.absolute().parent, prefix=f".{target.name}-"))
        try:
            references = _copy_database(database, settings, partial)
            missing = _copy_assets(storage, references, partial)
            _copy_data_folder(settings, target, partial)
            identity = inventory.identity()
            written = _write_manifest(partial, None if identity is None else identity.id)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return BackupReport(len(written), sum(one["size"] for one in written.values()), tuple(missing))


def restore_backup(settings: Settings, source: Path) -> RestoreReport:
    """Restore a backup folder, or one file with the database alone.

    Checks all of it before the first change.

    Raises ConfigError for a backup that is damaged or of another installation, and while the
    database is in use.
    """
    restrict_permissions(settings)
    storage = open_storage(settings.storage)
    references = set[str]()
    put_back = 0
    kept: tuple[str, ...] = ()

    def prepare(database: Database) -> None:
        references.update(prepare_restored(Inventory(database), storage, settings))

    if source.is_dir():
        _check_installation_id(storage, read_manifest(source))
        _check_kind(settings, source)
        put_back = _put_back_assets(storage, source)
        replaced = _put_back_database(settings, source, prepare)
        kept = tuple(_put_back_data_folder(settings, source))
    else:
        replaced = replace_sqlite(settings.database, source, prepare)
    with closing(Database(settings.database)) as database:
        _restore_marker(Inventory(database), storage)
        return_from_trash(database, storage, references)
    unnamed = sorted(
        asset.key for asset, _ in storage.assets() if asset.reference not in references
    )
    return RestoreReport(replaced, put_back, kept, tuple(unnamed))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a backup's manifest and verify every file of it. Raises ConfigError."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {
            str(name): (int(one["size"]), str(one["sha256"]))
            for name, one in manifest["files"].items()
        }
        version = int(manifest["format"])
    except FileNotFoundError as error:
        raise ConfigError(
            f"{folder} is not a backup of skyloom.", hint="Name a folder that skyloom backup wrote."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{folder / MANIFEST} is damaged.", hint=DAMAGED_HINT) from error
    if version > FORMAT:
        raise ConfigError(
            f"The backup has format {version}, and this skyloom knows formats up to {FORMAT}.",
            hint="Use a newer skyloom.",
        )
    for name, (size, digest) in files.items():
        path = folder / name
        inside = path.resolve().is_relative_to(folder.resolve())
        if not _MEMBER_NAME.fullmatch(name) or ".." in PurePosixPath(name).parts or not inside:
            raise ConfigError(
                f"A file name in the backup is invalid: {name!r:.80}.", hint=DAMAGED_HINT
            )
        if not path.is_file() or path.stat().st_size != size or _sha256(path) != digest:
            raise ConfigError(f"{path} is damaged.", hint=DAMAGED_HINT)
    if not {_SQLITE, _DUMP} & files.keys():
        raise ConfigError(f"{folder} holds no database.", hint=DAMAGED_HINT)
    return manifest


def _copy_database(database: Database, settings: Settings, folder: Path) -> set[str]:
    """Copy the database. Returns the references of the copy."""
    if not database.postgres:
        database.backup(folder / _SQLITE)
        with closing(Database(f"sqlite:///{folder / _SQLITE}")) as copy:
            return referenced_assets(copy, settings)
    before = referenced_assets(database, settings)
    url = make_url(settings.database).set(drivername="postgresql")
    password = {"PGPASSWORD": url.password} if url.password else {}
    public_url = url.set(password=None).render_as_string()  # other users can read arguments
    command = ["pg_dump", "--format=custom", f"--file={folder / _DUMP}", f"--dbname={public_url}"]
    try:
        subprocess.run(
            command, env={**os.environ, **password}, check=True, capture_output=True, text=True
        )
    except FileNotFoundError as error:
        raise ConfigError(
            "pg_dump is not installed.", hint="Install Postgres' client programs."
        ) from error
    except subprocess.CalledProcessError as error:
        raise ConfigError(
            f"pg_dump failed: {error.stderr.strip():.300}",
            hint="Use the pg_dump of the server's version.",
        ) from error
    return before | referenced_assets(database, settings)


def _copy_assets(storage: AssetStorage, references: set[str], folder: Path) -> list[str]:
    """Copy assets. Returns the references of those that the storage has lost."""
    missing: list[str] = []
    for reference in sorted(references):
        try:
            asset = Asset.parse(reference)
        except RequestError:
            continue  # a client's text that begins like a reference
        path = folder / _ASSETS / asset.key
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            storage.fetch(asset, path)
        except MediaError:
            missing.append(reference)
    return missing


def _copy_data_folder(settings: Settings, target: Path, folder: Path) -> None:
    """Copy the rest of the data folder, without storage, work in progress and other backups."""
    data = settings.data.resolve()
    skipped = {target.resolve(), folder.resolve()}
    storage = open_storage(settings.storage)
    if isinstance(storage, FolderStorage):
        skipped.add(storage.folder.resolve())
    if (file := sqlite_file(settings.database)) is not None:
        skipped |= {file.with_name(file.name + suffix) for suffix in ("", *WAL_SUFFIXES)}
    for path in _files_beside(data, skipped):
        copy = folder / _BESIDE / path.relative_to(data)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if has_sqlite_header(path):
            with closing(choose_sqlite().connect(str(path), timeout=30)) as connection:
                connection.execute("VACUUM INTO ?", (str(copy),))
        else:
            shutil.copyfile(path, copy)


def _files_beside(folder: Path, skipped: set[Path]) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path in skipped or path.is_symlink() or path.name.endswith(("-wal", "-shm", "-journal")):
            continue
        if path.parent == folder and _EXCLUDED.fullmatch(path.name):
            continue
        if path.is_dir() and not (path / MANIFEST).exists():
            yield from _files_beside(path, skipped)
        elif path.is_file():
            yield path


def _write_manifest(folder: Path, installation: str | None) -> dict[str, dict[str, Any]]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in paths
    }
    manifest = {
        "format": FORMAT,
        "skyloom": __version__,
        "made_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "installation": installation,
        "files": files,
    }
    with (folder / MANIFEST).open("x", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    return files


def _check_installation_id(storage: AssetStorage, manifest: dict[str, Any]) -> None:
    marker = read_marker(storage)
    if marker is not None and manifest["installation"] not in (None, marker.id):
        raise ConfigError(
            f"The backup belongs to installation {manifest['installation']}, and the storage to"
            f" {marker.id}.",
            hint="Name that installation's storage, or a new folder.",
        )


def _check_kind(settings: Settings, source: Path) -> None:
    """Raise ConfigError for the other kind of database, or an empty Postgres."""
    postgres = sqlite_file(settings.database) is None
    if postgres != (source / _DUMP).exists():
        kind = "SQLite" if postgres else "Postgres"
        raise ConfigError(
            f"The backup is of {kind}, and the database is not.",
            hint="Name another with --database.",
        )
    if postgres and is_new(settings.database):
        raise ConfigError(
            "The database is empty.",
            hint=f"Run pg_restore --no-owner --dbname=URL {source / _DUMP} first, then this again.",
        )


def _put_back_assets(storage: AssetStorage, source: Path) -> int:
    """Store the assets that the storage lacks. Returns their number."""
    count = 0
    for asset, _ in FolderStorage(source / _ASSETS).assets():
        if storage.find(asset.key) is None:
            storage.put(source / _ASSETS / asset.key, asset.suffix)
            count += 1
    return count


def _put_back_database(
    settings: Settings, source: Path, prepare: Callable[[Database], None]
) -> Path | None:
    """Replace an SQLite database, or prepare a Postgres database that pg_restore has filled."""
    if (source / _SQLITE).exists():
        return replace_sqlite(settings.database, source / _SQLITE, prepare)
    with closing(Database(settings.database)) as database:
        prepare(database)
    return None


def _put_back_data_folder(settings: Settings, source: Path) -> Iterator[str]:
    """Copy the files that the data folder lacks. Yields the names of files that differ and stay."""
    folder = source / _BESIDE
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        target = settings.data / name
        if not path.is_file():
            continue
        if target.exists():
            if _sha256(target) != _sha256(path):
                yield name.as_posix()
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def _restore_marker(inventory: Inventory, storage: AssetStorage) -> None:
    """Write the marker into a storage that has none and holds results of the database."""
    identity = inventory.identity()
    if identity is None:
        return
    if not inventory.newest_results(1) or holds_newest_results(inventory, storage):
        write_marker(storage, identity, replace=False)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
