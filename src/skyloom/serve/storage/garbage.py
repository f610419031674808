"""Garbage collection: unreferenced assets move to the trash after days and are deleted later.

It touches only assets of the inventory and the trash of its own installation. It requires that the
storage holds this installation's id and one of its last two tokens, so a database that is a copy or
older than the storage deletes nothing.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

from skyloom.core.errors import ConfigError
from skyloom.serve.queue.database import Database
from skyloom.serve.settings import Settings
from skyloom.serve.storage.assets import Asset, AssetStorage, StoredObject
from skyloom.serve.storage.installation import (
    is_current,
    read_marker,
    referenced_assets,
    write_marker,
)
from skyloom.serve.storage.inventory import Identity, Inventory, InventoryRow

DAY = 86_400
SLACK_SECONDS = 3_600  # from an asset's record to its last byte, plus clock differences
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CollectionReport:
    """Files and bytes of a collection, or of its preview.

    `trashed` moved to the trash, `deleted` left it for good, `returned` moved back because
    something references them again, and `waiting` are unreferenced for too short a time.
    """

    trashed: int = 0
    trashed_bytes: int = 0
    deleted: int = 0
    deleted_bytes: int = 0
    returned: int = 0
    waiting: int = 0


@dataclass(frozen=True)
class UntrackedFiles:
    """Assets that the database neither references nor has recorded; never deleted."""

    count: int
    bytes: int


def collect(
    database: Database,
    storage: AssetStorage,
    settings: Settings,
    *,
    stopping: Callable[[], bool] = lambda: False,
    pause: float = 0.0,
) -> CollectionReport | None:
    """Collect once.

    Returns None if another collection began at the same time or less than `pause` seconds ago.

    Raises ConfigError if storage and database do not belong together, or the database is older or a
    copy.
    """
    inventory = Inventory(database)
    identity, token = _check(inventory, storage)
    identity = inventory.begin_collection(identity, token, pause)
    if identity is None:
        return None
    write_marker(storage, identity, replace=True)
    references = referenced_assets(database, settings)
    inventory.update_references(references)
    collector = _Collector(inventory, storage, identity)
    collector.return_referenced(references)
    now = database.now()
    for row in inventory.unreferenced(now - settings.collect_after_days * DAY):
        if stopping():
            break
        collector.trash(row)
    for row in inventory.trashed(now - settings.trash_days * DAY):
        if stopping():
            break
        collector.delete(row)
    storage.remove_partial()
    report = collector.report(waiting=len(inventory.unreferenced(now)))
    log.info(
        "garbage collection: %d files (%d bytes) to the trash, %d (%d bytes) deleted, %d returned,"
        " %d unreferenced wait",
        *asdict(report).values(),
        extra=asdict(report),
    )
    return report


def preview(
    database: Database, storage: AssetStorage, settings: Settings
) -> tuple[CollectionReport, UntrackedFiles]:
    """Compute what a collection would do now, and count what it would never touch."""
    inventory = Inventory(database)
    identity, _ = _check(inventory, storage)
    references = referenced_assets(database, settings)
    now = database.now()

    def unreferenced(rows: list[InventoryRow]) -> list[InventoryRow]:
        return [row for row in rows if row.asset.reference not in references]

    old = unreferenced(inventory.unreferenced(now - settings.collect_after_days * DAY))
    trash = unreferenced(inventory.trashed(now - settings.trash_days * DAY))
    to_trash = [_if_unchanged(row, storage.find(row.asset.key)) for row in old]
    to_delete = [storage.find(trash_key(identity.id, row.asset)) for row in trash]
    trash_sizes = [stored.size for stored in to_trash if stored is not None]
    delete_sizes = [stored.size for stored in to_delete if stored is not None]
    in_trash = [asset for asset, _ in storage.assets(trash_prefix(identity.id))]
    waiting = len(inventory.references() - references) - len(old) - len(inventory.trashed(now))
    report = CollectionReport(
        trashed=len(trash_sizes),
        trashed_bytes=sum(trash_sizes),
        deleted=len(delete_sizes),
        deleted_bytes=sum(delete_sizes),
        returned=sum(asset.reference in references for asset in in_trash),
        waiting=max(0, waiting),
    )
    return report, find_untracked(storage, references | inventory.references())


def find_untracked(storage: AssetStorage, known: Iterable[str]) -> UntrackedFiles:
    """Count the assets of a storage that are not among `known` references.

    Lists the whole storage.
    """
    references = set(known)
    sizes = [stored.size for asset, stored in storage.assets() if asset.reference not in references]
    return UntrackedFiles(len(sizes), sum(sizes))


def trash_prefix(id: str) -> str:
    """Prefix of an installation's trash."""
    return f"trash/{id}/"


