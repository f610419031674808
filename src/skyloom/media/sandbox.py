"""Decode untrusted media in a sandboxed child process.

The parent sniffs the file, opens it and passes the descriptor. The child (`sandbox_worker.py`,
restricted by `sandbox_limits.py`) has an empty environment, no network, no other files, and limits
of memory and CPU time. It replies with JSON headers followed by raw bytes. The parent validates
every header; nothing is unpickled.
"""

import contextlib
import json
import os
import select
import signal
import stat
import struct
import subprocess
import sys
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skyloom.core.errors import CapacityError, MediaError
from skyloom.core.files import SNIFF_BYTES, sniff
from skyloom.media.sandbox_limits import MAX_HEADER, MAX_PICTURE_BYTES, MAX_VIDEO_BYTES

REPLY_TIMEOUT = 60.0  # wall-clock seconds; the child has a timeout of 10 seconds of CPU time
_TIMEOUT_SIGNALS = (signal.SIGPROF, signal.SIGXCPU)
_CHILD_CODE = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1])\n"
    "from skyloom.media.sandbox_worker import main\n"
    "main(sys.argv[2], sys.argv[3], int(sys.argv[4]))"
)
_PILLOW_FORMATS = {
    "image/png": "PNG",
    "image/jpeg": "JPEG",
    "image/webp": "WEBP",
    "image/gif": "GIF",
    "image/bmp": "BMP",
}
_DEMUXERS = {
    "video/mp4": "mov",
    "video/quicktime": "mov",
    "video/webm": "matroska",
    "video/x-matroska": "matroska",
    "image/gif": "gif",
}
_HINTS = {
    "picture": "Use a PNG, JPEG, WebP, GIF or BMP file.",
    "video": "Use an mp4, mov, webm, mkv or gif that plays.",
}
_ERRORS: Mapping[str, tuple[str, str]] = {
    "no video": ("cannot be read as a video: it has no video stream.", "Choose another file."),
    "codec": (
        "cannot be read as a video: its codec is not supported.",
        "Convert it to mp4 (H.264).",
    ),
    "sound": (
        "has sound of a codec, rate or layout that is not supported or changes midway.",
        "Convert it to mp4 (H.264 and AAC).",
    ),
    "too large": ("is {width}x{height}, more than {maximum} million pixels.", "Make it smaller."),
    "too many streams": (
        "has more than {maximum} streams.",
        "Keep only its first video and audio stream.",
    ),
    "too many frames": ("has more than {maximum} frames.", "Cut it."),
    "too long": ("is longer than {hours} hours.", "Cut it."),
    "slow": ("takes more than a minute to index.", "Cut it, or convert it to mp4."),
    "sizes": ("changes its frame size midway.", "Convert it to one size."),
    "damaged": (
        "is damaged near {seconds:.2f} s.",
        "Cut that part out, or convert it again from its original.",
    ),
    "bomb": (
        "has {bytes} bytes but would decode to {frames} frames of {width}x{height}.",
        "Cut it or make it smaller.",
    ),
    "memory": (
        "needs more memory to decode than is allowed.",
        "Convert it to mp4 (H.264), or make it smaller.",
    ),
    "time": (
        "cannot be read: the decoder made no progress in 10 seconds.",
        "Convert it to mp4 (H.264).",
    ),
    "crash": (
        "cannot be read: the decoder crashed.",
        "Choose another file, or convert it to mp4 (H.264).",
    ),
}


class DecoderError(Exception):
    """Raised in the child: a code of `_ERRORS` and the numbers for its message."""

    def __init__(self, code: str, **values: float) -> None:
        super().__init__(code)
        self.code = code
        self.values = values


@dataclass(frozen=True)
class OpenedFile:
    """An open media file: kind ("picture" or "video"), decoder format, size in bytes, identity.

    `identity` is device, inode, size and modification time.
    """

    path: Path
    kind: str
    format_name: str
    size: int
    identity: tuple[int, ...]


def is_picture(path: Path) -> bool:
    """Return whether a file starts like a still picture. Raises MediaError if it is unreadable."""
    try:
        with path.open("rb") as file:
            media_type = sniff(file.read(SNIFF_BYTES))
    except OSError as error:
        raise MediaError(
            f"{path} cannot be read ({error.strerror}).", hint="Check the path."
        ) from error
    return media_type in _PILLOW_FORMATS and media_type not in _DEMUXERS


def media_error(
    path: Path, kind: str, code: str, values: Mapping[str, Any] | None = None
) -> MediaError:
    """Return the error for a code of the child; only numbers of `values` enter the message."""
    generic = MediaError(f"{path} cannot be read as a {kind}.", hint=_HINTS[kind])
    if code not in _ERRORS:
        return generic
    template, hint = _ERRORS[code]
    numbers = {name: one for name, one in (values or {}).items() if isinstance(one, int | float)}
    with contextlib.suppress(KeyError, ValueError):
        return MediaError(f"{path} {template.format(**numbers)}", hint=hint)
    return generic


