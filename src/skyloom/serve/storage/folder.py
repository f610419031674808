"""Assets in a local folder. A file appears under its name only when all of it is on the disk."""

import contextlib
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from skyloom.core.errors import CapacityError
from skyloom.serve.storage.assets import (
    CHUNK_BYTES,
    MARKER_NAME,
    Asset,
    StoredObject,
    check_suffix,
    copy_and_hash,
    translate_error,
    write_verified,
)

PARTIAL_SECONDS = 86_400  # age at which an interrupted upload is deleted


class FolderStorage:
    """Assets in a local folder. Symbolic links in it are ignored."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self._partial_folder = self.folder / ".parts"
        self._recorder: Callable[[Asset], object] | None = None

    def put(self, source: Path | bytes | BinaryIO, suffix: str) -> Asset:
        """Store content: write and sync a temporary file, rename it, then sync the folder."""
        check_suffix(suffix)
        if self._recorder is not None and not (self.folder / MARKER_NAME).is_file():
            raise CapacityError(
                "The storage does not respond: its installation marker is gone.",
                hint="Check that it is mounted, then try again.",
                retry_after=10,
            )
        try:
            with self._partial_file() as (file, partial):
                asset = Asset(copy_and_hash(source, file), suffix)
                file.flush()
                os.fsync(file.fileno())
                if self._recorder is not None:
                    self._recorder(asset)
                self._rename(partial, asset.key)
        except OSError as error:
            raise translate_error(error) from error
        return asset

    def size(self, asset: Asset) -> int:
        """Size of an asset in bytes."""
        with self._open(asset) as file:
            return os.fstat(file.fileno()).st_size

    def read(self, asset: Asset, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """Read the bytes from `start` to before `stop` in chunks."""
        return _read_chunks(self._open(asset), start, stop)

    def fetch(self, asset: Asset, target: Path) -> Path:
        """Copy to a local file."""
        return write_verified(self.read(asset), asset, target)

    def set_recorder(self, recorder: Callable[[Asset], object]) -> None:
        """Call `recorder` before an asset appears; refuse assets while the marker is missing."""
        self._recorder = recorder

    def find(self, key: str) -> StoredObject | None:
        """Look up the regular file at a key."""
        try:
            status = (self.folder / key).lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise translate_error(error) from error
        if not stat.S_ISREG(status.st_mode):
            return None
        return StoredObject(status.st_size, status.st_mtime)

    def assets(self, prefix: str = "") -> Iterator[tuple[Asset, StoredObject]]:
        """List the assets directly under `prefix`."""
        for path in self.folder.glob(f"{prefix}??/*"):
            key = path.relative_to(self.folder).as_posix().removeprefix(prefix)
            asset = Asset.from_key(key)
            stored = None if asset is None else self.find(prefix + key)
            if asset is not None and stored is not None:
                yield asset, stored

    def move(self, key: str, target: str) -> bool:
        """Move a file to another key."""
        if self.find(key) is None:
            return False
        try:
            self._rename(self.folder / key, target)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise translate_error(error) from error
        return True

    def remove(self, key: str) -> None:
        """Delete a file, if it exists."""
        try:
            (self.folder / key).unlink(missing_ok=True)
        except OSError as error:
            raise translate_error(error) from error

    def read_marker(self) -> bytes | None:
        """Content of the installation marker; None if there is none."""
        try:
            return (self.folder / MARKER_NAME).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise translate_error(error) from error

    def write_marker(self, content: bytes, *, replace: bool) -> None:
        """Write the installation marker atomically."""
        try:
            with self._partial_file() as (file, partial):
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                if replace:
                    partial.replace(self.folder / MARKER_NAME)
                else:
                    with contextlib.suppress(FileExistsError):
                        os.link(partial, self.folder / MARKER_NAME)
                    partial.unlink()
                _sync_folder(self.folder)
        except OSError as error:
            raise translate_error(error) from error

    def remove_partial(self) -> None:
        """Delete files whose upload was interrupted more than a day ago."""
        before = time.time() - PARTIAL_SECONDS
        for path in self._partial_folder.glob("tmp*"):
            with contextlib.suppress(FileNotFoundError):
                if path.lstat().st_mtime < before:
                    path.unlink()

    @contextlib.contextmanager
    def _partial_file(self) -> Iterator[tuple[Any, Path]]:
        """Create a temporary file in the same file system; delete it when the block raises."""
        self._partial_folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self._partial_folder, delete=False) as file:
            partial = Path(file.name)
            try:
                yield file, partial
            except BaseException:
                partial.unlink(missing_ok=True)
                raise

    def _rename(self, path: Path, key: str) -> None:
        """Rename a file to a key and sync the folder."""
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
            raise translate_error(error) from error


def _read_chunks(file: BinaryIO, start: int, stop: int | None) -> Iterator[bytes]:
    with file:
        file.seek(start)
        left = None if stop is None else max(0, stop - start)
        while chunk := file.read(CHUNK_BYTES if left is None else min(CHUNK_BYTES, left)):
            left = None if left is None else left - len(chunk)
            yield chunk


def _sync_folder(folder: Path) -> None:
    """Flush the entries of a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
