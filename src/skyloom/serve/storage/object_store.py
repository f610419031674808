"""Assets in an object store (s3://bucket/prefix, gs://, az://)."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from skyloom.core.errors import ConfigError
from skyloom.serve.storage.assets import (
    NOTE,
    PIECE,
    Asset,
    Found,
    Record,
    check_suffix,
    copy_hashed,
    explain,
    fetch_to,
    is_missing,
)


class ObjectStorage:
    """Assets in an object store, by obstore; its settings and keys come from the environment (AWS_...)."""

    def __init__(self, url: str) -> None:
        try:
            import obstore
            from obstore.exceptions import BaseError
            from obstore.store import from_url
        except ImportError as error:
            raise ConfigError(
                "Object stores need obstore.", hint="Run pip install obstore."
            ) from error
        self._obstore, self._errors = obstore, (BaseError, OSError)
        try:
            self._store = from_url(url)
        except (BaseError, ValueError, TypeError) as error:
            raise ConfigError(
                f"The storage cannot be opened ({error!s:.120}).", hint="Check its URL."
            ) from error
        self._record: Record | None = None

    def put(self, source: Path | bytes | BinaryIO, suffix: str) -> Asset:
        """Store a file; object stores show it when it is whole."""
        check_suffix(suffix)
        with tempfile.TemporaryFile() as copy:
            try:
                asset = Asset(copy_hashed(source, copy), suffix)
                copy.seek(0)
                if self._record is not None:
                    self._record(asset)
                self._obstore.put(self._store, asset.key, copy)
            except self._errors as error:
                raise explain(error) from error
        return asset

    def size(self, asset: Asset) -> int:
        """Bytes."""
        try:
            return int(self._obstore.head(self._store, asset.key)["size"])
        except self._errors as error:
            raise explain(error) from error

    def read(self, asset: Asset, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """The bytes from `start` to before `stop`, in pieces."""
        size = self.size(asset)
        return self._ranges(asset, start, size if stop is None else min(stop, size))

    def fetch(self, asset: Asset, target: Path) -> Path:
        """Copy to a local file."""
        return fetch_to(self.read(asset), asset, target)

    def own(self, record: Record) -> None:
        """Record what is stored."""
        self._record = record

    def find(self, key: str) -> Found | None:
        """The object at a key."""
        try:
            told = self._obstore.head(self._store, key)
        except self._errors as error:
            if is_missing(error):
                return None
            raise explain(error) from error
        return Found(int(told["size"]), told["last_modified"].timestamp())

    def assets(self, prefix: str = "") -> Iterator[tuple[Asset, Found]]:
        """Objects in the form of assets. What lies deeper, like another installation's prefix, is none of them."""
        try:
            for one in (
                one
                for batch in self._obstore.list(self._store, prefix=prefix or None)
                for one in batch
            ):
                if (asset := Asset.at(one["path"].removeprefix(prefix))) is not None:
                    yield asset, Found(int(one["size"]), one["last_modified"].timestamp())
        except self._errors as error:
            raise explain(error) from error

    def move(self, key: str, target: str) -> bool:
        """Copy an object, then delete it under its old key."""
        try:
            self._obstore.copy(self._store, key, target)
            self._obstore.delete(self._store, key)
        except self._errors as error:
            if is_missing(error):
                return False
            raise explain(error) from error
        return True

    def remove(self, key: str) -> None:
        """Delete an object."""
        try:
            self._obstore.delete(self._store, key)
        except self._errors as error:
            if not is_missing(error):
                raise explain(error) from error

    def read_note(self) -> bytes | None:
        """The note's content."""
        try:
            return bytes(self._obstore.get(self._store, NOTE).bytes())
        except self._errors as error:
            if is_missing(error):
                return None
            raise explain(error) from error

    def write_note(self, content: bytes, *, replace: bool) -> None:
        """Put the note."""
        if not replace and self.read_note() is not None:
            return
        try:
            if replace or not self._create_note(content):
                self._obstore.put(self._store, NOTE, content)
        except self._errors as error:
            raise explain(error) from error

    def _create_note(self, content: bytes) -> bool:
        """Put the note unless somebody else just has; False for a store that knows no such condition."""
        try:
            self._obstore.put(self._store, NOTE, content, mode="create")
        except self._errors as error:
            return type(error).__name__ == "AlreadyExistsError"
        return True

    def tidy(self) -> None:
        """Nothing is left in part."""

    def _ranges(self, asset: Asset, start: int, stop: int) -> Iterator[bytes]:
        for at in range(start, stop, 16 * PIECE):
            try:
                yield bytes(
                    self._obstore.get_range(
                        self._store, asset.key, start=at, end=min(at + 16 * PIECE, stop)
                    )
                )
            except self._errors as error:
                raise explain(error) from error
