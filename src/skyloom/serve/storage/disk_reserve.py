"""Disk reserve: space that stays free on the disk of the data folder."""

import shutil
from pathlib import Path

from skyloom.core.errors import DiskFullError


class DiskReserve:
    """Refuses writes that would leave less than `reserve` bytes free on the disk of `folder`."""

    def __init__(self, folder: Path, reserve: int) -> None:
        self._folder = folder.absolute()
        self._reserve = reserve

    def holds(self, more: int = 0) -> bool:
        """Whether the reserve stays free after `more` bytes are written."""
        return shutil.disk_usage(self._existing_folder()).free - more >= self._reserve

    def check(self, more: int = 0) -> None:
        """Raise DiskFullError if writing `more` bytes would use the reserve."""
        if not self.holds(more):
            raise DiskFullError(
                "The disk is nearly full: nothing is stored.",
                hint="Free some space, then try again.",
            )

    def _existing_folder(self) -> Path:
        """The folder, or its nearest parent that exists."""
        return next(path for path in (self._folder, *self._folder.parents) if path.exists())
