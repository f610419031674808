"""Limits of the sandboxed decoder: maximum sizes of media, and restrictions of the child process.

`confine` is called by the child after its imports and before it reads the file. Each barrier is
skipped on systems that do not support it; the POSIX limits apply everywhere.
"""

import contextlib
import ctypes
import os
import resource
import signal
import struct
import sys
from pathlib import Path

CHANNELS = 3  # decoded frames are uint8 RGB
MAX_VIDEO_BYTES = 64 * 2**30
MAX_PICTURE_BYTES = 2**28
MAX_PICTURE_PIXELS = 64_000_000
MAX_VIDEO_PIXELS = 16_000_000
MAX_SIDE = 2**14
MAX_FRAMES = 2_000_000
MAX_SECONDS = 24 * 3600
MAX_STREAMS = 32
MAX_COMMENT = 2**20
MAX_PACKET = 2**24
MAX_HEADER = 2**12
PICTURE_MEMORY = 2**30  # 64 million pixels three times
VIDEO_MEMORY = 400 * 2**20  # twenty frames of 4K

_CPU_SECONDS = 900
_OPEN_FILES = 64
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000
_PR_SET_NO_NEW_PRIVS = 38
_LANDLOCK_CREATE_RULESET = 444
_LANDLOCK_RESTRICT_SELF = 446
_LANDLOCK_ALL_FILE_RIGHTS = 2**16 - 1
_LANDLOCK_FILE_RIGHTS_ABI_1 = 2**13 - 1
_LANDLOCK_ALL_NETWORK_RIGHTS = 3
_LANDLOCK_ABI_NETWORK = 4
_LANDLOCK_ABI_ALL_FILE_RIGHTS = 5


def confine(memory: int) -> None:
    """Drop access to files, network and new processes; allow `memory` more bytes than now."""
    address_space = _address_space()
    if sys.platform == "linux":
        _drop_network()
        _drop_files()
    limits = {
        "RLIMIT_AS": address_space + memory,
        "RLIMIT_CPU": _CPU_SECONDS,
        "RLIMIT_FSIZE": 0,
        "RLIMIT_CORE": 0,
        "RLIMIT_NOFILE": _OPEN_FILES,
        "RLIMIT_NPROC": 0,
    }
    for name, limit in limits.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, name), (limit, limit))


def set_cpu_timeout(seconds: float) -> None:
    """Kill this process after `seconds` of CPU time unless called again; 0 disables the timeout.

    The default action of SIGPROF ends the process even inside a C library. CPU time does not pass
    while other processes keep the machine busy.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)


def _address_space() -> int:
    """Return the bytes of address space in use, 0 if the system does not report it."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[0]
    except OSError:
        return 0
    return int(pages) * resource.getpagesize()


def _drop_network() -> None:
    """Move to a new network namespace without interfaces."""
    unshare = getattr(ctypes.CDLL(None), "unshare", None)
    if unshare is not None and unshare(_CLONE_NEWUSER | _CLONE_NEWNET) != 0:
        unshare(_CLONE_NEWNET)


def _drop_files() -> None:
    """Forbid opening files by an empty Landlock rule set (Linux 5.13 or later)."""
    libc = ctypes.CDLL(None)
    abi = libc.syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if abi < 1 or libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return
    files = _LANDLOCK_FILE_RIGHTS_ABI_1
    if abi >= _LANDLOCK_ABI_ALL_FILE_RIGHTS:
        files = _LANDLOCK_ALL_FILE_RIGHTS
    attributes = struct.pack("Q", files)
    if abi >= _LANDLOCK_ABI_NETWORK:
        attributes = struct.pack("QQ", files, _LANDLOCK_ALL_NETWORK_RIGHTS)
    size = ctypes.c_size_t(len(attributes))
    descriptor = libc.syscall(_LANDLOCK_CREATE_RULESET, attributes, size, 0)
    if descriptor >= 0:
        libc.syscall(_LANDLOCK_RESTRICT_SELF, descriptor, 0)
        os.close(descriptor)
