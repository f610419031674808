"""What clients bring: files to start from, and characters. Every look is an owner's own."""

import secrets
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    Row,
    String,
    Table,
    Text,
    delete,
    insert,
    select,
)

from skyloom.serve.api.errors import missing
from skyloom.serve.queue.database import Database, read_page
from skyloom.serve.queue.quotas import Quotas
from skyloom.serve.queue.tables import metadata

_REFERENCE_ROWS = 1_000  # read at a time
PURPOSES = ("vision", "user_data", "batch", "batch_output")

files = Table(
    "files",
    metadata,
    Column(
        "number", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True
    ),
    Column("id", String(64), nullable=False, unique=True),
    Column("owner", String(128), nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("name", Text, nullable=False),
    Column("asset", Text, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("created_at", Double, nullable=False, index=True),
    Index("files_of_owner", "owner", "number"),
    Index("files_of_purpose", "owner", "purpose", "number"),
    sqlite_autoincrement=True,
)

characters = Table(
    "characters",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("owner", String(128), nullable=False),
    Column("name", Text, nullable=False),
    Column("asset", Text, nullable=False),
    Column("created_at", Double, nullable=False),
)


likenesses = (
    Table(  # what is known of a character; those that were made before it was asked have none
        "likenesses",
        metadata,
        Column(
            "character",
            String(64),
            ForeignKey("characters.id", ondelete="CASCADE"),
            primary_key=True,
        ),
        Column("likeness", JSON, nullable=False),
        Column("consent", JSON(none_as_null=True)),
    )
)


@dataclass(frozen=True)
class File:
    """A file of a client's: `name` is a label, `asset` the reference of its content."""

    number: int
    id: str
    owner: str
    purpose: str
    name: str
    asset: str
    size: int
    created_at: float


@dataclass(frozen=True)
class Likeness:
    """Who a clip shows, as evaluate/subject_recognition.py finds it: a noun and a colour, None where nobody is sure; whether the
    receipt or the probe says so; and the probe's scores."""

    noun: str | None = None
    colour: str | None = None
    source: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def description(self) -> str | None:
        """Like "red cat"."""
        return f"{self.colour} {self.noun}" if self.colour and self.noun else self.noun


@dataclass(frozen=True)
class Character:
    """Somebody or something that prompts may name, and the clip that shows it. `consent` is what its owner attests of
    who is shown: `who` agreed, to what `scope`, until what `expiry`."""

    id: str
    owner: str
    name: str
    asset: str
    created_at: float
    likeness: Likeness = Likeness()
    consent: Mapping[str, str] | None = None


class Library:
    """Files and characters in the database, within the owners' quotas (QuotaError).

    What is somebody else's is not there (ApiError, 404).
    """

    def __init__(self, database: Database, quotas: Quotas | None = None) -> None:
        self._database, self._quotas = database, quotas or Quotas()

    def check_room(self, owner: str, **more: float) -> None:
        """Refuse what `add_file` (files, file_bytes) or `add_character` (characters) would. Raises QuotaError."""
        with self._database.read() as connection:
            self._quotas.take(connection, owner, 0.0, **more)

    def add_file(self, owner: str, purpose: str, name: str, asset: str, size: int) -> File:
        """Remember a stored file. What a batch brings is kept even over quota, or the batch would never end."""
        row = {
            "id": f"file-{secrets.token_hex(12)}",
            "owner": owner,
            "purpose": purpose,
            "name": name,
        }
        with self._database.write() as write:
            if purpose != "batch_output":
                self._quotas.take(write.connection, owner, write.now, files=1, file_bytes=size)
            values = {**row, "asset": asset, "size": size, "created_at": write.now}
            write.connection.execute(insert(files).values(**values))
            return _file(
                write.connection.execute(select(files).where(files.c.id == row["id"])).one()
            )

    def file(self, id: str, owner: str) -> File:
        """A file of the owner's."""
        with self._database.read() as connection:
            row = connection.execute(
                select(files).where(files.c.id == id, files.c.owner == owner)
            ).one_or_none()
        if row is None:
            raise missing("file", id)
        return _file(row)

    def files(
        self, owner: str, *, purpose: str | None, after: str | None, limit: int, newest_first: bool
    ) -> tuple[list[File], bool]:
        """A page of files, and whether there are more."""
        wanted = [files.c.owner == owner] + ([files.c.purpose == purpose] if purpose else [])
        if after is not None:
            last = self.file(after, owner).number
            wanted.append(files.c.number < last if newest_first else files.c.number > last)
        order = files.c.number.desc() if newest_first else files.c.number
        with self._database.read() as connection:
            rows, more = read_page(connection, select(files).where(*wanted).order_by(order), limit)
        return [_file(row) for row in rows], more

    def delete_file(self, id: str, owner: str) -> None:
        """Forget a file; its content goes when nothing else names it."""
        with self._database.write() as write:
            mine = delete(files).where(files.c.id == id, files.c.owner == owner)
            if not write.connection.execute(mine).rowcount:
                raise missing("file", id)

    def add_character(
        self,
        owner: str,
        name: str,
        asset: str,
        likeness: Likeness,
        consent: Mapping[str, str] | None = None,
    ) -> Character:
        """Remember a character."""
        id = f"char_{secrets.token_hex(12)}"
        with self._database.write() as write:
            self._quotas.take(write.connection, owner, write.now, characters=1)
            row = {"id": id, "owner": owner, "name": name, "asset": asset, "created_at": write.now}
            write.connection.execute(insert(characters).values(**row))
            known = {"character": id, "likeness": asdict(likeness), "consent": consent}
            write.connection.execute(insert(likenesses).values(**known))
        return Character(**row, likeness=likeness, consent=consent)

    def character(self, id: str, owner: str) -> Character:
        """A character of the owner's."""
        both = select(characters, likenesses.c.likeness, likenesses.c.consent).outerjoin(likenesses)
        mine = both.where(characters.c.id == id, characters.c.owner == owner)
        with self._database.read() as connection:
            row = connection.execute(mine).one_or_none()
        if row is None:
            raise missing("character", id)
        values = dict(row._mapping)
        return Character(**{**values, "likeness": Likeness(**values["likeness"] or {})})

    def references(self) -> Iterator[str]:
        """Every asset that a file or a character names: what a clean-up must keep. Read in pages of _REFERENCE_ROWS."""
        yield from self._assets(files.c.number, files.c.asset, 0)
        yield from self._assets(characters.c.id, characters.c.asset, "")

    def _assets(self, key: "Column[Any]", asset: "Column[str]", after: int | str) -> Iterator[str]:
        """The assets of a table's rows in the order of its key, from the first one above `after`."""
        while True:
            with self._database.read() as connection:
                look = select(key, asset).where(key > after).order_by(key).limit(_REFERENCE_ROWS)
                rows = connection.execute(look).all()
            if not rows:
                return
            after = rows[-1][0]
            yield from (row[1] for row in rows)


def _file(row: Row[Any]) -> File:
    return File(**row._mapping)
