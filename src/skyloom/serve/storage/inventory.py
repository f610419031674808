"""Inventory of the assets that this installation has stored, in its database.

Garbage collection deletes only what is in the inventory. An asset is recorded before it appears in
the storage, so an asset that a newer database has stored is missing from the inventory of an older
backup and stays.
"""

import logging
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, delete, insert, select, update
from sqlalchemy.exc import SQLAlchemyError

from skyloom.core.errors import RequestError
from skyloom.serve.queue.database import Database, Write
from skyloom.serve.queue.tables import (
    ASSET_SCHEME,
    assets,
    characters,
    files,
    installation,
    jobs,
    results,
)
from skyloom.serve.storage.assets import Asset

_ROWS_PER_STATEMENT = 500
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Identity:
    """Random id of an installation, token of its last collection and the token before.

    The storage holds one of the two tokens. Otherwise the database is a copy or was restored from
    an older backup.
    """

    id: str
    sweep: str
    sweep_before: str


@dataclass(frozen=True)
class InventoryRow:
    """A recorded asset. Times are seconds since 1970 by the database's clock."""

    asset: Asset
    stored_at: float
    unnamed_since: float | None
    trashed_at: float | None


class Inventory:
    """The installation's identity and its recorded assets."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def identity(self) -> Identity | None:
        """Read the identity; None for a database that was never opened together with a storage."""
        with self.database.read() as connection:
            return _read_identity(connection)

    def ensure_identity(self, id: str | None = None, sweep: str | None = None) -> Identity:
        """Set the identity, with a random id by default, unless there is one.

        Returns the current identity.
        """
        with self.database.write() as write:
            current = _read_identity(write.connection)
            return current or _write_identity(write, id or new_id(), sweep or _new_token())

    def replace_identity(self, id: str, sweep: str) -> Identity:
        """Replace the identity."""
        with self.database.write() as write:
            return _write_identity(write, id, sweep)

    def begin_collection(
        self, identity: Identity, storage_token: str, pause: float = 0.0
    ) -> Identity | None:
        """Set a new token for a garbage collection.

        `storage_token` is the token that the storage holds.

        Returns None if another collection began after `identity` was read or less than `pause`
        seconds ago.
        """
        with self.database.write() as write:
            last = write.connection.execute(select(installation.c.swept_at)).scalar_one()
            if write.now < last + pause or _read_identity(write.connection) != identity:
                return None
            values = {
                "sweep": _new_token(),
                "sweep_before": storage_token,
                "swept_at": write.now,
            }
            write.connection.execute(update(installation).values(**values))
            return _read_identity(write.connection)

    def in_use(self) -> bool:
        """Whether the database references or has recorded any asset."""
        with self.database.read() as connection:
            queries = [select(table).limit(1) for table in (jobs, files, characters, assets)]
            return any(connection.execute(query).first() is not None for query in queries)

    def newest_results(self, limit: int) -> list[str]:
        """References of the results of the newest `limit` jobs."""
        query = select(results.c.assets).order_by(results.c.job.desc()).limit(limit)
        with self.database.read() as connection:
            rows = connection.execute(query).scalars().all()
        return [reference for result in rows for reference in result.values()]

    def record(self, asset: Asset) -> None:
        """Record an asset that is about to be stored; cancels its move to the trash.

        When the database is unreachable the asset is stored without a record and is never
        collected.
        """

        try:
            with self.database.write() as write:
                values = {"stored_at": write.now, "unnamed_since": None, "trashed_at": None}
                change = update(assets).where(_is(asset)).values(**values)
                if not write.connection.execute(change).rowcount:
                    write.connection.execute(insert(assets).values(name=_name_of(asset), **values))
        except SQLAlchemyError as error:
            log.warning(
                "an asset is stored but not recorded", extra={"cause": type(error).__name__}
            )

    def update_references(self, references: Iterable[str]) -> None:
        """Note which recorded assets are no longer among `references`, and which are again."""
        names = set(_names(references))
        with self.database.read() as connection:
            rows = connection.execute(select(assets.c.name, assets.c.unnamed_since)).all()
        lost = [row.name for row in rows if row.unnamed_since is None and row.name not in names]
        found = [row.name for row in rows if row.unnamed_since is not None and row.name in names]
        for batch in _batches(lost):
            with self.database.write() as write:
                change = update(assets).where(
                    assets.c.name.in_(batch), assets.c.unnamed_since.is_(None)
                )
                write.connection.execute(change.values(unnamed_since=write.now))
        for batch in _batches(found):
            with self.database.write() as write:
                change = update(assets).where(assets.c.name.in_(batch))
                write.connection.execute(change.values(unnamed_since=None, trashed_at=None))

    def references(self) -> set[str]:
        """References of all recorded assets."""
        with self.database.read() as connection:
            return {
                ASSET_SCHEME + name for name in connection.execute(select(assets.c.name)).scalars()
            }

    def unreferenced(self, before: float) -> list[InventoryRow]:
        """Assets that have been unreferenced since before a time and are not in the trash."""
        return self._select(assets.c.unnamed_since <= before, assets.c.trashed_at.is_(None))

    def trashed(self, before: float) -> list[InventoryRow]:
        """Assets that were trashed before a time and are unreferenced."""
        return self._select(assets.c.trashed_at <= before, assets.c.unnamed_since.is_not(None))

    def mark_trashed(self, row: InventoryRow) -> bool:
        """Mark an asset as trashed.

        Returns False if it was stored or referenced again meanwhile.
        """
        unchanged = (
            _is(row.asset),
            assets.c.unnamed_since == row.unnamed_since,
            assets.c.trashed_at.is_(None),
        )
        with self.database.write() as write:
            change = update(assets).where(*unchanged).values(trashed_at=write.now)
            return bool(write.connection.execute(change).rowcount)

    def is_trashed(self, asset: Asset) -> bool:
        """Whether an asset is marked as trashed and was not stored again since."""
        return bool(self._select(_is(asset), assets.c.trashed_at.is_not(None)))

    def mark_returned(self, asset: Asset) -> None:
        """Mark an asset as referenced and back from the trash."""
        with self.database.write() as write:
            change = update(assets).where(_is(asset)).values(unnamed_since=None, trashed_at=None)
            write.connection.execute(change)

    def remove(self, row: InventoryRow) -> None:
        """Delete a row, unless the asset was stored again meanwhile."""
        unchanged = (_is(row.asset), assets.c.stored_at == row.stored_at)
        with self.database.write() as write:
            write.connection.execute(delete(assets).where(*unchanged))

    def reset(self, references: Iterable[str]) -> None:
        """Replace the inventory by the assets among `references`.

        For a database that is restored, adopted or older than the inventory: other files may belong
        to another one.
        """
        with self.database.write() as write:
            write.connection.execute(delete(assets))
            for batch in _batches(sorted(set(_names(references)))):
                rows = [{"name": name, "stored_at": write.now} for name in batch]
                write.connection.execute(insert(assets), rows)

    def _select(self, *conditions: ColumnElement[bool]) -> list[InventoryRow]:
        query = select(assets).where(*conditions).order_by(assets.c.name)
        with self.database.read() as connection:
            rows = connection.execute(query).all()
        return [
            InventoryRow(
                Asset.parse(ASSET_SCHEME + row.name),
                row.stored_at,
                row.unnamed_since,
                row.trashed_at,
            )
            for row in rows
        ]


def new_id() -> str:
    """Create a random installation id."""
    return f"inst_{secrets.token_hex(16)}"


def _name_of(asset: Asset) -> str:
    """Name of an asset in the table: its reference without the scheme."""
    return asset.reference.removeprefix(ASSET_SCHEME)


def _new_token() -> str:
    return secrets.token_hex(16)


def _is(asset: Asset) -> ColumnElement[bool]:
    return assets.c.name == _name_of(asset)


def _names(references: Iterable[str]) -> Iterator[str]:
    """Names of valid references; a client's text may only begin like a reference."""
    for reference in references:
        try:
            yield _name_of(Asset.parse(reference))
        except RequestError:
            continue


def _batches(names: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(names), _ROWS_PER_STATEMENT):
        yield names[start : start + _ROWS_PER_STATEMENT]


def _read_identity(connection: Connection) -> Identity | None:
    row = connection.execute(
        select(installation.c.id, installation.c.sweep, installation.c.sweep_before)
    ).one_or_none()
    return None if row is None else Identity(*row)


def _write_identity(write: Write, id: str, sweep: str) -> Identity:
    write.connection.execute(delete(installation))
    row = {
        "id": id,
        "sweep": sweep,
        "sweep_before": sweep,
        "swept_at": 0.0,
        "created_at": write.now,
    }
    write.connection.execute(insert(installation).values(**row))
    return Identity(id, sweep, sweep)