def trash_key(id: str, asset: Asset) -> str:
    """Key of an asset in an installation's trash."""
    return trash_prefix(id) + asset.key


def return_from_trash(database: Database, storage: AssetStorage, references: set[str]) -> int:
    """Move referenced assets from the trash to their keys. Returns their number."""
    inventory = Inventory(database)
    identity = inventory.identity()
    if identity is None:
        return 0
    return _Collector(inventory, storage, identity).return_referenced(references)


class _Collector:
    """Moves and deletes assets of one installation and counts them."""

    def __init__(self, inventory: Inventory, storage: AssetStorage, identity: Identity) -> None:
        self._inventory = inventory
        self._storage = storage
        self._id = identity.id
        self._trashed_sizes: list[int] = []
        self._deleted_sizes: list[int] = []
        self._returned = 0

    def report(self, waiting: int) -> CollectionReport:
        """Summarize what was done."""
        return CollectionReport(
            trashed=len(self._trashed_sizes),
            trashed_bytes=sum(self._trashed_sizes),
            deleted=len(self._deleted_sizes),
            deleted_bytes=sum(self._deleted_sizes),
            returned=self._returned,
            waiting=waiting,
        )

    def return_referenced(self, references: set[str]) -> int:
        """Move referenced assets from the trash to their keys."""
        for asset, _ in list(self._storage.assets(trash_prefix(self._id))):
            key = trash_key(self._id, asset)
            if asset.reference in references and self._storage.move(key, asset.key):
                self._inventory.mark_returned(asset)
                self._returned += 1
        return self._returned

    def trash(self, row: InventoryRow) -> None:
        """Move an asset to the trash, unless it was stored again or by somebody else."""
        stored = self._storage.find(row.asset.key)
        if stored is not None and _if_unchanged(row, stored) is None:
            self._inventory.remove(row)
            return
        if self._inventory.mark_trashed(row) and self._move_to_trash(row.asset) and stored:
            self._trashed_sizes.append(stored.size)

    def delete(self, row: InventoryRow) -> None:
        """Delete an asset from the trash."""
        stored = self._storage.find(row.asset.key)  # there after a crash between mark and move
        if stored is not None and (
            _if_unchanged(row, stored) is None or not self._move_to_trash(row.asset)
        ):
            self._inventory.remove(row)
            return
        if not self._inventory.is_trashed(row.asset):
            return
        key = trash_key(self._id, row.asset)
        trashed = self._storage.find(key)
        if trashed is not None:
            self._storage.remove(key)
            self._deleted_sizes.append(trashed.size)
        self._inventory.remove(row)

    def _move_to_trash(self, asset: Asset) -> bool:
        """Move an asset to the trash, and back if it was stored again meanwhile."""
        key = trash_key(self._id, asset)
        self._storage.move(asset.key, key)
        if self._inventory.is_trashed(asset):
            return True
        self._storage.move(key, asset.key)
        return False


def _check(inventory: Inventory, storage: AssetStorage) -> tuple[Identity, str]:
    """Check that database and storage belong together.

    Returns the identity and the storage's token.
    """
    identity = inventory.identity()
    marker = read_marker(storage)
    if identity is None or marker is None or marker.id != identity.id:
        raise ConfigError(
            f"The storage belongs to {marker.id if marker else 'no installation'},"
            f" and the database to {identity.id if identity else 'no installation'}.",
            hint="Check both URLs, and that the storage is mounted.",
        )
    if not is_current(identity, marker):
        raise ConfigError(
            f"Another copy of the database of installation {identity.id} has collected garbage in"
            " the storage.",
            hint="If the database was copied, or restored without `skyloom restore`, start once"
            " with `skyloom serve --adopt-storage`.",
        )
    return identity, marker.sweep


def _if_unchanged(row: InventoryRow, stored: StoredObject | None) -> StoredObject | None:
    """The object, or None if somebody else wrote it after its record."""
    if stored is None or stored.modified > row.stored_at + SLACK_SECONDS:
        return None
    return stored
