"""Other people's files are decoded by a child process that can do nothing else, and may die of it.

The parent looks at the first bytes, opens the file, and hands it on; the child (`decoder.py`, limits in `confine.py`)
has an empty environment, no network, no other files, and limits of memory and time. It answers with small JSON headers
that announce raw bytes. The parent checks every header against what it asked for; nothing is ever unpickled.
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

MAX_BYTES = 64 * 2**30
MAX_PICTURE_BYTES = 2**28
MAX_HEADER = 2**12
PATIENCE = 60.0  # seconds by the clock; the child itself has ten of processor time
_KILLED_FOR_TIME = (signal.SIGPROF, signal.SIGXCPU)
_BOOT = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1])\n"
    "from skyloom.media.sandbox_worker import main; main(sys.argv[2], sys.argv[3], int(sys.argv[4]))"
)
_SNIFFED = 16
_VIDEO_HINT = "Use an mp4, mov, webm, mkv or gif that plays."
_PICTURE_HINT = "Use a PNG, JPEG, WebP, GIF or BMP file."
_REFUSALS: Mapping[str, tuple[str, str]] = {
    "no pictures": ("cannot be read as a video: it holds no pictures.", "Choose another."),
    "codec": (
        "cannot be read as a video: its codec is not one that skyloom reads.",
        "Convert it to mp4 (H.264).",
    ),
    "too large": ("is {width}x{height}, more than {most} million pixels.", "Make it smaller."),
    "too many streams": ("has more than {most} streams.", "Keep its first picture and sound."),
    "too many frames": ("has more than {most} frames.", "Cut it."),
    "too long": ("says it is longer than {hours} hours.", "Cut it."),
    "slow": ("takes more than a minute to look through.", "Cut it, or convert it to mp4."),
    "sizes": ("changes its size midway.", "Convert it to one size."),
    "damaged": (
        "is damaged near {seconds:.2f} s.",
        "Cut that part out, or convert it again from its original.",
    ),
    "bomb": (
        "is {bytes} bytes and would be {frames} frames of {width}x{height}.",
        "Cut it or make it smaller.",
    ),
    "memory": (
        "needs more memory to be read than skyloom grants.",
        "Convert it to mp4 (H.264), or make it smaller.",
    ),
    "time": (
        "cannot be read: nothing came of it in 10 seconds of work.",
        "Convert it to mp4 (H.264).",
    ),
    "crash": (
        "cannot be read: it broke the decoder.",
        "Choose another file, or convert it to mp4 (H.264).",
    ),
}


class RefusedError(Exception):
    """Raised in the child: a word for which the parent has a sentence, and numbers that belong in it."""

    def __init__(self, word: str, **values: float) -> None:
        super().__init__(word)
        self.word, self.values = word, values


@dataclass(frozen=True)
class Opened:
    """An open file of somebody's: what its first bytes say it is, and how to know it again."""

    path: Path
    kind: str
    format_name: str
    size: int
    identity: tuple[int, ...]


def is_picture(path: Path) -> bool:
    """Whether a file begins like a picture that does not move. Raises MediaError for one that cannot be opened."""
    try:
        with path.open("rb") as file:
            start = file.read(_SNIFFED)
    except OSError as error:
        raise MediaError(
            f"{path} cannot be read ({error.strerror}).", hint="Check the path."
        ) from error
    return _name(start, "video") is None and _name(start, "picture") is not None


def refuse(path: Path, kind: str, word: str, values: Mapping[str, Any] | None = None) -> MediaError:
    """The one sentence for a refusal. Numbers in it are numbers, whoever said them."""
    noun, hint = ("picture", _PICTURE_HINT) if kind == "picture" else ("video", _VIDEO_HINT)
    if word not in _REFUSALS:
        return MediaError(f"{path} cannot be read as a {noun}.", hint=hint)
    sentence, hint = _REFUSALS[word]
    numbers = {
        key: value for key, value in (values or {}).items() if isinstance(value, int | float)
    }
    with contextlib.suppress(KeyError, ValueError):
        return MediaError(f"{path} {sentence.format(**numbers)}", hint=hint)
    return MediaError(f"{path} cannot be read as a {noun}.", hint=hint)


