"""Small files of tensors, sealed by a digest; a damaged or foreign file counts as missing."""

import contextlib
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from skyloom.core.files import write_atomically

_DIGEST_BYTES = hashlib.sha256().digest_size


def write_tensors(path: Path, identity: bytes, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors atomically, readable by the owner only. Raises OSError.

    The file is a sha256 of its name, `identity` and content, followed by safetensors.
    """
    body = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
    write_atomically(path, _seal(path, identity, body) + body)


def read_tensors(path: Path, identity: bytes) -> dict[str, Tensor] | None:
    """Read tensors; None if the file is missing, damaged or of another name or identity."""
    try:
        content = path.read_bytes()
        seal = content[:_DIGEST_BYTES]
        body = content[_DIGEST_BYTES:]
        return safetensors.torch.load(body) if seal == _seal(path, identity, body) else None
    except (OSError, SafetensorError):
        return None


def remove_least_recently_used(paths: Iterable[Path], max_bytes: int) -> None:
    """Remove files, those with the oldest mtime first, until the rest has at most `max_bytes`."""
    files: list[tuple[float, int, Path]] = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            files.append((status.st_mtime, status.st_size, path))
    total = 0
    for _, size, path in sorted(files, reverse=True):
        total += size
        if total > max_bytes:
            path.unlink(missing_ok=True)


def _seal(path: Path, identity: bytes, body: bytes) -> bytes:
    parts = (identity, path.name.encode(), body)
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()
