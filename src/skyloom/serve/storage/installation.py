"""Installation: one database and one storage that belong together, readable by their own user only.

Both hold the same random id, the storage in a marker object. Whoever uses both opens them here, so
that a mistyped URL, a lost database, an unmounted storage or a second installation is an error and
no data is lost.
"""

import json
import logging
import os
import stat
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.engine import make_url

from skyloom.core.errors import ConfigError, MediaError, RequestError
from skyloom.serve.queue.database import Database, is_new, redacted_url, sqlite_file
from skyloom.serve.queue.jobs import JobStore
from skyloom.serve.queue.library import Library
from skyloom.serve.settings import Settings
from skyloom.serve.storage import open_storage
from skyloom.serve.storage.assets import MARKER_NAME, Asset, AssetStorage
from skyloom.serve.storage.inventory import Identity, Inventory, new_id

UMASK = 0o077
FOLDER_MODE = 0o700
FILE_MODE = 0o600
# files of the data folder that are made private; subfolders have their own modes
_PRIVATE_FILES = ("skyloom.db*", "registry.sqlite*", "settings.toml")
_SAMPLED_JOBS = 20  # newest jobs; a storage that holds a result of one belongs to the database
_ADOPT_HINT = (
    "To make them one installation from now on, start once with `skyloom serve --adopt-storage`."
)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InstallationMarker:
    """Content of a storage's marker: installation id and token of the last garbage collection."""

    id: str
    sweep: str


def restrict_permissions(settings: Settings) -> None:
    """Make the data folder, its files and all that this process writes private to the user."""
    os.umask(UMASK)
    _restrict(settings.data, FOLDER_MODE)
    for pattern in _PRIVATE_FILES:
        for path in settings.data.glob(pattern):
            _restrict(path, FILE_MODE)
    if (file := sqlite_file(settings.database)) is not None:
        for suffix in ("", "-wal", "-shm"):
            _restrict(file.with_name(file.name + suffix), FILE_MODE)


def database_exists(settings: Settings) -> bool:
    """Whether there is a database.

    Raises ConfigError if there is none but the storage belongs to one.
    """
    if not is_new(settings.database):
        return True
    storage = open_storage(settings.storage)
    _refuse_new_database(settings, storage, read_marker(storage))
    return False


def open_database(settings: Settings, *, create: bool = True) -> Database:
    """Open the database alone.

    Raises ConfigError if there is none and `create` is false, or if the storage belongs to another
    one.
    """
    restrict_permissions(settings)
    if not database_exists(settings) and not create:
        raise ConfigError(
            f"There is no database at {redacted_url(settings.database)}.",
            hint="Name its folder with --data, or its URL with --database.",
        )
    return Database(settings.database)


def open_installation(
    settings: Settings, *, adopt: bool = False, create: bool = True
) -> tuple[Database, AssetStorage]:
    """Open a database and its storage, which records what it stores.

    `adopt` makes them one installation whatever they were before. Raises ConfigError if they do not
    belong together or one is missing.
    """
    restrict_permissions(settings)
    storage = open_storage(settings.storage)
    database = Database(settings.database) if adopt else open_database(settings, create=create)
    try:
        inventory = Inventory(database)
        if adopt:
            adopt_storage(inventory, storage, settings)
        else:
            check_installation(inventory, storage, settings)
    except BaseException:
        database.close()
        raise
    storage.set_recorder(inventory.record)
    return database, storage


def check_installation(inventory: Inventory, storage: AssetStorage, settings: Settings) -> Identity:
    """Check that database and storage belong together.

    New ones, and those of a version without ids, get a common id.

    Raises ConfigError if they do not belong together.
    """
    identity = inventory.identity()
    marker = read_marker(storage)
    if identity is None and marker is not None:
        identity = inventory.identity()  # another process may have written both meanwhile
    if identity is None and not inventory.in_use():
        _refuse_new_database(settings, storage, marker)
    elif identity is None and marker is not None:
        if not holds_newest_results(inventory, storage):
            raise _mismatch_error(settings, "no id", marker.id)
        identity = _identify_old_database(inventory, settings, marker)
    elif identity is None:
        if inventory.newest_results(1) and not holds_newest_results(inventory, storage):
            raise _missing_marker_error(settings, "no id yet")
        identity = _identify_old_database(inventory, settings, None)
    elif marker is None and (inventory.in_use() or next(storage.assets(), None) is not None):
        raise _missing_marker_error(settings, identity.id)
    identity = identity or inventory.ensure_identity()
    if marker is None:
        write_marker(storage, identity, replace=False)
        marker = read_marker(storage)
    if marker is None or marker.id != identity.id:
        raise _mismatch_error(settings, identity.id, "no id" if marker is None else marker.id)
    return identity


def is_current(identity: Identity, marker: InstallationMarker) -> bool:
    """Whether this very database, and no copy of it, last collected garbage in the storage."""
    tokens = (identity.sweep, identity.sweep_before)
    return identity.id == marker.id and marker.sweep in tokens


def adopt_storage(inventory: Inventory, storage: AssetStorage, settings: Settings) -> Identity:
    """Make a database and a storage one installation with a new id, unless they are one already.

    Any other database or storage of either is refused from now on. Unreferenced files stay in the
    storage for good.
    """
    identity = inventory.identity()
    marker = None
    with suppress(ConfigError):  # a damaged marker is replaced
        marker = read_marker(storage)
    if identity is not None and marker is not None and is_current(identity, marker):
        return identity
    inventory.reset(referenced_assets(inventory.database, settings))
    identity = inventory.replace_identity(new_id(), os.urandom(16).hex())
    write_marker(storage, identity, replace=True)
    log.warning("the storage is adopted by installation %s", identity.id)
    return identity


