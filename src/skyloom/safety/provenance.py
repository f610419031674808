"""The registry: what was made on this machine, found again by file, frames, watermark or look.

The third layer beside manifest and watermark, for files that have lost both. One SQLite file that only its owner may
read, written in the rollback journal's mode (several programs may use it at once); it holds no prompts.
"""

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from skyloom.core.errors import MediaError
from skyloom.core.paths import data_folder

LOOKS_ALIKE = 8  # of 64 bits of a look, on average
_SIDE, _KEPT = 32, 8
_COSINES = np.cos(np.pi / _SIDE * np.outer(np.arange(1, _KEPT + 1), np.arange(_SIDE) + 0.5))
_TABLES = """
create table if not exists makings (
    number integer primary key, made_at text not null, name text not null, sha256 text not null,
    frames text not null, identity text not null, generation text not null
);
create table if not exists looks (making integer not null, look text not null);
create index if not exists by_sha256 on makings (sha256);
create index if not exists by_frames on makings (frames);
create index if not exists by_identity on makings (identity);
"""


@dataclass(frozen=True)
class ProvenanceRecord:
    """One file that was made: when (UTC), its name, its sha256, that of its frames, its watermark's id, and what the
    manifest says of how it was made. `looks` are 64-bit hashes (hex), one a second."""

    name: str
    sha256: str
    frames: str
    identity: str
    generation: Mapping[str, Any]
    looks: tuple[str, ...] = ()
    made_at: str = ""


@dataclass(frozen=True)
class Match:
    """A making and how it was found: by "file", "frames", "watermark" or "look"."""

    by: str
    making: ProvenanceRecord

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them, without the looks."""
        values = asdict(self.making)
        values.pop("looks")
        return {"by": self.by, **values}


class Registry:
    """Makings in a file that is created when the first one is kept. Raises MediaError when it cannot be used."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or data_folder() / "registry.sqlite"

    def prepare(self) -> None:
        """Create the file, if there is none."""
        with self._opened(create=True) as connection:
            connection.executescript(_TABLES)

    def add(self, making: ProvenanceRecord) -> None:
        """Keep a making."""
        made_at = making.made_at or time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        values = (
            made_at,
            making.name,
            making.sha256,
            making.frames,
            making.identity,
            json.dumps(making.generation),
        )
        with self._opened(create=True) as connection:
            connection.executescript(_TABLES)
            with connection:
                names = "made_at, name, sha256, frames, identity, generation"
                done = connection.execute(
                    f"insert into makings ({names}) values (?, ?, ?, ?, ?, ?)", values
                )
                connection.executemany(
                    "insert into looks values (?, ?)",
                    [(done.lastrowid, look) for look in making.looks],
                )

    def find(
        self,
        *,
        sha256: str = "",
        frames: str = "",
        identities: Sequence[str] = (),
        looks: Sequence[str] = (),
    ) -> list[Match]:
        """Makings with that file or those frames, with one of the ids, or, if there are none, that look alike; the
        newest first."""
        if not self.path.exists():
            return []
        with self._opened(create=False) as connection:
            asked = [("file", "sha256", sha256), ("frames", "frames", frames)]
            asked += [("watermark", "identity", identity) for identity in identities]
            found = [
                Match(by, making)
                for by, column, value in asked
                if value
                for making in _select(connection, f"where {column} = ?", (value,))
            ]
            found = found or [Match("look", one) for one in _alike(connection, looks)]
        seen: set[str] = set()
        return [
            one for one in found if not (one.making.sha256 in seen or seen.add(one.making.sha256))
        ]

    @contextmanager
    def _opened(self, *, create: bool) -> Iterator[sqlite3.Connection]:
        try:
            if create and not self.path.exists():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.touch(mode=0o600)
            with closing(sqlite3.connect(self.path, timeout=10)) as connection:
                yield connection
        except (sqlite3.Error, OSError) as error:
            hint = "Free some space, or set SKYLOOM_DATA to a folder that can be written."
            raise MediaError(
                f"The registry {self.path} cannot be used ({error}).", hint=hint
            ) from error


class FrameHasher:
    """Takes a video's frames in order, some at a time; `looks` are those of one frame a second."""

    def __init__(self, fps: float | Fraction) -> None:
        self.looks: list[str] = []
        self._every, self._count = max(1, round(fps)), 0

    def append(self, frames: UInt8[Tensor, "t h w c"]) -> None:
        """Take the next frames."""
        self.looks += [
            phash(frames[index])
            for index in range(-self._count % self._every, len(frames), self._every)
        ]
        self._count += len(frames)


def sha256_file(path: Path) -> str:
    """The sha256 of a file. Raises MediaError."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise MediaError(
            f"{path} cannot be read ({error.strerror}).", hint="Check the path."
        ) from error


def phash(frame: UInt8[Tensor, "h w c"]) -> str:
    """A frame's look: 64 bits (hex) that stay nearly the same when it is resized, coded or lightened.

    The signs of the lowest 8x8 cosines of a 32x32 grey picture, against their median (Zauner 2010, "pHash").
    """
    grey = Image.fromarray(frame.cpu().numpy()).convert("L")
    small = np.asarray(grey.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR), dtype=np.float64)
    lowest = (_COSINES @ small @ _COSINES.T).ravel()
    bits = lowest > np.median(lowest)
    return np.packbits(bits).tobytes().hex()


def _select(
    connection: sqlite3.Connection, where: str, values: Sequence[object]
) -> list[ProvenanceRecord]:
    names = "number, name, sha256, frames, identity, generation, made_at"
    rows = connection.execute(
        f"select {names} from makings {where} order by number desc limit 100", values
    )
    return [
        ProvenanceRecord(name, sha256, frames, identity, json.loads(generation), made_at=made_at)
        for _, name, sha256, frames, identity, generation, made_at in rows
    ]


def _alike(connection: sqlite3.Connection, looks: Sequence[str]) -> list[ProvenanceRecord]:
    """Makings of which every asked second is near one of theirs."""
    if not looks:
        return []
    kept: dict[int, list[int]] = {}
    for making, look in connection.execute("select making, look from looks"):
        kept.setdefault(making, []).append(int(look, 16))
    asked = [int(look, 16) for look in looks]
    near = [
        number
        for number, theirs in kept.items()
        if sum(min((mine ^ other).bit_count() for other in theirs) for mine in asked)
        <= LOOKS_ALIKE * len(asked)
    ]
    return [
        making for number in near for making in _select(connection, "where number = ?", (number,))
    ]
