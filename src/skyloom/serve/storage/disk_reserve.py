"""The disk reserve: bytes that stay free on the disk of the data folder, whatever clients send."""

import shutil
from pathlib import Path

from skyloom.core.errors import DiskFullError


class DiskReserve:
    """Refuses what would leave less than `reserve` bytes free on the disk of `folder`."""

    def __init__(self, folder: Path, reserve: int) -> None:
        self._folder, self._reserve = folder.absolute(), reserve

    def holds(self, more: int = 0) -> bool:
        """Whether the reserve stays free after `more` bytes."""
        return shutil.disk_usage(self._existing()).free - more >= self._reserve

    def check(self, more: int = 0) -> None:
        """Raise DiskFullError where `more` bytes would go into the reserve."""
        if not self.holds(more):
            raise DiskFullError(
                "The disk is nearly full: nothing is stored.",
                hint="Free some space, then try again.",
            )

    def _existing(self) -> Path:
        """The folder, or the nearest one above it that exists."""
        return next(path for path in (self._folder, *self._folder.parents) if path.exists())
