"""The collector: what nothing names any more goes to the trash after a grace, and is deleted later.

It touches only what the inventory proves to be ours and the trash of our own id; nothing else in a folder or bucket is
even listed. It works while the storage holds our id and one of our last two sweep tokens: a database that is a copy of
another, or older than the storage, deletes nothing.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

from skyloom.core.errors import ConfigError
from skyloom.serve.queue.database import Database
from skyloom.serve.settings import Settings
from skyloom.serve.storage.assets import Asset, Found, Storage
from skyloom.serve.storage.installation import is_current, named_by, read_note, write_note
from skyloom.serve.storage.inventory import Identity, Inventory, Recorded

DAY = 86_400
SLACK_SECONDS = 3_600  # between an asset's record and its last byte, and between the clocks of database and storage
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sweep:
    """What a sweep did, or would do: files and bytes that went to the trash, that were deleted for good, and that came
    back from the trash because they are named again; and how many unnamed files still have their grace."""

    trashed: int = 0
    trashed_bytes: int = 0
    deleted: int = 0
    deleted_bytes: int = 0
    returned: int = 0
    waiting: int = 0


@dataclass(frozen=True)
class Unowned:
    """Files in the storage that the database neither names nor has recorded: never deleted by skyloom."""

    count: int
    bytes: int


def collect(
    database: Database,
    storage: Storage,
    settings: Settings,
    *,
    stopping: Callable[[], bool] = lambda: False,
    pause: float = 0.0,
) -> Sweep | None:
    """Sweep the storage once; None where another sweep has just begun, or begun less than `pause` seconds ago.

    Raises ConfigError where storage and database do not belong together, or the database is older or a copy.
    """
    inventory = Inventory(database)
    mine, held = _check(inventory, storage)
    mine = inventory.begin_sweep(mine, held, pause)
    if mine is None:
        return None
    write_note(storage, mine, replace=True)
    named = named_by(database, settings)
    inventory.compare(named)
    hand = _Hand(inventory, storage, mine)
    hand.bring_back(named)
    now = database.now()
    for one in inventory.unnamed(now - settings.collect_after_days * DAY):
        if stopping():
            break
        hand.trash(one)
    for one in inventory.trashed(now - settings.trash_days * DAY):
        if stopping():
            break
        hand.delete(one)
    storage.tidy()
    done = hand.done(waiting=len(inventory.unnamed(now)))
    log.info(
        "storage swept: %d files (%d bytes) to the trash, %d (%d bytes) deleted, %d returned, %d unnamed wait",
        *asdict(done).values(),
        extra=asdict(done),
    )
    return done


def preview(database: Database, storage: Storage, settings: Settings) -> tuple[Sweep, Unowned]:
    """What a sweep would do now, and what in the storage it would never touch. Changes nothing."""
    inventory = Inventory(database)
    mine, _ = _check(inventory, storage)
    named, now = named_by(database, settings), database.now()
    old = [
        one
        for one in inventory.unnamed(now - settings.collect_after_days * DAY)
        if not _in(one, named)
    ]
    gone = [
        one for one in inventory.trashed(now - settings.trash_days * DAY) if not _in(one, named)
    ]
    sizes = [_own(one, storage.find(one.asset.key)) for one in old]
    trashed = [found.size for found in sizes if found is not None]
    deleted = [
        found.size
        for one in gone
        if (found := storage.find(trash_key(mine.id, one.asset))) is not None
    ]
    returned = [
        asset for asset, _ in storage.assets(trash_prefix(mine.id)) if asset.reference in named
    ]
    waiting = len(inventory.names() - named) - len(old) - len(inventory.trashed(now))
    sweep = Sweep(
        len(trashed), sum(trashed), len(deleted), sum(deleted), len(returned), max(0, waiting)
    )
    return sweep, unowned(storage, named | inventory.names())


def unowned(storage: Storage, known: Iterable[str]) -> Unowned:
    """What lies in the storage in the form of an asset and is not among `known` references. Lists the whole storage."""
    names = set(known)
    sizes = [found.size for asset, found in storage.assets() if asset.reference not in names]
    return Unowned(len(sizes), sum(sizes))


def trash_prefix(id: str) -> str:
    """Where an installation's trash lies: no prefix that another installation would choose."""
    return f"trash/{id}/"