def check_ids(inventory: Inventory, storage: AssetStorage, settings: Settings) -> None:
    """Raise ConfigError if database and storage have different ids. Changes nothing."""
    identity = inventory.identity()
    marker = read_marker(storage)
    if identity is not None and marker is not None and identity.id != marker.id:
        raise _mismatch_error(settings, identity.id, marker.id)


def examine_installation(settings: Settings) -> None:
    """Raise ConfigError if the storage belongs to another database or has lost its marker.

    Changes nothing.
    """
    storage = open_storage(settings.storage)
    with closing(Database(settings.database)) as database:
        inventory = Inventory(database)
        check_ids(inventory, storage, settings)
        identity = inventory.identity()
        if identity is not None and inventory.in_use() and read_marker(storage) is None:
            raise _missing_marker_error(settings, identity.id)


def prepare_restored(inventory: Inventory, storage: AssetStorage, settings: Settings) -> set[str]:
    """Prepare a database from a backup for its storage. Returns the references of the database.

    The inventory is reduced to them, so nothing newer is collected. Raises ConfigError if the
    storage belongs to another installation.
    """
    check_ids(inventory, storage, settings)
    marker = read_marker(storage)
    references = referenced_assets(inventory.database, settings)
    if (
        marker is not None
        and inventory.identity() is None
        and inventory.newest_results(1)
        and not holds_newest_results(inventory, storage)
    ):
        raise _mismatch_error(settings, "no id", marker.id)
    inventory.reset(references)
    if marker is not None:
        inventory.replace_identity(marker.id, marker.sweep)
    return references


def referenced_assets(database: Database, settings: Settings) -> set[str]:
    """References of all assets that jobs, files and characters of a database use."""
    return JobStore(database, settings).referenced_assets() | set(Library(database).references())


def read_marker(storage: AssetStorage) -> InstallationMarker | None:
    """Read a storage's marker; None if there is none. Raises ConfigError if it is damaged."""
    content = storage.read_marker()
    if content is None:
        return None
    try:
        values = json.loads(content)
        return InstallationMarker(str(values["id"]), str(values["sweep"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{MARKER_NAME} in the storage is damaged.", hint=_ADOPT_HINT) from error


def write_marker(storage: AssetStorage, identity: Identity, *, replace: bool) -> None:
    """Write the marker of an installation into its storage."""
    content = json.dumps({"id": identity.id, "sweep": identity.sweep}) + "\n"
    storage.write_marker(content.encode(), replace=replace)


def storage_name(settings: Settings) -> str:
    """Location of the storage without secrets of its URL."""
    if "@" not in settings.storage:
        return settings.storage
    return make_url(settings.storage).render_as_string()


def holds_newest_results(inventory: Inventory, storage: AssetStorage) -> bool:
    """Whether a storage holds a result of one of the database's newest jobs."""
    for reference in inventory.newest_results(_SAMPLED_JOBS):
        try:
            storage.size(Asset.parse(reference))
        except (MediaError, RequestError):
            continue
        return True
    return False


def _identify_old_database(
    inventory: Inventory, settings: Settings, marker: InstallationMarker | None
) -> Identity:
    """Give an id to a database of a version without ids; record what it references."""
    inventory.reset(referenced_assets(inventory.database, settings))
    if marker is None:
        identity = inventory.ensure_identity()
    else:
        identity = inventory.ensure_identity(marker.id, marker.sweep)
    log.warning("database and storage are installation %s from now on", identity.id)
    return identity


def _refuse_new_database(
    settings: Settings, storage: AssetStorage, marker: InstallationMarker | None
) -> None:
    """Raise ConfigError if the database is missing or empty and the storage is not."""
    if marker is None and next(storage.assets(), None) is None:
        return
    state = "holds files" if marker is None else f"belongs to installation {marker.id}"
    raise ConfigError(
        f"The storage {storage_name(settings)} {state}, and the database"
        f" {redacted_url(settings.database)} is missing or empty.",
        hint="Correct the database URL, restore a backup (skyloom restore), or name a new storage"
        f" folder. {_ADOPT_HINT}",
    )


def _mismatch_error(settings: Settings, database_id: str, storage_id: str) -> ConfigError:
    return ConfigError(
        f"The database {redacted_url(settings.database)} belongs to installation {database_id},"
        f" and the storage {storage_name(settings)} to {storage_id}.",
        hint="Check the database URL, and that no second installation uses this bucket or folder."
        f" {_ADOPT_HINT}",
    )


def _missing_marker_error(settings: Settings, database_id: str) -> ConfigError:
    return ConfigError(
        f"The database {redacted_url(settings.database)} (installation {database_id}) references"
        f" files, and the storage {storage_name(settings)} has no installation id.",
        hint=f"Check that it is mounted, and its path or URL. {_ADOPT_HINT}",
    )


def _restrict(path: Path, mode: int) -> None:
    """Remove other users' permissions.

    Files of others and shared folders stay as they are, with a warning.
    """
    try:
        status = path.stat()
        if stat.S_IMODE(status.st_mode) & UMASK == 0:
            return
        if status.st_uid != os.geteuid() or status.st_mode & stat.S_ISVTX:
            log.warning("other users of this machine can read %s", path)
            return
        path.chmod(stat.S_IMODE(status.st_mode) & mode)
    except FileNotFoundError:
        return