class Sandbox:
    """A child process that decodes one file: `send` a command, `receive` its messages.

    A child that crashes or sends an invalid message raises MediaError.
    """

    def __init__(self, path: Path, kind: str, *, same: OpenedFile | None = None) -> None:
        """Start the child; `same` is an earlier opening of this file, to detect changes."""
        descriptor, self.opened = _open(path, kind)
        try:
            if same is not None and self.opened.identity != same.identity:
                raise MediaError(f"{path} was changed while it was read.", hint="Start again.")
            self._process = _start(self.opened, descriptor)
        finally:
            os.close(descriptor)
        self._close = weakref.finalize(self, _stop, self._process)

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    def close(self) -> None:
        """Kill the child."""
        self._close()

    def send(self, command: Mapping[str, Any]) -> None:
        """Send a command. If the child has exited, the next `receive` reports it."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):  # the child exited, or was closed
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()

    def receive(self, max_bytes: int) -> tuple[dict[str, Any], bytearray] | None:
        """Return the next message; None if the child exited (idle) before it read the command.

        Raises MediaError for an error code, a crash, a limit, 10 seconds of CPU time without
        progress, or an invalid message.
        """
        while True:
            length = self._read(4, may_end=True) if self._close.alive else None
            if length is None:
                return None
            (size,) = struct.unpack(">I", length)
            if not 0 < size <= MAX_HEADER:
                raise self.fail("crash")
            header = self._parse(self._read(size))
            if "error" in header:
                raise self.fail(str(header["error"]), header)
            if "progress" not in header:
                break
        count = header.get("bytes")
        if not isinstance(count, int) or not 0 <= count <= max_bytes:
            raise self.fail("crash")
        return header, self._read(count) or bytearray()

    def _parse(self, text: bytearray | None) -> dict[str, Any]:
        try:
            header = json.loads(text or b"")
        except (ValueError, RecursionError):
            header = None
        if not isinstance(header, dict):
            raise self.fail("crash")
        return header

    def _read(self, count: int, *, may_end: bool = False) -> bytearray | None:
        """Read exactly `count` bytes; None at the end of the stream if `may_end`."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        buffer = bytearray(count)
        view = memoryview(buffer)
        filled = 0
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        while filled < count:
            if not poll.poll(1000 * REPLY_TIMEOUT):
                raise self.fail("time")
            read = os.readv(descriptor, [view[filled:]])
            if not read:
                code = self._exit_code()
                if may_end and not filled and code == 0:
                    return None
                raise self.fail("time" if -code in _TIMEOUT_SIGNALS else "crash")
            filled += read
        return buffer

    def _exit_code(self) -> int:
        """Wait for a child that closed its output."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(REPLY_TIMEOUT)
        return -signal.SIGPROF

    def fail(self, code: str, values: Mapping[str, Any] | None = None) -> MediaError:
        """Kill the child and return the error to raise."""
        self.close()
        return media_error(self.opened.path, self.opened.kind, code, values)


def _open(path: Path, kind: str) -> tuple[int, OpenedFile]:
    """Open a regular file of a supported format."""
    try:
        # O_NONBLOCK: a named pipe would wait for a writer
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise MediaError(f"The {kind} {path} does not exist.", hint="Check the path.") from error
    except (OSError, ValueError) as error:
        raise media_error(path, kind, "unreadable") from error
    try:
        return descriptor, _inspect(descriptor, path, kind)
    except BaseException:
        os.close(descriptor)
        raise


def _inspect(descriptor: int, path: Path, kind: str) -> OpenedFile:
    """Check type, format and size of an open file."""
    status = os.fstat(descriptor)
    formats = _PILLOW_FORMATS if kind == "picture" else _DEMUXERS
    max_bytes = MAX_PICTURE_BYTES if kind == "picture" else MAX_VIDEO_BYTES
    if not stat.S_ISREG(status.st_mode):
        raise media_error(path, kind, "unreadable")
    format_name = formats.get(sniff(os.pread(descriptor, SNIFF_BYTES, 0)) or "")
    if format_name is None:
        raise media_error(path, kind, "unreadable")
    if status.st_size > max_bytes:
        raise MediaError(f"{path} is larger than {max_bytes >> 20} MiB.", hint="Make it smaller.")
    identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    return OpenedFile(path, kind, format_name, status.st_size, identity)


def _start(opened: OpenedFile, descriptor: int) -> "subprocess.Popen[bytes]":
    """Start a fresh interpreter (no fork of this process) with an empty environment."""
    paths = [str(Path(__file__).parents[2]), *(one for one in sys.path if Path(one).is_absolute())]
    arguments = [_CHILD_CODE, json.dumps(paths), opened.kind, opened.format_name, str(descriptor)]
    environment = {"OPENBLAS_NUM_THREADS": "1"}
    if library_path := os.environ.get("LD_LIBRARY_PATH"):
        environment["LD_LIBRARY_PATH"] = library_path
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=(descriptor,),
            env=environment,
            cwd="/",
            start_new_session=True,
        )
    except OSError as error:
        raise CapacityError(
            "The process that decodes media could not be started.", hint="Close other programs."
        ) from error


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Kill the child and close its pipes."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
