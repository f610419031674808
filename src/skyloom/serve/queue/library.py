# pyright: basic
"""Library: uploaded files and characters. Every query is scoped to one owner."""

import secrets
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sqlalchemy import Column, delete, insert, select

from skyloom.serve.queue.database import Database, read_page
from skyloom.serve.queue.errors import NotFoundError
from skyloom.serve.queue.quotas import Quotas
from skyloom.serve.queue.tables import characters, files, likenesses

_REFERENCE_ROWS = 1_000  # rows read at a time by Library.references
PURPOSES = ("vision", "user_data", "batch", "batch_output")


@dataclass(frozen=True)
class File:
    """An uploaded file: `name` is a label, `asset` the reference of its content."""

    number: int
    id: str
    owner: str
    purpose: str
    name: str
    asset: str
    size: int  # bytes
    created_at: float  # seconds since 1970


@dataclass(frozen=True)
class CharacterLikeness:
    """Subject of a character's clip, as evaluate/subject_recognition.py recognises it.

    `noun` and `colour` are None where the recognition is below its thresholds; `source` is
    "receipt" or "probe"; `scores` are the probe's.
    """

    noun: str | None = None
    colour: str | None = None
    source: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def description(self) -> str | None:
        """Words for a prompt, such as "red cat"."""
        return f"{self.colour} {self.noun}" if self.colour and self.noun else self.noun


@dataclass(frozen=True)
class Character:
    """A name that prompts may use, and the clip that shows it.

    `consent` is the owner's statement: `who` agreed, to what `scope`, until which `expiry`.
    """

    id: str
    owner: str
    name: str
    asset: str
    created_at: float
    likeness: CharacterLikeness = CharacterLikeness()
    consent: Mapping[str, str] | None = None


class Library:
    """Files and characters in the database, within the owners' quotas.

    Methods raise QuotaError, and NotFoundError for rows of another owner.
    """

    def __init__(self, database: Database, quotas: Quotas | None = None) -> None:
        self._database = database
        self._quotas = quotas or Quotas()

    def check_room(self, owner: str, **more: float) -> None:
        """Check the quotas `files`, `file_bytes` or `characters` before an upload is read."""
        with self._database.read() as connection:
            self._quotas.check(connection, owner, 0.0, **more)

    def add_file(self, owner: str, purpose: str, name: str, asset: str, size: int) -> File:
        """Add a stored file. The output of a batch is kept even over quota, so it can end."""
        values = {"owner": owner, "purpose": purpose, "name": name, "asset": asset, "size": size}
        with self._database.write() as write:
            if purpose != "batch_output":
                self._quotas.check(write.connection, owner, write.now, files=1, file_bytes=size)
            values.update(id=f"file-{secrets.token_hex(12)}", created_at=write.now)
            row = write.connection.execute(insert(files).values(**values).returning(files)).one()
            return File(**row._mapping)

    def file(self, id: str, owner: str) -> File:
        """Read a file."""
        query = select(files).where(files.c.id == id, files.c.owner == owner)
        with self._database.read() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            raise NotFoundError("file", id)
        return File(**row._mapping)

    def files(
        self, owner: str, *, purpose: str | None, after: str | None, limit: int, newest_first: bool
    ) -> tuple[list[File], bool]:
        """Read a page of files, and whether there are more."""
        number = files.c.number
        query = select(files).where(files.c.owner == owner)
        if purpose:
            query = query.where(files.c.purpose == purpose)
        if after is not None:
            last = self.file(after, owner).number
            query = query.where(number < last if newest_first else number > last)
        query = query.order_by(number.desc() if newest_first else number)
        with self._database.read() as connection:
            rows, more = read_page(connection, query, limit)
        return [File(**row._mapping) for row in rows], more

    def delete_file(self, id: str, owner: str) -> None:
        """Delete a file; garbage collection removes its content once nothing references it."""
        with self._database.write() as write:
            own = delete(files).where(files.c.id == id, files.c.owner == owner)
            if not write.connection.execute(own).rowcount:
                raise NotFoundError("file", id)

    def add_character(
        self,
        owner: str,
        name: str,
        asset: str,
        likeness: CharacterLikeness,
        consent: Mapping[str, str] | None = None,
    ) -> Character:
        """Add a character."""
        id = f"char_{secrets.token_hex(12)}"
        with self._database.write() as write:
            self._quotas.check(write.connection, owner, write.now, characters=1)
            row = {"id": id, "owner": owner, "name": name, "asset": asset, "created_at": write.now}
            write.connection.execute(insert(characters).values(**row))
            details = {"character": id, "likeness": asdict(likeness), "consent": consent}
            write.connection.execute(insert(likenesses).values(**details))
        return Character(**row, likeness=likeness, consent=consent)

    def character(self, id: str, owner: str) -> Character:
        """Read a character."""
        query = select(characters, likenesses.c.likeness, likenesses.c.consent)
        query = query.outerjoin(likenesses)
        with self._database.read() as connection:
            own = query.where(characters.c.id == id, characters.c.owner == owner)
            row = connection.execute(own).one_or_none()
        if row is None:
            raise NotFoundError("character", id)
        likeness = CharacterLikeness(**(row.likeness or {}))
        return Character(**{**row._mapping, "likeness": likeness})

    def references(self) -> Iterator[str]:
        """Iterate over the assets of files and characters, which garbage collection must keep."""
        yield from self._assets(files.c.number, files.c.asset, 0)
        yield from self._assets(characters.c.id, characters.c.asset, "")

    def _assets(self, key: "Column[Any]", asset: "Column[str]", after: int | str) -> Iterator[str]:
        """Iterate over a table's assets in the order of its key, from the first above `after`."""
        while True:
            query = select(key, asset).where(key > after).order_by(key).limit(_REFERENCE_ROWS)
            with self._database.read() as connection:
                rows = connection.execute(query).all()
            if not rows:
                return
            after = rows[-1][0]
            yield from (row[1] for row in rows)
