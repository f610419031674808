"""Workers as children of the server: one for each device, started again when they die, stopped with the server.

A child's death costs the server nothing: what it held goes back to the queue at once. The child ends by itself when
the server is gone, because its standard input ends then.
"""

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sqlalchemy.exc import SQLAlchemyError

from skyloom.core.errors import SkyloomError
from skyloom.serve.queue.leases import Leases
from skyloom.serve.settings import Settings

STOP_SECONDS = 10.0
_CALM = 60.0  # seconds after which a child's death is no longer taken for a loop
_LONGEST_WAIT = 30.0
_TOLD = (  # the numbers that a worker needs
    *("lease_seconds", "heartbeat_seconds", "max_attempts", "disk_reserve", "keep_seconds"),
    *("stall_seconds", "load_seconds", "cancel_seconds", "max_attempt_seconds", "max_job_seconds"),
)
_PROGRAM = "from skyloom.cli.app import main; main()"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Health:
    """How many children there should be, are, and were started again."""

    wanted: int
    alive: int
    restarts: int


class Supervisor:
    """Keeps a worker process for every device."""

    def __init__(self, leases: Leases, settings: Settings, devices: Sequence[str]) -> None:
        environment = worker_environment(settings)
        self._children = [
            Child(worker_command(device), environment, leases.requeue_worker_jobs)
            for device in devices
        ]

    def start(self) -> "Supervisor":
        """Start all."""
        for child in self._children:
            child.start()
        return self

    def health(self) -> Health:
        """How the children are."""
        alive = sum(child.alive for child in self._children)
        return Health(len(self._children), alive, sum(child.restarts for child in self._children))

    def drain(self) -> None:
        """Let all give back their jobs and end; waits for nobody."""
        for child in self._children:
            child.ask_to_stop()

    def kill(self) -> None:
        """End all now; what they held goes back to the queue."""
        for child in self._children:
            child.kill()

    def stop(self) -> None:
        """Drain, and wait for the end of all; who has not ended ten seconds after being asked is killed."""
        self.drain()
        for child in self._children:
            child.join()


def worker_command(device: str) -> list[str]:
    """How a worker is started. Where database and storage are is not told here: other users can read this."""
    return [sys.executable, "-c", _PROGRAM, "worker", "--attached", "--device", device]


def worker_environment(settings: Settings) -> dict[str, str]:
    """The environment of a worker: ours, and every setting that it needs."""
    return {**os.environ, **settings_environment(settings)}


def settings_environment(settings: Settings) -> dict[str, str]:
    """The variables that tell a worker every setting that it needs."""
    places = {
        "data": str(settings.data.absolute()),
        "database_url": settings.database,
        "storage_url": settings.storage,
        "log_prompts": "true" if settings.log_prompts else "false",
    }
    told = {
        **{name: repr(value) for name in _TOLD if (value := getattr(settings, name)) is not None},
        **places,
    }
    return {f"SKYLOOM_{name.upper()}": value for name, value in told.items()}


class Child:
    """One worker process and the thread that watches it. `forget` is told the name of each worker that died."""

    def __init__(
        self, command: Sequence[str], environment: dict[str, str], forget: Callable[[str], object]
    ) -> None:
        self.restarts = 0
        self.name: str | None = None
        self._command, self._environment, self._forget = list(command), environment, forget
        self._process: subprocess.Popen[bytes] | None = None
        self._over, self._until = threading.Event(), 0.0
        self._thread = threading.Thread(target=self._watch, name="worker watch", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """The number of the process that runs, or ran last."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start watching; the process follows."""
        self._thread.start()

    def ask_to_stop(self) -> None:
        """Tell it to drain; once, since the second time would mean now."""
        if self._over.is_set():
            return
        self._until = time.monotonic() + STOP_SECONDS
        self._over.set()
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def kill(self) -> None:
        """End it now."""
        self._over.set()
        if self._process is not None:
            self._process.kill()

    def join(self) -> None:
        """Wait for its end, until ten seconds after it was asked."""
        self._thread.join(max(0.0, self._until - time.monotonic()))
        if self._thread.is_alive():
            self.kill()
        self._thread.join()

    def _watch(self) -> None:
        wait = 0.5
        while not self._over.is_set():
            begun = time.monotonic()
            self.name = name = f"{os.uname().nodename}-{os.getpid()}-{time.monotonic_ns():x}"
            code = self._run_once(name)
            self._bury(name)
            if self._over.is_set():
                return
            wait = 0.5 if time.monotonic() - begun > _CALM else min(wait * 2, _LONGEST_WAIT)
            log.warning(
                "a worker died and is started again",
                extra={"code": code, "worker": name, "seconds": wait},
            )
            self.restarts += 1
            self._over.wait(wait)

    def _run_once(self, name: str) -> int:
        """Start the process and wait for its end; how it ended, or the number of what kept it from starting."""
        try:
            self._process = subprocess.Popen(
                [*self._command, "--name", name], env=self._environment, stdin=subprocess.PIPE
            )
        except OSError as error:  # no memory, or too many processes: it may be there again
            return error.errno or 1
        if self._over.is_set():  # told to stop between the look and the start
            self._process.terminate()
        code = self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        return code

    def _bury(self, name: str) -> None:
        """Its jobs need not wait until their leases run out."""
        try:
            self._forget(name)
        except (SQLAlchemyError, SkyloomError) as error:
            log.warning("the database does not answer", extra={"cause": type(error).__name__})