def trash_key(id: str, asset: Asset) -> str:
    """Where an asset lies while it is trashed."""
    return trash_prefix(id) + asset.key


def bring_back(database: Database, storage: Storage, named: set[str]) -> int:
    """Move what is named from the trash to its place; returns how many files."""
    inventory = Inventory(database)
    mine = inventory.identity()
    return 0 if mine is None else _Hand(inventory, storage, mine).bring_back(named)


class _Hand:
    """Moves and deletes, and counts what it does."""

    def __init__(self, inventory: Inventory, storage: Storage, mine: Identity) -> None:
        self._inventory, self._storage, self._id = inventory, storage, mine.id
        self._trashed: list[int] = []
        self._deleted: list[int] = []
        self._returned = 0

    def done(self, waiting: int) -> Sweep:
        """What was done."""
        trashed, deleted = self._trashed, self._deleted
        return Sweep(
            len(trashed), sum(trashed), len(deleted), sum(deleted), self._returned, waiting
        )

    def bring_back(self, named: set[str]) -> int:
        """What is named again lies in its place again."""
        for asset, _ in list(self._storage.assets(trash_prefix(self._id))):
            if asset.reference in named and self._storage.move(
                trash_key(self._id, asset), asset.key
            ):
                self._inventory.release(asset)
                self._returned += 1
        return self._returned

    def trash(self, one: Recorded) -> None:
        """Move an asset to the trash, unless somebody else has written it or it is stored again meanwhile."""
        found = self._storage.find(one.asset.key)
        if found is not None and _own(one, found) is None:
            self._inventory.forget(one)
        elif self._inventory.claim(one) and self._move(one.asset) and found is not None:
            self._trashed.append(found.size)

    def delete(self, one: Recorded) -> None:
        """Delete an asset from the trash."""
        found = self._storage.find(one.asset.key)  # a crash may have left it there
        if found is not None and (_own(one, found) is None or not self._move(one.asset)):
            self._inventory.forget(one)
            return
        if not self._inventory.is_claimed(one.asset):
            return
        key = trash_key(self._id, one.asset)
        if (trashed := self._storage.find(key)) is not None:
            self._storage.remove(key)
            self._deleted.append(trashed.size)
        self._inventory.forget(one)

    def _move(self, asset: Asset) -> bool:
        """To the trash, and back if it was stored again while that went on."""
        key = trash_key(self._id, asset)
        self._storage.move(asset.key, key)
        if self._inventory.is_claimed(asset):
            return True
        self._storage.move(key, asset.key)
        return False


def _check(inventory: Inventory, storage: Storage) -> tuple[Identity, str]:
    """The installation, and the sweep token that its storage holds. Raises ConfigError for another's storage."""
    mine, note = inventory.identity(), read_note(storage)
    if mine is None or note is None or note.id != mine.id:
        raise ConfigError(
            f"The storage says {note.id if note else 'no id'}, and the database {mine.id if mine else 'none'}.",
            hint="Check both URLs, and that the storage is mounted.",
        )
    if not is_current(mine, note):
        raise ConfigError(
            f"The storage of installation {mine.id} was swept by another copy of its database.",
            hint="After a database was put back by other means than skyloom restore, or copied, start once with"
            " `skyloom serve --adopt-storage`.",
        )
    return mine, note.sweep


def _own(one: Recorded, found: Found | None) -> Found | None:
    """What was found, unless it was written after the inventory's last record of it: then another has done that."""
    return None if found is None or found.modified > one.stored_at + SLACK_SECONDS else found


def _in(one: Recorded, named: set[str]) -> bool:
    return one.asset.reference in named
