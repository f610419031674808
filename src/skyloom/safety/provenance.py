"""Provenance registry: generated files, found again by file, frames, watermark or perceptual hash.

It identifies files that have lost their manifest and watermark. A SQLite file that only its owner
may read, in rollback-journal mode so that several programs can use it; it holds no prompts.
"""

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

from skyloom.core import files
from skyloom.core.errors import MediaError
from skyloom.core.paths import data_folder

MAX_MEAN_DISTANCE = 8  # bits of 64, averaged over the frames of a video
_THUMBNAIL = 32
_FREQUENCIES = 8
_COSINES = np.cos(
    np.pi / _THUMBNAIL * np.outer(np.arange(1, _FREQUENCIES + 1), np.arange(_THUMBNAIL) + 0.5)
)
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
    """A generated file.

    `sha256` is of the file, `frames` of its decoded frames, `identity` its watermark id,
    `generation` the assertion of its manifest, `hashes` its perceptual hashes (hex, one a second),
    `made_at` the time in UTC.
    """

    name: str
    sha256: str
    frames: str
    identity: str
    generation: Mapping[str, Any]
    hashes: tuple[str, ...] = ()
    made_at: str = ""


@dataclass(frozen=True)
class Match:
    """A record and how it was found: by "file", "frames", "watermark" or "look" (hash)."""

    by: str
    record: ProvenanceRecord

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, without the perceptual hashes."""
        values = asdict(self.record)
        values.pop("hashes")
        return {"by": self.by, **values}


class Registry:
    """Records in a database that is created on the first `add`. Raises MediaError on failure."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or data_folder() / "registry.sqlite"

    def prepare(self) -> None:
        """Create the database if it does not exist."""
        with self._connect(create=True) as connection:
            connection.executescript(_TABLES)

    def add(self, record: ProvenanceRecord) -> None:
        """Insert a record."""
        values = (
            record.made_at or time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            record.name,
            record.sha256,
            record.frames,
            record.identity,
            json.dumps(record.generation),
        )
        with self._connect(create=True) as connection:
            connection.executescript(_TABLES)
            with connection:
                columns = "made_at, name, sha256, frames, identity, generation"
                inserted = connection.execute(
                    f"insert into makings ({columns}) values (?, ?, ?, ?, ?, ?)", values
                )
                connection.executemany(
                    "insert into looks values (?, ?)",
                    [(inserted.lastrowid, one) for one in record.hashes],
                )

    def find(
        self,
        *,
        sha256: str = "",
        frames: str = "",
        identities: Sequence[str] = (),
        hashes: Sequence[str] = (),
    ) -> list[Match]:
        """Find records by file, frames or watermark ids; by hashes only if these find none.

        The newest come first.
        """
        if not self.path.exists():
            return []
        criteria = [("file", "sha256", sha256), ("frames", "frames", frames)]
        criteria += [("watermark", "identity", identity) for identity in identities]
        with self._connect(create=False) as connection:
            matches = [
                Match(by, record)
                for by, column, value in criteria
                if value
                for record in _select(connection, f"where {column} = ?", (value,))
            ]
            matches = matches or [Match("look", one) for one in _find_similar(connection, hashes)]
        unique: dict[str, Match] = {}
        for match in matches:
            unique.setdefault(match.record.sha256, match)
        return list(unique.values())

    @contextmanager
    def _connect(self, *, create: bool) -> Iterator[sqlite3.Connection]:
        try:
            if create and not self.path.exists():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.touch(mode=0o600)
            with closing(sqlite3.connect(self.path, timeout=10)) as connection:
                yield connection
        except (sqlite3.Error, OSError) as error:
            raise MediaError(
                f"The registry {self.path} cannot be used ({error}).",
                hint="Free some space, or set SKYLOOM_DATA to a writable folder.",
            ) from error


class FrameHasher:
    """Computes the perceptual hashes of one frame a second from frames in batches."""

    def __init__(self, fps: float | Fraction) -> None:
        self.hashes: list[str] = []
        self._interval = max(1, round(fps))
        self._count = 0

    def append(self, frames: UInt8[Tensor, "t h w c"]) -> None:
        """Add the next frames."""
        for index in range(-self._count % self._interval, len(frames), self._interval):
            self.hashes.append(phash(frames[index]))
        self._count += len(frames)


def content_sha256(path: Path) -> str:
    """Return the SHA-256 of a file. Raises MediaError if it cannot be read."""
    try:
        return files.sha256_file(path)
    except OSError as error:
        raise MediaError(
            f"{path} cannot be read ({error.strerror}).", hint="Check the path."
        ) from error


def phash(frame: UInt8[Tensor, "h w c"]) -> str:
    """Return the perceptual hash of a frame: 64 bits in hex.

    The signs of the lowest 8x8 DCT coefficients of a 32x32 grey thumbnail relative to their median
    (Zauner 2010, "pHash"). Resizing, compression and brightness change few bits.
    """
    grey = Image.fromarray(frame.cpu().numpy()).convert("L")
    thumbnail = grey.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BILINEAR)
    coefficients = (_COSINES @ np.asarray(thumbnail, dtype=np.float64) @ _COSINES.T).ravel()
    return np.packbits(coefficients > np.median(coefficients)).tobytes().hex()


def _select(
    connection: sqlite3.Connection, where: str, values: Sequence[object]
) -> list[ProvenanceRecord]:
    columns = "name, sha256, frames, identity, generation, made_at"
    rows = connection.execute(
        f"select {columns} from makings {where} order by number desc limit 100", values
    )
    return [
        ProvenanceRecord(name, sha256, frames, identity, json.loads(generation), made_at=made_at)
        for name, sha256, frames, identity, generation, made_at in rows
    ]


def _find_similar(connection: sqlite3.Connection, hashes: Sequence[str]) -> list[ProvenanceRecord]:
    """Find records whose nearest hashes differ by at most MAX_MEAN_DISTANCE bits on average."""
    if not hashes:
        return []
    codes = [int(one, 16) for one in hashes]
    by_record: dict[int, list[int]] = {}
    for number, one in connection.execute("select making, look from looks"):
        by_record.setdefault(number, []).append(int(one, 16))
    found: list[ProvenanceRecord] = []
    for number, others in by_record.items():
        total = sum(min((code ^ other).bit_count() for other in others) for code in codes)
        if total <= MAX_MEAN_DISTANCE * len(codes):
            found += _select(connection, "where number = ?", (number,))
    return found
