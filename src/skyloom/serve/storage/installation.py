"""The installation: one database and one storage that belong together, and a process that keeps them to itself.

A random id stands in the database and, as an object, in the storage. Whoever works with both opens them here, so that
a mistyped URL, a lost database, a storage that is not mounted or a second installation is an error and not data loss.
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
from skyloom.serve.storage.assets import NOTE, Asset, Storage
from skyloom.serve.storage.folder import open_storage
from skyloom.serve.storage.inventory import Identity, Inventory, new_id

UMASK, FOLDER_MODE, FILE_MODE = 0o077, 0o700, 0o600
_OURS = (
    "skyloom.db*",
    "registry.sqlite*",
    "settings.toml",
)  # in the data folder, besides what has its own modes
_SAMPLE = 20  # newest jobs of which a storage must hold something to be theirs
_ADOPT = (
    "To make them one installation from now on, start once with `skyloom serve --adopt-storage`."
)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Note:
    """What a storage says of its installation."""

    id: str
    sweep: str


def protect(settings: Settings) -> None:
    """Keep everything that this process writes, and what lies in the data folder, from the machine's other users."""
    os.umask(UMASK)
    _narrow(settings.data, FOLDER_MODE)
    for pattern in _OURS:
        for path in settings.data.glob(pattern):
            _narrow(path, FILE_MODE)
    if (file := sqlite_file(settings.database)) is not None:
        for end in ("", "-wal", "-shm"):
            _narrow(file.with_name(file.name + end), FILE_MODE)


def exists(settings: Settings) -> bool:
    """Whether there is a database. Raises ConfigError where there is none and the storage says that there should be."""
    if not is_new(settings.database):
        return True
    storage = open_storage(settings.storage)
    _refuse_new(settings, storage, read_note(storage))
    return False


def open_database(settings: Settings, *, create: bool = True) -> Database:
    """The database alone, for what needs no storage.

    Raises ConfigError where there is none and `create` is off, or the storage says that there should be one.
    """
    protect(settings)
    if not exists(settings) and not create:
        hint = "Name its folder with --data, or its URL with --database."
        raise ConfigError(f"There is no database at {redacted_url(settings.database)}.", hint=hint)
    return Database(settings.database)


def open_installation(
    settings: Settings, *, adopt: bool = False, create: bool = True
) -> tuple[Database, Storage]:
    """The database and the storage, once they are known to belong together; the storage records what it is given.

    `adopt` gives both a new id whatever they had. Raises ConfigError for what does not belong together or is not there.
    """
    protect(settings)
    storage = open_storage(settings.storage)
    database = Database(settings.database) if adopt else open_database(settings, create=create)
    try:
        inventory = Inventory(database)
        if adopt:
            adopt_storage(inventory, storage, settings)
        else:
            check(inventory, storage, settings)
    except BaseException:
        database.close()
        raise
    storage.own(inventory.record)
    return database, storage


def check(inventory: Inventory, storage: Storage, settings: Settings) -> Identity:
    """Bring a new database and a new storage together, and two from before there were ids. Raises ConfigError for two
    that do not belong together."""
    mine, note = inventory.identity(), read_note(storage)
    if mine is None and note is not None:
        mine = inventory.identity()  # another process may have given both their id meanwhile
    if mine is None and not inventory.in_use():
        _refuse_new(settings, storage, note)
    elif mine is None and note is not None:
        if not holds_newest(inventory, storage):
            raise _mismatch(settings, "no id", note.id)
        mine = _take(inventory, settings, note)
    elif mine is None:
        if inventory.newest_results(1) and not holds_newest(inventory, storage):
            raise _not_there(settings, "no id yet")
        mine = _take(inventory, settings, None)
    elif note is None and (inventory.in_use() or next(storage.assets(), None) is not None):
        raise _not_there(settings, mine.id)
    mine = mine or inventory.identify()
    if note is None:
        write_note(storage, mine, replace=False)
        note = read_note(storage)
    if note is None or note.id != mine.id:
        raise _mismatch(settings, mine.id, "no id" if note is None else note.id)
    return mine


def is_current(mine: Identity, note: Note) -> bool:
    """Whether a storage was last swept by this very database, and no copy of it."""
    return mine.id == note.id and note.sweep in (mine.sweep, mine.sweep_before)


def adopt_storage(inventory: Inventory, storage: Storage, settings: Settings) -> Identity:
    """Make a database and a storage one installation, with a new id, unless they are one already.

    Any other that used either is refused from now on. What the database does not name stays where it is for ever.
    """
    before, note = inventory.identity(), None
    with suppress(ConfigError):  # a damaged note is replaced
        note = read_note(storage)
    if before is not None and note is not None and is_current(before, note):
        return before
    inventory.begin_again(named_by(inventory.database, settings))
    mine = inventory.identify_again(new_id(), os.urandom(16).hex())
    write_note(storage, mine, replace=True)
    log.warning("the storage is adopted by installation %s", mine.id)
    return mine