class Sandbox:
    """A child that decodes one file. `ask` it, and `take` its messages; one that died or lies raises MediaError."""

    def __init__(self, path: Path, kind: str, *, same: Opened | None = None) -> None:
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
        """The child's number."""
        return self._process.pid

    def close(self) -> None:
        """End the child."""
        self._close()

    def ask(self, question: Mapping[str, Any]) -> None:
        """Send a question. A child that has gone home does not hear it, which the first `take` tells."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):  # gone home, or closed
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()

    def take(self, most: int) -> tuple[dict[str, Any], bytearray] | None:
        """The next message with at most so many bytes; none when the child went home before it heard the question.

        Raises MediaError for a refusal, a crash, a limit, ten seconds of work without progress, or a message that is
        not as agreed.
        """
        while True:
            length = self._read(4, may_end=True) if self._close.alive else None
            if length is None:
                return None
            (size,) = struct.unpack(">I", length)
            if not 0 < size <= MAX_HEADER:
                raise self.fail("crash")
            header = self._parse(self._read(size))
            if "refused" in header:
                raise self.fail(str(header["refused"]), header)
            if "progress" not in header:
                break
        count = header.get("bytes")
        if not isinstance(count, int) or not 0 <= count <= most:
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
        """Exactly so many bytes; none at an end that is allowed."""
        assert self._process.stdout is not None
        descriptor, buffer, filled = self._process.stdout.fileno(), bytearray(count), 0
        view, waiting = memoryview(buffer), select.poll()
        waiting.register(descriptor, select.POLLIN)
        while filled < count:
            if not waiting.poll(1000 * PATIENCE):
                raise self.fail("time")
            read = os.readv(descriptor, [view[filled:]])
            if not read:
                code = self._end()
                if may_end and not filled and code == 0:
                    return None
                raise self.fail("time" if -code in _KILLED_FOR_TIME else "crash")
            filled += read
        return buffer

    def _end(self) -> int:
        """How the child ended that has closed its side."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(PATIENCE)
        return -signal.SIGPROF

    def fail(self, word: str, values: Mapping[str, Any] | None = None) -> MediaError:
        """End the child, and the error to raise."""
        self.close()
        return refuse(self.opened.path, self.opened.kind, word, values)


def _open(path: Path, kind: str) -> tuple[int, Opened]:
    """A regular file of a known kind, open for reading."""
    noun = "picture" if kind == "picture" else "video"
    try:
        descriptor = os.open(
            path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
        )  # a named pipe would wait for a writer
    except FileNotFoundError as error:
        raise MediaError(f"The {noun} {path} does not exist.", hint="Check the path.") from error
    except (OSError, ValueError) as error:
        raise refuse(path, kind, "unreadable") from error
    try:
        about = os.fstat(descriptor)
        name = (
            _name(os.pread(descriptor, _SNIFFED, 0), kind) if stat.S_ISREG(about.st_mode) else None
        )
        if name is None:
            raise refuse(path, kind, "unreadable")
        if about.st_size > (most := MAX_PICTURE_BYTES if kind == "picture" else MAX_BYTES):
            raise MediaError(f"{path} is larger than {most >> 20} MiB.", hint="Make it smaller.")
    except BaseException:
        os.close(descriptor)
        raise
    identity = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)
    return descriptor, Opened(path, kind, name, about.st_size, identity)


def _name(start: bytes, kind: str) -> str | None:
    """The format that a file begins like; none if it is not one of the few that are read."""
    if kind == "picture":
        if start.startswith(b"RIFF") and start[8:12] == b"WEBP":
            return "WEBP"
        known = {b"\x89PNG\r\n\x1a\n": "PNG", b"\xff\xd8\xff": "JPEG", b"GIF8": "GIF", b"BM": "BMP"}
    else:
        if start[4:8] in {b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide"}:
            return "mov"
        known = {b"\x1a\x45\xdf\xa3": "matroska", b"GIF8": "gif"}
    return next((name for magic, name in known.items() if start.startswith(magic)), None)


def _start(opened: Opened, descriptor: int) -> "subprocess.Popen[bytes]":
    """A fresh interpreter with nothing of ours but the way to its modules; it is not forked from our memory."""
    ways = [str(Path(__file__).parents[2]), *(way for way in sys.path if Path(way).is_absolute())]
    arguments = [_BOOT, json.dumps(ways), opened.kind, opened.format_name, str(descriptor)]
    library_path = os.environ.get("LD_LIBRARY_PATH")
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=(descriptor,),
            env={"OPENBLAS_NUM_THREADS": "1"}
            | ({"LD_LIBRARY_PATH": library_path} if library_path else {}),
            cwd="/",
            start_new_session=True,
        )
    except OSError as error:
        raise CapacityError(
            "No process could be started to read a file.", hint="Close something."
        ) from error


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Kill the child, if it lives, and forget it."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
