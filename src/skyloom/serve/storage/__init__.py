"""Storage of uploaded and generated files: folder or object store, backup, garbage collection."""

from pathlib import Path

from skyloom.serve.storage.assets import Asset, AssetStorage, StoredObject
from skyloom.serve.storage.folder import FolderStorage
from skyloom.serve.storage.object_store import ObjectStorage

__all__ = [
    "Asset",
    "AssetStorage",
    "FolderStorage",
    "ObjectStorage",
    "StoredObject",
    "open_storage",
]


def open_storage(location: str) -> AssetStorage:
    """Open the storage at a folder or URL (s3://, gs://, az://, file://).

    Raises ConfigError for an invalid URL.
    """
    if "://" not in location:
        return FolderStorage(Path(location))
    if location.startswith("file://"):
        return FolderStorage(Path(location.removeprefix("file://")))
    return ObjectStorage(location)
