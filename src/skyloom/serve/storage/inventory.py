"""The inventory: which assets this installation has stored, and since when nobody names them.

It is the proof that an asset is ours to delete. An asset is recorded before it appears in the storage; one that a newer
database has stored is not in the inventory of an older backup.
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
    assets,
    characters,
    files,
    installation,
    jobs,
    results,
)
from skyloom.serve.storage.assets import SCHEME, Asset

_ROWS = 500  # of one statement
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Identity:
    """An installation: its random id, the token of its last sweep, and the one that the storage held before.

    The storage holds one of the two, unless the database is a copy of another or was restored from an older backup.
    """

    id: str
    sweep: str
    sweep_before: str


@dataclass(frozen=True)
class Recorded:
    """A row of the inventory. Times are seconds since 1970 by the database's clock."""

    asset: Asset
    stored_at: float
    unnamed_since: float | None
    trashed_at: float | None


class Inventory:
    """The installation's identity and its assets, in its database."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def identity(self) -> Identity | None:
        """Whose the database is; None for one that was never opened with a storage."""
        with self.database.read() as connection:
            return _identity(connection)

    def identify(self, id: str | None = None, sweep: str | None = None) -> Identity:
        """Give a database without identity one, `id` or a random one; one that has its own keeps it."""
        with self.database.write() as write:
            return _identity(write.connection) or _replace(write, id or new_id(), sweep or _token())

    def identify_again(self, id: str, sweep: str) -> Identity:
        """Replace the identity."""
        with self.database.write() as write:
            return _replace(write, id, sweep)

    def begin_sweep(self, mine: Identity, held: str, pause: float = 0.0) -> Identity | None:
        """A new token for a sweep that begins, where the storage holds the token `held`. None where another sweep has
        begun since `mine` was read, or less than `pause` seconds ago."""
        with self.database.write() as write:
            last = write.connection.execute(select(installation.c.swept_at)).scalar_one()
            if write.now < last + pause or _identity(write.connection) != mine:
                return None
            values = {"sweep": _token(), "sweep_before": held, "swept_at": write.now}
            write.connection.execute(update(installation).values(**values))
            return _identity(write.connection)

    def in_use(self) -> bool:
        """Whether the database names anything or has recorded an asset."""
        with self.database.read() as connection:
            looks = [select(table).limit(1) for table in (jobs, files, characters, assets)]
            return any(connection.execute(look).first() is not None for look in looks)

    def newest_results(self, most: int) -> list[str]:
        """References of what was made last, by `most` jobs."""
        look = select(results.c.assets).order_by(results.c.job.desc()).limit(most)
        with self.database.read() as connection:
            return [one for made in connection.execute(look).scalars() for one in made.values()]

    def record(self, asset: Asset) -> None:
        """Write down that an asset is about to be stored; whoever was about to trash it will see that.

        While the database is away the asset is stored all the same, and is never collected.
        """

        try:
            with self.database.write() as write:
                again = {"stored_at": write.now, "unnamed_since": None, "trashed_at": None}
                change = update(assets).where(_is(asset)).values(**again)
                if not write.connection.execute(change).rowcount:
                    write.connection.execute(insert(assets).values(name=name_of(asset), **again))
        except SQLAlchemyError as error:
            log.warning(
                "an asset is stored but not recorded", extra={"cause": type(error).__name__}
            )

    def compare(self, named: Iterable[str]) -> None:
        """Note which recorded assets are not named any more, and which are again."""
        names = set(_names(named))
        with self.database.read() as connection:
            rows = connection.execute(select(assets.c.name, assets.c.unnamed_since)).all()
        lost = [row.name for row in rows if row.unnamed_since is None and row.name not in names]
        found = [row.name for row in rows if row.unnamed_since is not None and row.name in names]
        for some in _parts(lost):
            with self.database.write() as write:
                change = update(assets).where(
                    assets.c.name.in_(some), assets.c.unnamed_since.is_(None)
                )
                write.connection.execute(change.values(unnamed_since=write.now))
        for some in _parts(found):
            with self.database.write() as write:
                change = update(assets).where(assets.c.name.in_(some))
                write.connection.execute(change.values(unnamed_since=None, trashed_at=None))

    def names(self) -> set[str]:
        """References of every recorded asset."""
        with self.database.read() as connection:
            return {SCHEME + name for name in connection.execute(select(assets.c.name)).scalars()}

    def unnamed(self, before: float) -> list[Recorded]:
        """What nobody has named since before a time, and is not trashed."""
        return self._select(assets.c.unnamed_since <= before, assets.c.trashed_at.is_(None))

    def trashed(self, before: float) -> list[Recorded]:
        """What was trashed before a time, and is not named."""
        return self._select(assets.c.trashed_at <= before, assets.c.unnamed_since.is_not(None))

    def claim(self, one: Recorded) -> bool:
        """Note that an unnamed asset is trashed; False where it was stored or named again meanwhile."""
        mine = (
            _is(one.asset),
            assets.c.unnamed_since == one.unnamed_since,
            assets.c.trashed_at.is_(None),
        )
        with self.database.write() as write:
            change = update(assets).where(*mine).values(trashed_at=write.now)
            return bool(write.connection.execute(change).rowcount)

    def is_claimed(self, asset: Asset) -> bool:
        """Whether an asset is trashed, and was not stored again since."""
        return bool(self._select(_is(asset), assets.c.trashed_at.is_not(None)))

    def release(self, asset: Asset) -> None:
        """Note that an asset is named and back in its place."""
        with self.database.write() as write:
            change = update(assets).where(_is(asset)).values(unnamed_since=None, trashed_at=None)
            write.connection.execute(change)

    def forget(self, one: Recorded) -> None:
        """Drop a row, unless the asset was stored again meanwhile."""
        mine = (_is(one.asset), assets.c.stored_at == one.stored_at)
        with self.database.write() as write:
            write.connection.execute(delete(assets).where(*mine))

    def begin_again(self, named: Iterable[str]) -> None:
        """Have nothing in the inventory but what is named: for a database that is restored, adopted or older than its
        inventory. What else is in the storage may be in use elsewhere."""
        with self.database.write() as write:
            write.connection.execute(delete(assets))
            for some in _parts(sorted(set(_names(named)))):
                rows = [{"name": name, "stored_at": write.now} for name in some]
                write.connection.execute(insert(assets), rows)

    def _select(self, *wanted: ColumnElement[bool]) -> list[Recorded]:
        with self.database.read() as connection:
            rows = connection.execute(select(assets).where(*wanted).order_by(assets.c.name)).all()
        return [
            Recorded(
                Asset.parse(SCHEME + row.name), row.stored_at, row.unnamed_since, row.trashed_at
            )
            for row in rows
        ]


def new_id() -> str:
    """A random id of an installation."""
    return f"inst_{secrets.token_hex(16)}"


def name_of(asset: Asset) -> str:
    """How the inventory calls an asset: its reference without the scheme."""
    return asset.reference.removeprefix(SCHEME)


def _token() -> str:
    return secrets.token_hex(16)


def _is(asset: Asset) -> ColumnElement[bool]:
    return assets.c.name == name_of(asset)


def _names(references: Iterable[str]) -> Iterator[str]:
    """Names of references; a text of a client's that only begins like one is none."""
    for reference in references:
        try:
            yield name_of(Asset.parse(reference))
        except RequestError:
            continue


def _parts(names: Sequence[str]) -> Iterator[Sequence[str]]:
    return (names[at : at + _ROWS] for at in range(0, len(names), _ROWS))


def _identity(connection: Connection) -> Identity | None:
    row = connection.execute(
        select(installation.c.id, installation.c.sweep, installation.c.sweep_before)
    ).one_or_none()
    return None if row is None else Identity(*row)


def _replace(write: Write, id: str, sweep: str) -> Identity:
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
