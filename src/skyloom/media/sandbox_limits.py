"""What a process may still do once it has given up the rest: read what it has open, count, and answer.

Called by the child that decodes other people's files, after its imports and before it looks at the file. Each barrier
stands alone and is left out where the system does not know it; the limits of POSIX are everywhere.
"""

import contextlib
import ctypes
import os
import resource
import signal
import struct
import sys
from pathlib import Path

CPU_SECONDS = 900
_FILES = 64
_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000
_NO_NEW_PRIVILEGES = 38
_LANDLOCK_CREATE, _LANDLOCK_RESTRICT = 444, 446
_EVERY_WAY_TO_A_FILE, _EVERY_WAY_TO_A_PORT = 2**16 - 1, 3
_FIRST_WAYS, _ABI_NETWORK, _ABI_FILES = 2**13 - 1, 4, 5


def confine(memory: int) -> None:
    """Give up files, network, new processes, and more than so many bytes of memory beyond those in use."""
    mapped = _mapped()
    if sys.platform == "linux":
        _leave_network()
        _leave_files()
    limits = {
        "RLIMIT_AS": mapped + memory,
        "RLIMIT_CPU": CPU_SECONDS,
        "RLIMIT_FSIZE": 0,
        "RLIMIT_CORE": 0,
        "RLIMIT_NOFILE": _FILES,
        "RLIMIT_NPROC": 0,
    }
    for name, most in limits.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, name), (most, most))


def work_for(seconds: float) -> None:
    """Be killed by the system unless called again within so many seconds of processor time; 0 calls it off.

    The default action of the alarm ends the process even inside a library that never comes back; and a machine that is
    busy with other things refuses nobody's file for it.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)


def _mapped() -> int:
    """Bytes of address space in use; as good as none where the system does not tell."""
    try:
        return (
            int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
            * resource.getpagesize()
        )
    except OSError:
        return 0


def _leave_network() -> None:
    """Live in a network of its own, without a single interface that is up."""
    unshare = getattr(ctypes.CDLL(None), "unshare", None)
    if unshare is not None and unshare(_NEW_USER | _NEW_NETWORK) != 0:
        unshare(_NEW_NETWORK)


def _leave_files() -> None:
    """Open no file any more (Landlock, Linux 5.13): a set of rules that allows nothing."""
    library = ctypes.CDLL(None)
    version = library.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if version < 1 or library.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) != 0:
        return
    files = _EVERY_WAY_TO_A_FILE if version >= _ABI_FILES else _FIRST_WAYS
    rules = (
        struct.pack("QQ", files, _EVERY_WAY_TO_A_PORT)
        if version >= _ABI_NETWORK
        else struct.pack("Q", files)
    )
    number = library.syscall(_LANDLOCK_CREATE, rules, ctypes.c_size_t(len(rules)), 0)
    if number >= 0:
        library.syscall(_LANDLOCK_RESTRICT, number, 0)
        os.close(number)
