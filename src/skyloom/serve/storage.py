"""Storage of what is made and of what is started from: files by the hash of their content.

A reference is "asset:<sha256>.<suffix>"; whoever has it can name nothing else, and the same bytes are stored once. A
file appears whole or not at all. The place is a local folder, or an object store (s3://bucket/prefix) by obstore.
"""

import errno
import hashlib
import io
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from skyloom.core.errors import CapacityError, ConfigError, DiskFullError, MediaError, RequestError, SkyloomError
from skyloom.serve.marks import Marks

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
GRACE_SECONDS = 3_600  # what was stored a moment ago may be about to be named in the database
PIECE = 256 * 1024  # bytes read and written at a time
_REFERENCE = re.compile(rf"asset:([0-9a-f]{{64}})\.({'|'.join(SUFFIXES)})")
_NAME = re.compile(rf"([0-9a-f]{{64}})\.(?:{'|'.join(SUFFIXES)})")
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
            raise RequestError(f"{reference!r:.80} is no stored file.", hint="Upload the file first.")
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

    def collect(self, keep: Iterable[str], grace: float = GRACE_SECONDS) -> int:
        """Remove what no reference in `keep` names and what is older than `grace` seconds; returns how many files."""
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
        self._parts.mkdir(parents=True, exist_ok=True)

    def put(self, source: Path | bytes | BinaryIO, suffix: str) -> Asset:
        """Store a file: written beside, on disk, then named, and the name on disk too."""
        _check_suffix(suffix)
        try:
            with tempfile.NamedTemporaryFile(dir=self._parts, delete=False) as part:
                partial = Path(part.name)
                try:
                    asset = Asset(_copy(source, part), suffix)
                    part.flush()
                    os.fsync(part.fileno())
                    target = self.folder / asset.key
                    if not target.parent.is_dir():
                        target.parent.mkdir(exist_ok=True)
                        _sync_folder(self.folder)
                    partial.replace(target)
                    _sync_folder(target.parent)
                except BaseException:
                    partial.unlink(missing_ok=True)
                    raise
        except OSError as error:
            raise _explain(error) from error
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
        return _fetch(self.read(asset), asset, target)

    def collect(self, keep: Iterable[str], grace: float = GRACE_SECONDS) -> int:
        """Remove what nobody names, and parts that were never finished."""
        kept, before, removed = _mark(keep), time.time() - grace, 0
        for path in chain(self.folder.glob("??/*"), self._parts.iterdir()):
            unnamed = not _is_marked(path.name, kept)
            try:
                if unnamed and path.lstat().st_mtime < before:
                    path.unlink()
                    removed += 1
            except FileNotFoundError:
                continue
        return removed

    def _open(self, asset: Asset) -> BinaryIO:
        try:
            return os.fdopen(os.open(self.folder / asset.key, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb")
        except OSError as error:
            raise _explain(error) from error


class ObjectStorage:
    """Assets in an object store, by obstore; its settings and keys come from the environment (AWS_...)."""

    def __init__(self, url: str) -> None:
        try:
            import obstore
            from obstore.exceptions import BaseError
            from obstore.store import from_url
        except ImportError as error:
            raise ConfigError("Object stores need obstore.", hint="Run pip install obstore.") from error
        self._obstore, self._errors = obstore, (BaseError, OSError)
        try:
            self._store = from_url(url)
        except (BaseError, ValueError, TypeError) as error:
            raise ConfigError(f"The storage cannot be opened ({error!s:.120}).", hint="Check its URL.") from error

    def put(self, source: Path | bytes | BinaryIO, suffix: str) -> Asset:
        """Store a file; object stores show it when it is whole."""
        _check_suffix(suffix)
        with tempfile.TemporaryFile() as copy:
            try:
                asset = Asset(_copy(source, copy), suffix)
                copy.seek(0)
                self._obstore.put(self._store, asset.key, copy)
            except self._errors as error:
                raise _explain(error) from error
        return asset

    def size(self, asset: Asset) -> int:
        """Bytes."""
        try:
            return int(self._obstore.head(self._store, asset.key)["size"])
        except self._errors as error:
            raise _explain(error) from error

    def read(self, asset: Asset, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """The bytes from `start` to before `stop`, in pieces."""
        size = self.size(asset)
        return self._ranges(asset, start, size if stop is None else min(stop, size))

    def fetch(self, asset: Asset, target: Path) -> Path:
        """Copy to a local file."""
        return _fetch(self.read(asset), asset, target)

    def collect(self, keep: Iterable[str], grace: float = GRACE_SECONDS) -> int:
        """Remove what nobody names."""
        kept, before, removed = _mark(keep), time.time() - grace, 0
        try:
            for found in (found for batch in self._obstore.list(self._store) for found in batch):
                if _is_marked(found["path"].rpartition("/")[2], kept) or found["last_modified"].timestamp() >= before:
                    continue
                again = self._obstore.head(self._store, found["path"])  # it may have been stored again meanwhile
                if again["last_modified"].timestamp() < before:
                    self._obstore.delete(self._store, found["path"])
                    removed += 1
        except self._errors as error:
            raise _explain(error) from error
        return removed

    def _ranges(self, asset: Asset, start: int, stop: int) -> Iterator[bytes]:
        for at in range(start, stop, 16 * PIECE):
            try:
                yield bytes(self._obstore.get_range(self._store, asset.key, start=at, end=min(at + 16 * PIECE, stop)))
            except self._errors as error:
                raise _explain(error) from error


def _mark(keep: Iterable[str]) -> Marks:
    return Marks(Asset.parse(reference).sha256 for reference in keep)


def _is_marked(name: str, marks: Marks) -> bool:
    """Whether a stored file of that name is in use."""
    found = _NAME.fullmatch(name)
    return found is not None and found[1] in marks


def _check_suffix(suffix: str) -> None:
    if suffix not in SUFFIXES:
        raise RequestError(f"Files of kind {suffix!r:.20} are not stored.", hint=f"Use {', '.join(SUFFIXES)}.")


def _copy(source: Path | bytes | BinaryIO, target: Any) -> str:
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


def _pieces(file: BinaryIO, start: int, stop: int | None) -> Iterator[bytes]:
    with file:
        file.seek(start)
        left = None if stop is None else max(0, stop - start)
        while piece := file.read(PIECE if left is None else min(PIECE, left)):
            left = None if left is None else left - len(piece)
            yield piece


def _fetch(pieces: Iterator[bytes], asset: Asset, target: Path) -> Path:
    digest, partial = hashlib.sha256(), target.with_name(f".{target.name}.part")
    try:
        with partial.open("wb") as file:
            for piece in pieces:
                digest.update(piece)
                file.write(piece)
        if digest.hexdigest() != asset.sha256:
            raise MediaError("A stored file is damaged: its content does not fit its name.", hint="Upload it again.")
        return partial.replace(target)
    except OSError as error:
        raise _explain(error) from error
    finally:
        partial.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _explain(error: Exception) -> SkyloomError:
    """What a place of assets says, as ours; addresses stay out of it."""
    if isinstance(error, FileNotFoundError) or type(error).__name__ == "NotFoundError":
        return MediaError("A stored file is gone.", hint="It may have been deleted or have expired.")
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.ELOOP:
        return MediaError("A stored file is a link, which is none of ours.")
    if number in _FULL:
        return DiskFullError("The disk is full.", hint="Free some space.")
    cause = os.strerror(number) if number else type(error).__name__
    return CapacityError(f"The storage does not answer ({cause}).", hint="Try again.", retry_after=10)
