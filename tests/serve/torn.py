"""`kill -9` at every system call of making a job: before each and after each, one process for every
place.

The process is traced (ptrace); it submits one job with a key and then writes the id that it
received. After each kill the same call is made again by another process, as a client would. No
received id may be lost, and no call may make two jobs. Prints one line of JSON; exits with 1 when
that is not so. Linux only.

    python tests/serve/torn.py [--every 1] [--database URL]
"""

import argparse
import ctypes
import itertools
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from skyloom.serve.queue.database import Database
from skyloom.serve.queue.jobs import JobStore
from skyloom.serve.settings import Settings

TRACE_ME, GO_ON_TO_CALL = 0, 24
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
LIBC.ptrace.restype = ctypes.c_long


def trace(what: int, process: int) -> None:
    """One request of ptrace(2)."""
    if LIBC.ptrace(what, process, None, None) == -1:
        raise OSError(ctypes.get_errno(), "ptrace")


def create(settings: Settings, number: int) -> str:
    """The id of the job of one call."""
    store = JobStore(Database(settings.database), settings)
    return store.submit(
        {"prompt": "x" * 200}, owner="ada", key=f"{number}", fingerprint=f"{number}"
    ).id


def traced(settings: Settings, number: int, output: int) -> None:
    """Open the database, wait to be traced, make a job, and tell of it."""
    store = JobStore(Database(settings.database), settings)
    store.counts()
    trace(TRACE_ME, 0)
    os.kill(os.getpid(), signal.SIGSTOP)
    job = store.submit({"prompt": "x" * 200}, owner="ada", key=f"{number}", fingerprint=f"{number}")
    os.write(output, job.id.encode())


def in_fork(call: Callable[[], object], output: int | None = None) -> int:
    """A child that does the call; with `output` it writes there what came of it."""
    child = os.fork()
    if child == 0:
        try:
            value = call()
            if output is not None:
                os.write(output, json.dumps(value).encode())
            os._exit(0)
        finally:
            os._exit(1)
    return child


def ask_fork(call: Callable[[], object]) -> object:
    """What a call comes to, in a process of its own: this one opens no database, so that its forks
    may."""
    end, output = os.pipe()
    child = in_fork(call, output)
    os.close(output)
    with os.fdopen(end, "rb") as answer:
        text = answer.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return json.loads(text)


def kill_at(settings: Settings, stop: int) -> tuple[str, bool]:
    """Kill a create at its stop of a number; the id that it wrote, and whether it came to that stop
    at all."""
    end, output = os.pipe()
    child = in_fork(lambda: traced(settings, stop, output))
    os.close(output)
    _, status = os.waitpid(child, 0)
    came = 0
    while os.WIFSTOPPED(status):
        if came == stop:
            os.kill(child, signal.SIGKILL)
        else:
            trace(GO_ON_TO_CALL, child)
        _, status = os.waitpid(child, 0)
        came += 1
    with os.fdopen(end, "rb") as answer:
        return answer.read().decode(), os.WIFSIGNALED(status)


def judge(settings: Settings) -> dict[str, object]:
    """All jobs, by key, and damage."""
    database = Database(settings.database)
    page = list(JobStore(database, settings).walk())
    return {"ids": [job.id for job in page], "damage": len(database.check())}


def main() -> None:
    """Every stop of a create, then the judgement."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--every", type=int, default=1, help="a kill at every so many stops (default: at each)"
    )
    parser.add_argument(
        "--database", default=None, help="an empty Postgres (default: SQLite in a temporary folder)"
    )
    options, begun = parser.parse_args(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="skyloom-torn-") as name:
        data, bound = Path(name), 10**6
        settings = Settings(
            data=data, database_url=options.database, max_queued=bound, max_queued_per_owner=bound
        )
        ask_fork(lambda: create(settings, 10**9) and None)
        kills = lost = received_before = 0
        for stop in itertools.count(0, options.every):
            id, killed = kill_at(settings, stop)
            again = ask_fork(lambda number=stop: create(settings, number))
            received_before += bool(id) and killed
            lost += bool(id) and id != again
            if not killed:
                break
            kills += 1
        found = ask_fork(lambda: judge(settings))
    assert isinstance(found, dict)
    doubled = len(found["ids"]) - (kills + 2)  # one came before, and one was not killed
    answer = {
        "kills": kills,
        "received_before_the_kill": received_before,
        "lost": lost,
        "doubled": doubled,
    }
    answer |= {"damage": found["damage"], "seconds": round(time.monotonic() - begun, 1)}
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.exit(1 if lost or doubled or found["damage"] or not kills else 0)


if __name__ == "__main__":
    main()
