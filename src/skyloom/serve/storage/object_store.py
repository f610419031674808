"""Assets in an object store (s3://bucket/prefix, gs://, az://)."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from skyloom.core.errors import ConfigError
from skyloom.serve.storage.assets import (
    CHUNK_BYTES,
    MARKER_NAME,
    Asset,
    StoredObject,
    check_suffix,
    copy_and_hash,
    is_missing,
    translate_error,
    write_verified,
)

_RANGE_BYTES = 16 * CHUNK_BYTES  # of one request


class ObjectStorage:
    """Assets in an object store, by obstore.

    Its settings and keys come from the environment (AWS_...).
    """

    def __init__(self, url: str) -> None:
        try:
            import obstore
            from obstore.exceptions import BaseError
            from obstore.store import from_url
        except ImportError as error:
            raise ConfigError(
                "Object stores need obstore.", hint="Run pip install obstore."
            ) from error
        self._obstore = obstore
        self._errors = (BaseError, OSError)
        try:
            self._store = from_url(url)
        except (BaseError, ValueError, TypeError) as error:
            raise ConfigError(
                f"The storage cannot be opened ({error!s:.120}).", hint="Check its URL."
            ) from error
        self._recorder: Callable[[Asset], object] | None = None

    def put(self, source: Path | bytes | BinaryIO, suffix: str) -> Asset:
        """Store content. Object stores show an object only when the upload is complete."""
        check_suffix(suffix)
        with tempfile.TemporaryFile() as copy:
            try:
                asset = Asset(copy_and_hash(source, copy), suffix)
                copy.seek(0)
                if self._recorder is not None:
                    self._recorder(asset)
                self._obstore.put(self._store, asset.key, copy)
            except self._errors as error:
                raise translate_error(error) from error
        return asset

    def size(self, asset: Asset) -> int:
        """Size of an asset in bytes."""
        try:
            return int(self._obstore.head(self._store, asset.key)["size"])
        except self._errors as error:
            raise translate_error(error) from error

    def read(self, asset: Asset, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """Read the bytes from `start` to before `stop` in chunks."""
        size = self.size(asset)
        return self._ranges(asset, start, size if stop is None else min(stop, size))

    def fetch(self, asset: Asset, target: Path) -> Path:
        """Download to a local file."""
        return write_verified(self.read(asset), asset, target)

    def set_recorder(self, recorder: Callable[[Asset], object]) -> None:
        """Call `recorder` before an asset appears."""
        self._recorder = recorder

    def find(self, key: str) -> StoredObject | None:
        """Look up the object at a key."""
        try:
            metadata = self._obstore.head(self._store, key)
        except self._errors as error:
            if is_missing(error):
                return None
            raise translate_error(error) from error
        return StoredObject(int(metadata["size"]), metadata["last_modified"].timestamp())

    def assets(self, prefix: str = "") -> Iterator[tuple[Asset, StoredObject]]:
        """List the assets directly under `prefix`, without those of deeper prefixes."""
        try:
            for batch in self._obstore.list(self._store, prefix=prefix or None):
                for one in batch:
                    asset = Asset.from_key(one["path"].removeprefix(prefix))
                    if asset is not None:
                        yield (
                            asset,
                            StoredObject(int(one["size"]), one["last_modified"].timestamp()),
                        )
        except self._errors as error:
            raise translate_error(error) from error

    def move(self, key: str, target: str) -> bool:
        """Copy an object, then delete it under its old key."""
        try:
            self._obstore.copy(self._store, key, target)
            self._obstore.delete(self._store, key)
        except self._errors as error:
            if is_missing(error):
                return False
            raise translate_error(error) from error
        return True

    def remove(self, key: str) -> None:
        """Delete an object, if it exists."""
        try:
            self._obstore.delete(self._store, key)
        except self._errors as error:
            if not is_missing(error):
                raise translate_error(error) from error

    def read_marker(self) -> bytes | None:
        """Content of the installation marker; None if there is none."""
        try:
            return bytes(self._obstore.get(self._store, MARKER_NAME).bytes())
        except self._errors as error:
            if is_missing(error):
                return None
            raise translate_error(error) from error

    def write_marker(self, content: bytes, *, replace: bool) -> None:
        """Write the installation marker."""
        if not replace and self.read_marker() is not None:
            return
        try:
            if replace or not self._create_marker(content):
                self._obstore.put(self._store, MARKER_NAME, content)
        except self._errors as error:
            raise translate_error(error) from error

    def _create_marker(self, content: bytes) -> bool:
        """Write the marker unless it exists.

        Returns False for a store without conditional writes.
        """
        try:
            self._obstore.put(self._store, MARKER_NAME, content, mode="create")
        except self._errors as error:
            return type(error).__name__ == "AlreadyExistsError"
        return True

    def remove_partial(self) -> None:
        """Do nothing: object stores show no incomplete uploads."""

    def _ranges(self, asset: Asset, start: int, stop: int) -> Iterator[bytes]:
        for at in range(start, stop, _RANGE_BYTES):
            try:
                yield bytes(
                    self._obstore.get_range(
                        self._store, asset.key, start=at, end=min(at + _RANGE_BYTES, stop)
                    )
                )
            except self._errors as error:
                raise translate_error(error) from error
