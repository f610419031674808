"""SHA-256 of files, remembered by path, size, mtime and inode in one file of the cache folder."""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from skyloom.core.files import sha256_file, write_atomically
from skyloom.core.paths import cache_folder

HASHES_FILE = "hashes.json"
_SETTLED_NS = 2_000_000_000  # a file changed later than this may change again with the same mtime


def file_identity(stat: os.stat_result) -> list[int]:
    """Return size, mtime in nanoseconds and inode: they tell a replaced or changed file."""
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


class HashCache:
    """SHA-256 of files; `save` keeps the new ones.

    An unreadable file is an empty cache; one that cannot be written is not an error.
    """

    def __init__(self) -> None:
        folder = cache_folder()
        self._path = None if folder is None else folder / HASHES_FILE
        self._rows: dict[str, list[Any]] = {}
        self._changed = False
        with contextlib.suppress(OSError, ValueError):
            rows: Any = {} if self._path is None else json.loads(self._path.read_text())
            self._rows = rows if isinstance(rows, dict) else {}

    def known(self, path: Path) -> str | None:
        """Return the remembered hash of a file that has not changed since, without reading it."""
        row = self._rows.get(str(path.resolve()))
        if not isinstance(row, list) or row[:-1] != file_identity(path.stat()):
            return None
        return row[-1] if isinstance(row[-1], str) else None

    def sha256(self, path: Path, *, trust: bool) -> str:
        """Return the hash of a file, from the cache if `trust` and the file is unchanged."""
        if trust and (known := self.known(path)) is not None:
            return known
        before = path.stat()
        found = sha256_file(path)
        if time.time_ns() - before.st_mtime_ns > _SETTLED_NS:
            self._rows[str(path.resolve())] = [*file_identity(before), found]
            self._changed = True
        return found

    def save(self) -> None:
        """Write new hashes, if the cache folder can be written."""
        if self._path is None or not self._changed:
            return
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, json.dumps(self._rows).encode())
