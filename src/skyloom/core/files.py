"""Files: SHA-256 digests, atomic writes, detection of media types by the first bytes."""

import contextlib
import errno
import hashlib
import io
import os
import secrets
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY_SUFFIX = ".partial"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
SNIFF_BYTES = 64
"""How many bytes of a file `sniff` needs."""

_SIGNATURES = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF87a": "image/gif",
    b"GIF89a": "image/gif",
    b"BM": "image/bmp",
}
_RIFF_FORMS = {b"WEBP": "image/webp", b"AVI ": "video/avi"}
_EBML = b"\x1a\x45\xdf\xa3"
_QUICKTIME_ATOMS = {b"moov", b"mdat", b"free", b"skip", b"wide"}
_STILL_IMAGE_BRANDS = {b"avi", b"hei", b"hev", b"mif", b"msf"}  # AVIF and HEIF


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file as lower-case hex."""
    with path.open("rb") as file:
        return sha256_stream(file)


def sha256_stream(file: io.BufferedIOBase) -> str:
    """Return the SHA-256 of the rest of an open file as lower-case hex."""
    return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_path(path: Path, *, mode: int = 0o666) -> Generator[Path]:
    """Yield an empty temporary file in the same folder; move it to `path` when the block succeeds.

    The content is on disk (fsync) before the rename. If the block raises, the temporary file is
    deleted and `path` is left as it was. `mode` is reduced by the umask.
    """
    temporary = path.parent / f".skyloom-{secrets.token_hex(6)}{TEMPORARY_SUFFIX}"
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
    try:
        yield temporary
        replace_durably(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_durably(temporary: Path, path: Path) -> None:
    """Rename a finished file of the same folder to `path`, its content on disk (fsync) before."""
    _sync(temporary)
    temporary.replace(path)
    with contextlib.suppress(OSError):  # some network file systems cannot sync a folder
        _sync(path.parent)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read; a crash leaves the old content or the new."""
    with atomic_path(path, mode=0o600) as temporary:
        temporary.write_bytes(content)


def sniff(start: bytes) -> str | None:
    """Return the media type of a picture or video by its first SNIFF_BYTES bytes, or None.

    Brands of ISO media files: "qt  " is video/quicktime, AVIF and HEIF give None, all others are
    video/mp4.
    """
    if start.startswith(b"RIFF"):
        return _RIFF_FORMS.get(start[8:12])
    if start.startswith(_EBML):
        return "video/webm" if b"webm" in start[:SNIFF_BYTES] else "video/x-matroska"
    if start[4:8] == b"ftyp":
        if start[8:11] in _STILL_IMAGE_BRANDS:
            return None
        return "video/quicktime" if start[8:12] == b"qt  " else "video/mp4"
    if start[4:8] in _QUICKTIME_ATOMS:
        return "video/quicktime"
    return next((kind for magic, kind in _SIGNATURES.items() if start.startswith(magic)), None)


def _sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
