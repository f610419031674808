"""Storage of what is made and of what is started from, in a local folder or, by objects.py, in an object store.

A file appears whole or not at all.
"""

import contextlib
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from skyloom.core.errors import CapacityError
from skyloom.serve.storage.assets import (
    NOTE,
    PIECE,
    Asset,
    Found,
    Record,
    Storage,
    check_suffix,
    copy_hashed,
    explain,
    fetch_to,
    find_references,
)
from skyloom.serve.storage.object_store import ObjectStorage

__all__ = [
    "Asset",
    "FolderStorage",
    "Found",
    "ObjectStorage",
    "Storage",
    "find_references",
    "open_storage",
]

PART_SECONDS = 86_400  # after which a part that was never finished is removed
_AWAY = "The storage does not answer: its installation's note is gone."


def open_storage(place: str) -> Storage:
    """The storage at a folder or a URL (s3://, gs://, az://, file://). Raises ConfigError for a URL that is none."""
    if "://" not in place:
        return FolderStorage(Path(place))
    if place.startswith("file://"):
        return FolderStorage(Path(place.removeprefix("file://")))
    return ObjectStorage(place)


class FolderStorage:
    """Assets in a local folder. A symbolic link in it is no asset."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self._parts = self.folder / ".parts"
        self._record: Record | None = None

    def put(self, source: Path | bytes | BinaryIO, suffix: str) -> Asset:
        """Store a file: written beside, on disk, then named, and the name on disk too."""
        check_suffix(suffix)
        if self._record is not None and not (self.folder / NOTE).is_file():
            raise CapacityError(_AWAY, hint="Is it mounted? Try again.", retry_after=10)
        try:
            with self._part() as (part, partial):
                asset = Asset(copy_hashed(source, part), suffix)
                part.flush()
                os.fsync(part.fileno())
                if self._record is not None:
                    self._record(asset)
                self._name(partial, asset.key)
        except OSError as error:
            raise explain(error) from error
        return asset

    def size(self, asset: Asset) -> int:
        """Bytes."""
        with self._open(asset) as file:
            return os.fstat(file.fileno()).st_size

    def read(self, asset: Asset, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """The bytes from `start` to before `stop`, in pieces."""
        return _pieces(self._open(asset), start, stop)

    def fetch(self, asset: Asset, target: Path) -> Path:
        """Copy to a local file."""
        return fetch_to(self.read(asset), asset, target)

    def own(self, record: Record) -> None:
        """Record what is stored."""
        self._record = record

    def find(self, key: str) -> Found | None:
        """The regular file at a key."""
        try:
            told = (self.folder / key).lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise explain(error) from error
        return Found(told.st_size, told.st_mtime) if stat.S_ISREG(told.st_mode) else None

    def assets(self, prefix: str = "") -> Iterator[tuple[Asset, Found]]:
        """Files in the form of assets."""
        for path in self.folder.glob(f"{prefix}??/*"):
            key = path.relative_to(self.folder).as_posix().removeprefix(prefix)
            if (asset := Asset.at(key)) is not None and (
                found := self.find(prefix + key)
            ) is not None:
                yield asset, found

    def move(self, key: str, target: str) -> bool:
        """Rename a file."""
        if self.find(key) is None:
            return False
        try:
            self._name(self.folder / key, target)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise explain(error) from error
        return True

    def remove(self, key: str) -> None:
        """Unlink a file."""
        try:
            (self.folder / key).unlink(missing_ok=True)
        except OSError as error:
            raise explain(error) from error

    def read_note(self) -> bytes | None:
        """The note's content."""
        try:
            return (self.folder / NOTE).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise explain(error) from error

    def write_note(self, content: bytes, *, replace: bool) -> None:
        """Write the note, whole or not at all."""
        try:
            with self._part() as (part, partial):
                part.write(content)
                part.flush()
                os.fsync(part.fileno())
                if replace:
                    partial.replace(self.folder / NOTE)
                else:
                    with contextlib.suppress(FileExistsError):
                        os.link(partial, self.folder / NOTE)
                    partial.unlink()
                _sync_folder(self.folder)
        except OSError as error:
            raise explain(error) from error

    def tidy(self) -> None:
        """Remove parts that were never finished."""
        before = time.time() - PART_SECONDS
        for path in self._parts.glob("tmp*"):
            with contextlib.suppress(FileNotFoundError):
                if path.lstat().st_mtime < before:
                    path.unlink()

    @contextlib.contextmanager
    def _part(self) -> Iterator[tuple[Any, Path]]:
        """A new file beside the assets, which is removed when the block raises."""
        self._parts.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self._parts, delete=False) as part:
            partial = Path(part.name)
            try:
                yield part, partial
            except BaseException:
                partial.unlink(missing_ok=True)
                raise

    def _name(self, path: Path, key: str) -> None:
        """Give a file its place, and bring its name to the disk."""
        target = self.folder / key
        if not target.parent.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            _sync_folder(self.folder)
        path.replace(target)
        _sync_folder(target.parent)

    def _open(self, asset: Asset) -> BinaryIO:
        try:
            return os.fdopen(
                os.open(self.folder / asset.key, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb"
            )
        except OSError as error:
            raise explain(error) from error


def _pieces(file: BinaryIO, start: int, stop: int | None) -> Iterator[bytes]:
    with file:
        file.seek(start)
        left = None if stop is None else max(0, stop - start)
        while piece := file.read(PIECE if left is None else min(PIECE, left)):
            left = None if left is None else left - len(piece)
            yield piece


def _sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
