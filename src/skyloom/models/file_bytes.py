"""Byte ranges of weight files, mapped or copied, and the description of tensors in them."""

import json
import mmap
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Literal

import torch
from jaxtyping import UInt8
from torch import Tensor

from skyloom.core.errors import CheckpointError

ReadMode = Literal["auto", "mmap", "copy"]
FETCH_AGAIN = "Fetch or copy the file again."
MAX_NAME = 512
"""Longest name of a tensor, in characters."""

_OWN_PAGES = 2**20
_MOUNTS = Path("/proc/self/mounts")
_SLOW_TO_MAP = ("nfs", "cifs", "smb", "9p", "drvfs", "fuse", "ceph", "lustre", "glusterfs", "afs")
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named since Python 3.12
_MOUNT_FIELDS = 3
_SHOWN = 80


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in its file: bytes `start` to `stop`; dtype: as the format names it."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """Tensors of a file by name, and its metadata."""

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, Any]


class FileBytes:
    """Reads byte ranges of one open file. Raises CheckpointError for what cannot be read."""

    def __init__(self, path: Path, mode: ReadMode) -> None:
        self.path = path
        try:
            if not path.is_file():
                raise CheckpointError(f"{path} must be an existing file.")
            self._file = path.open("rb", buffering=0)
            self.size = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise self._unreadable(error) from error
        self._lock = Lock()
        self._map: Tensor | None = None
        if self.size and (mode == "mmap" or (mode == "auto" and maps_well(path))):
            self._map = self._mapped()

    def __enter__(self) -> "FileBytes":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file; tensors that were read stay valid."""
        self._map = None
        self._file.close()

    def read(self, start: int, stop: int) -> UInt8[Tensor, " n"]:
        """Read bytes: a view of the mapped file, whose pages are copied when written, or a copy."""
        if self._map is None:
            return self.copy(start, stop)
        self._check(start, stop)
        return self._map[start:stop]

    def copy(self, start: int, stop: int) -> UInt8[Tensor, " n"]:
        """Read bytes into memory of their own.

        Large ranges get pages of their own, which return to the system with the tensor; malloc
        would keep them, and the peak of loading would be twice the weights.
        """
        self._check(start, stop)
        size = stop - start
        if size == 0:
            return torch.empty(0, dtype=torch.uint8)
        buffer = _own_pages(size) if size >= _OWN_PAGES else bytearray(size)
        rest = memoryview(buffer)
        try:
            with self._lock:
                self._file.seek(start)
                while rest.nbytes:
                    count = self._file.readinto(rest)
                    if not count:
                        raise self.damaged("it ends early")
                    rest = rest[count:]
        except OSError as error:
            raise self._unreadable(error) from error
        return torch.frombuffer(buffer, dtype=torch.uint8)

    def _check(self, start: int, stop: int) -> None:
        if os.fstat(self._file.fileno()).st_size != self.size:
            raise self.damaged("it changed while it was read")
        if not 0 <= start <= stop <= self.size:
            raise self.damaged(f"bytes {start} to {stop} lie outside its {self.size} bytes")

    def head(self, start: int, stop: int) -> bytes:
        """Read bytes of a header."""
        return self.copy(start, stop).numpy().tobytes()

    def damaged(self, cause: str) -> CheckpointError:
        """Return the error for a file with wrong content."""
        return CheckpointError(f"{self.path} is damaged: {cause}.", hint=FETCH_AGAIN)

    def _mapped(self) -> Tensor:
        """Map the file privately: a write would copy the page and never reach the file."""
        try:
            if sys.platform == "win32":
                mapped = mmap.mmap(self._file.fileno(), self.size, access=mmap.ACCESS_COPY)
            else:
                mapped = mmap.mmap(
                    self._file.fileno(),
                    self.size,
                    flags=mmap.MAP_PRIVATE | (_MAP_NORESERVE if sys.platform == "linux" else 0),
                    prot=mmap.PROT_READ | mmap.PROT_WRITE,
                )
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from error
        return torch.frombuffer(mapped, dtype=torch.uint8)

    def _unreadable(self, error: Exception) -> CheckpointError:
        return CheckpointError(f"{self.path} cannot be read ({error}).", hint=FETCH_AGAIN)


def _own_pages(size: int) -> mmap.mmap:
    """Allocate private zeroed pages outside of malloc's heap."""
    if sys.platform == "win32":
        return mmap.mmap(-1, size)
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def maps_well(path: Path) -> bool:
    """Whether mapping is fast where a file lies: not on Windows, network drives and WSL's /mnt.

    Without a list of mounts (macOS), it is taken to be.
    """
    if sys.platform == "win32":
        return False
    try:
        table = _MOUNTS.read_text(errors="replace")
    except OSError:
        return True
    target = path.resolve()
    mounts = [line.split() for line in table.splitlines()]
    kinds = {
        Path(fields[1].replace("\\040", " ")): fields[2]
        for fields in mounts
        if len(fields) >= _MOUNT_FIELDS
    }
    found = next((kinds[parent] for parent in target.parents if parent in kinds), "")
    return not found.startswith(_SLOW_TO_MAP)


def shown(name: object) -> str:
    """Return a name from a file in quotes, on one line, cut to a readable length."""
    text = json.dumps(str(name))
    return text if len(text) <= _SHOWN else f'{text[: _SHOWN - 4]}..."'


def check_ranges(file: FileBytes, tensors: Mapping[str, StoredTensor]) -> None:
    """Raise CheckpointError if a tensor lies outside the file or two tensors overlap."""
    end = 0
    before = ""
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.stop > file.size:
            raise file.damaged(
                f"it has {file.size} bytes, and its tensor {shown(name)} ends at byte {tensor.stop}"
            )
        if tensor.start < end:
            raise file.damaged(f"its tensors {shown(before)} and {shown(name)} overlap")
        end = tensor.stop
        before = name
