"""Assets, files named by the SHA-256 of their content, and the protocol of their storage.

A reference is "asset:<sha256>.<suffix>". It cannot name any other file, and equal content is stored
once.
"""

import errno
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from skyloom.core.errors import CapacityError, DiskFullError, MediaError, RequestError, SkyloomError
from skyloom.serve.queue.tables import ASSET_SCHEME

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
MARKER_NAME = "skyloom-installation.json"  # names the installation of a storage: installation.py
CHUNK_BYTES = 256 * 1024
_KEY = re.compile(rf"([0-9a-f]{{2}})/(\1[0-9a-f]{{62}})\.({'|'.join(SUFFIXES)})")
_REFERENCE = re.compile(rf"asset:([0-9a-f]{{64}})\.({'|'.join(SUFFIXES)})")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Asset:
    """A stored file: SHA-256 of its content (64 hex digits) and suffix, one of `SUFFIXES`."""

    sha256: str
    suffix: str

    @classmethod
    def parse(cls, reference: str) -> "Asset":
        """Parse a reference. Raises RequestError for any other text."""
        match = _REFERENCE.fullmatch(reference)
        if match is None:
            raise RequestError(
                f"A stored file must be asset:<sha256>.<suffix>, got {reference!r:.80}.",
                hint="Upload the file first.",
            )
        return cls(match[1], match[2])

    @classmethod
    def from_key(cls, key: str) -> "Asset | None":
        """Parse a storage key; None for an object that is not an asset."""
        match = _KEY.fullmatch(key)
        return None if match is None else cls(match[2], match[3])

    @property
    def reference(self) -> str:
        """Text that names the asset in jobs and requests."""
        return f"{ASSET_SCHEME}{self.sha256}.{self.suffix}"

    @property
    def media_type(self) -> str:
        """Media type for HTTP."""
        return SUFFIXES[self.suffix]

    @property
    def key(self) -> str:
        """Path below the folder or prefix of a storage."""
        return f"{self.sha256[:2]}/{self.sha256}.{self.suffix}"


@dataclass(frozen=True)
class StoredObject:
    """An object in a storage: size in bytes and time of its last write in seconds since 1970."""

    size: int
    modified: float


class AssetStorage(Protocol):
    """A storage of assets, safe for use by several threads.

    All methods raise CapacityError when the storage is full or unreachable, and MediaError for a
    missing asset.
    """

    def put(self, source: Path | bytes | BinaryIO, suffix: str) -> Asset:
        """Store the content of a file, bytes or an open file.

        Raises RequestError for an unknown suffix.
        """
        ...

    def size(self, asset: Asset) -> int:
        """Size of an asset in bytes."""
        ...

    def read(self, asset: Asset, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """Read the bytes from `start` to before `stop` in chunks. Raises before the first chunk."""
        ...

    def fetch(self, asset: Asset, target: Path) -> Path:
        """Download to a local file, atomically.

        Raises MediaError when the content does not match its SHA-256.
        """
        ...

    def set_recorder(self, recorder: Callable[[Asset], object]) -> None:
        """Call `recorder` before an asset appears in the storage.

        From now on a folder without marker refuses assets.
        """
        ...

    def find(self, key: str) -> StoredObject | None:
        """Look up the object at a key; None if there is none."""
        ...

    def assets(self, prefix: str = "") -> Iterator[tuple[Asset, StoredObject]]:
        """List the assets directly under `prefix`, which is "" or ends in /."""
        ...

    def move(self, key: str, target: str) -> bool:
        """Move an object to another key and replace what is there.

        Returns False if there is no such object.
        """
        ...

    def remove(self, key: str) -> None:
        """Delete the object at a key, if there is one."""
        ...

    def read_marker(self) -> bytes | None:
        """Content of the installation marker; None if there is none."""
        ...

    def write_marker(self, content: bytes, *, replace: bool) -> None:
        """Write the installation marker. Without `replace` an existing marker stays unchanged."""
        ...

    def remove_partial(self) -> None:
        """Delete files whose upload was interrupted more than a day ago."""
        ...


def check_suffix(suffix: str) -> None:
    """Raise RequestError for a suffix outside `SUFFIXES`."""
    if suffix not in SUFFIXES:
        raise RequestError(
            f"The suffix of a stored file must be one of {', '.join(SUFFIXES)}, got {suffix!r:.20}."
        )


def copy_and_hash(source: Path | bytes | BinaryIO, target: Any) -> str:
    """Copy content to an open file in chunks. Returns its SHA-256."""
    digest = hashlib.sha256()
    with ExitStack() as stack:
        if isinstance(source, Path):
            source = stack.enter_context(source.open("rb"))
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            target.write(chunk)
    return digest.hexdigest()


def write_verified(chunks: Iterator[bytes], asset: Asset, target: Path) -> Path:
    """Write an asset to a local file, atomically.

    Raises MediaError when the content does not match its SHA-256.
    """
    digest = hashlib.sha256()
    partial = target.with_name(f".{target.name}.part")
    try:
        with partial.open("wb") as file:
            for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != asset.sha256:
            raise MediaError(
                "A stored file is damaged: its content does not match its SHA-256.",
                hint="Upload it again.",
            )
        return partial.replace(target)
    except OSError as error:
        raise translate_error(error) from error
    finally:
        partial.unlink(missing_ok=True)


def is_missing(error: Exception) -> bool:
    """Whether a folder or an object store reports a missing object."""
    return isinstance(error, FileNotFoundError) or type(error).__name__ == "NotFoundError"


def translate_error(error: Exception) -> SkyloomError:
    """Turn an error of a folder or object store into one of skyloom, without paths and URLs."""
    if is_missing(error):
        return MediaError(
            "A stored file is gone.", hint="It may have been deleted or have expired."
        )
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.ELOOP:
        return MediaError("A stored file was replaced by a symbolic link.")
    if number in _DISK_FULL:
        return DiskFullError("The disk is full.", hint="Free some space.")
    cause = os.strerror(number) if number else type(error).__name__
    return CapacityError(
        f"The storage does not respond ({cause}).", hint="Try again.", retry_after=10
    )
