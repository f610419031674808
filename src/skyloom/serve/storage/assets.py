"""Assets: files by the hash of their content, and what a storage of them must be able to do.

A reference is "asset:<sha256>.<suffix>"; whoever has it can name nothing else, and the same bytes are stored once.
"""

import errno
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from skyloom.core.errors import CapacityError, DiskFullError, MediaError, RequestError, SkyloomError

SCHEME = "asset:"
SUFFIXES: Mapping[str, str] = {
    "mp4": "video/mp4",
    "webm": "video/webm",
    "mov": "video/quicktime",
    "gif": "image/gif",
    "webp": "image/webp",
    "png": "image/png",
    "jpg": "image/jpeg",
    "json": "application/json",
    "jsonl": "application/jsonl",
    "c2pa": "application/c2pa",
    "safetensors": "application/octet-stream",
    "bin": "application/octet-stream",
}
NOTE = "skyloom-installation.json"  # the installation that a storage belongs to: installation.py
PIECE = 256 * 1024  # bytes read and written at a time
_KEY = re.compile(rf"([0-9a-f]{{2}})/(\1[0-9a-f]{{62}})\.({'|'.join(SUFFIXES)})")
_REFERENCE = re.compile(rf"asset:([0-9a-f]{{64}})\.({'|'.join(SUFFIXES)})")
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Asset:
    """A stored file by its content."""

    sha256: str
    suffix: str

    @classmethod
    def parse(cls, reference: str) -> "Asset":
        """The inverse of `reference`. Raises RequestError for anything else."""
        found = _REFERENCE.fullmatch(reference)
        if found is None:
            raise RequestError(
                f"{reference!r:.80} is no stored file.", hint="Upload the file first."
            )
        return cls(found[1], found[2])

    @property
    def reference(self) -> str:
        """How jobs and requests name it."""
        return f"{SCHEME}{self.sha256}.{self.suffix}"

    @property
    def media_type(self) -> str:
        """What to tell a browser."""
        return SUFFIXES[self.suffix]

    @property
    def key(self) -> str:
        """Its place below the folder or prefix."""
        return f"{self.sha256[:2]}/{self.sha256}.{self.suffix}"

    @classmethod
    def at(cls, key: str) -> "Asset | None":
        """The inverse of `key`; None for a key of any other form, which is no asset."""
        found = _KEY.fullmatch(key)
        return None if found is None else cls(found[2], found[3])


@dataclass(frozen=True)
class Found:
    """An object in a storage: its size in bytes, and when it was written, in seconds since 1970."""

    size: int
    modified: float


Record = Callable[[Asset], object]
"""Is told of every asset before it appears in the storage."""


class Storage(Protocol):
    """A place of assets. All methods may be called from any thread; all raise CapacityError when the place is full or
    away, and MediaError for an asset that is not there."""

    def put(self, source: Path | bytes | BinaryIO, suffix: str) -> Asset:
        """Store the content of a file, bytes or an open file. Raises RequestError for an unknown suffix."""
        ...

    def size(self, asset: Asset) -> int:
        """Bytes."""
        ...

    def read(self, asset: Asset, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """The bytes from `start` to before `stop`, in pieces. What is not there is raised before the first piece."""
        ...

    def fetch(self, asset: Asset, target: Path) -> Path:
        """Copy to a local file, whole or not at all; content that does not fit its hash raises MediaError."""
        ...

    def own(self, record: Record) -> None:
        """From now on call `record` before an asset appears. A folder takes assets only while its note is there."""
        ...

    def find(self, key: str) -> Found | None:
        """The object at a key; None where there is none."""
        ...

    def assets(self, prefix: str = "") -> Iterator[tuple[Asset, Found]]:
        """What is stored under `prefix` ("" or one that ends in /) and has exactly the form of an asset."""
        ...

    def move(self, key: str, target: str) -> bool:
        """Move an object to another key, replacing what is there; False where there is none."""
        ...

    def remove(self, key: str) -> None:
        """Delete the object at a key, if there is one."""
        ...

    def read_note(self) -> bytes | None:
        """The content of the note at `NOTE`; None where there is none."""
        ...

    def write_note(self, content: bytes, *, replace: bool) -> None:
        """Write the note at `NOTE`. Without `replace` one that is there already stays as it is."""
        ...

    def tidy(self) -> None:
        """Remove what was never finished, after a day."""
        ...


def find_references(values: object) -> set[str]:
    """Every reference in plain values, however deep."""
    if isinstance(values, str):
        return {values} if values.startswith(SCHEME) else set()
    if isinstance(values, Mapping):
        values = list(values.values())
    if isinstance(values, Sequence):
        return set().union(*map(find_references, values))
    return set()


def check_suffix(suffix: str) -> None:
    """Raise RequestError for a suffix of no kind that is stored."""
    if suffix not in SUFFIXES:
        raise RequestError(
            f"Files of kind {suffix!r:.20} are not stored.", hint=f"Use {', '.join(SUFFIXES)}."
        )


def copy_hashed(source: Path | bytes | BinaryIO, target: Any) -> str:
    """Copy in pieces; gives the sha256 of the content."""
    digest = hashlib.sha256()
    with ExitStack() as stack:
        if isinstance(source, Path):
            source = stack.enter_context(source.open("rb"))
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        while piece := file.read(PIECE):
            digest.update(piece)
            target.write(piece)
    return digest.hexdigest()


def fetch_to(pieces: Iterator[bytes], asset: Asset, target: Path) -> Path:
    """Write an asset to a local file, whole or not at all. Raises MediaError where it does not fit its hash."""
    digest, partial = hashlib.sha256(), target.with_name(f".{target.name}.part")
    try:
        with partial.open("wb") as file:
            for piece in pieces:
                digest.update(piece)
                file.write(piece)
        if digest.hexdigest() != asset.sha256:
            raise MediaError(
                "A stored file is damaged: its content does not fit its name.",
                hint="Upload it again.",
            )
        return partial.replace(target)
    except OSError as error:
        raise explain(error) from error
    finally:
        partial.unlink(missing_ok=True)


def is_missing(error: Exception) -> bool:
    """Whether a folder or an object store says that there is no such thing."""
    return isinstance(error, FileNotFoundError) or type(error).__name__ == "NotFoundError"


def explain(error: Exception) -> SkyloomError:
    """What a place of assets says, as ours; addresses stay out of it."""
    if is_missing(error):
        return MediaError(
            "A stored file is gone.", hint="It may have been deleted or have expired."
        )
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.ELOOP:
        return MediaError("A stored file is a link, which is none of ours.")
    if number in _FULL:
        return DiskFullError("The disk is full.", hint="Free some space.")
    cause = os.strerror(number) if number else type(error).__name__
    return CapacityError(
        f"The storage does not answer ({cause}).", hint="Try again.", retry_after=10
    )