def check_pair(inventory: Inventory, storage: Storage, settings: Settings) -> None:
    """Raise ConfigError for a database and a storage that both have an id, and not the same. Changes nothing."""
    mine, note = inventory.identity(), read_note(storage)
    if mine is not None and note is not None and mine.id != note.id:
        raise _mismatch(settings, mine.id, note.id)


def examine_pair(settings: Settings) -> None:
    """Raise ConfigError for a database whose storage is another's or has lost its id. Changes nothing."""
    storage = open_storage(settings.storage)
    with closing(Database(settings.database)) as database:
        inventory = Inventory(database)
        check_pair(inventory, storage, settings)
        mine = inventory.identity()
        if mine is not None and inventory.in_use() and read_note(storage) is None:
            raise _not_there(settings, mine.id)


def prepare_restored(inventory: Inventory, storage: Storage, settings: Settings) -> set[str]:
    """Make a database that comes from a backup fit for its storage; gives the references that it names.

    It has no proof any more for what it does not name, so that nothing newer is collected. Raises ConfigError where the
    storage is another installation's.
    """
    check_pair(inventory, storage, settings)
    note, named = read_note(storage), named_by(inventory.database, settings)
    nameless = inventory.identity() is None and note is not None
    if nameless and inventory.newest_results(1) and not holds_newest(inventory, storage):
        raise _mismatch(settings, "no id", "" if note is None else note.id)
    inventory.begin_again(named)
    if note is not None:
        inventory.identify_again(note.id, note.sweep)
    return named


def named_by(database: Database, settings: Settings) -> set[str]:
    """References of all assets that a database names."""
    return JobStore(database, settings).referenced_assets() | set(Library(database).references())


def read_note(storage: Storage) -> Note | None:
    """What a storage says of its installation; None where it says nothing. Raises ConfigError for a damaged note."""
    content = storage.read_note()
    if content is None:
        return None
    try:
        told = json.loads(content)
        return Note(str(told["id"]), str(told["sweep"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{NOTE} in the storage is damaged.", hint=_ADOPT) from error


def write_note(storage: Storage, mine: Identity, *, replace: bool) -> None:
    """Say in a storage whose it is."""
    content = json.dumps({"id": mine.id, "sweep": mine.sweep}) + "\n"
    storage.write_note(content.encode(), replace=replace)


def place_of(settings: Settings) -> str:
    """The storage as people may see it: without keys that its URL may hold."""
    return (
        make_url(settings.storage).render_as_string()
        if "@" in settings.storage
        else settings.storage
    )


def _take(inventory: Inventory, settings: Settings, note: Note | None) -> Identity:
    """Give an id to a database from before there were any: what it names is its own."""
    inventory.begin_again(named_by(inventory.database, settings))
    mine = inventory.identify() if note is None else inventory.identify(note.id, note.sweep)
    log.warning("database and storage are installation %s from now on", mine.id)
    return mine


def holds_newest(inventory: Inventory, storage: Storage) -> bool:
    """Whether a storage holds anything of what a database's newest jobs have made."""
    for reference in inventory.newest_results(_SAMPLE):
        try:
            storage.size(Asset.parse(reference))
        except (MediaError, RequestError):
            continue
        return True
    return False


def _refuse_new(settings: Settings, storage: Storage, note: Note | None) -> None:
    """Raise ConfigError where a database is missing or empty and the storage is not."""
    if note is None and next(storage.assets(), None) is None:
        return
    raise ConfigError(
        f"The storage {place_of(settings)} {'holds files' if note is None else f'belongs to installation {note.id}'},"
        f" and the database {redacted_url(settings.database)} is missing or empty.",
        hint="Give the right database URL, restore a backup (skyloom restore), or name a new storage folder. "
        + _ADOPT,
    )


def _mismatch(settings: Settings, mine: str, other: str) -> ConfigError:
    return ConfigError(
        f"The database {redacted_url(settings.database)} belongs to installation {mine}, and the storage"
        f" {place_of(settings)} to {other}.",
        hint=f"Is the database's URL wrong, or does a second installation use this bucket or folder? {_ADOPT}",
    )


def _not_there(settings: Settings, mine: str) -> ConfigError:
    return ConfigError(
        f"The database {redacted_url(settings.database)} (installation {mine}) names files, and the storage"
        f" {place_of(settings)} has no installation id.",
        hint=f"Is it mounted, and its path or URL right? {_ADOPT}",
    )


def _narrow(path: Path, mode: int) -> None:
    """Take rights from others, where they have any. What is not ours is left as it is, and said."""
    try:
        told = path.stat()
        if stat.S_IMODE(told.st_mode) & UMASK == 0:
            return
        if told.st_uid != os.geteuid() or told.st_mode & stat.S_ISVTX:
            log.warning("other users of this machine can read %s", path)
            return
        path.chmod(stat.S_IMODE(told.st_mode) & mode)
    except FileNotFoundError:
        return
