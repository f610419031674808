"""Supervise worker processes: one per device, restarted after a crash, stopped with the server.

A worker runs with `--attached`: it drains when its standard input closes, so it also ends when the
server is killed. The jobs of a dead worker return to the queue without waiting for their leases.
"""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from sqlalchemy.exc import SQLAlchemyError

from skyloom.core.errors import SkyloomError
from skyloom.serve.health import WorkerHealth
from skyloom.serve.queue.leases import Leases
from skyloom.serve.settings import Settings

STOP_SECONDS = 10.0  # time to drain after SIGTERM, before SIGKILL
_STABLE_SECONDS = 60.0  # a process that ran this long resets the restart delay
_MIN_RESTART_SECONDS = 0.5
_MAX_RESTART_SECONDS = 30.0
_WORKER_NUMBERS = (
    "lease_seconds",
    "heartbeat_seconds",
    "max_attempts",
    "disk_reserve",
    "keep_seconds",
    "stall_seconds",
    "load_seconds",
    "cancel_seconds",
    "max_attempt_seconds",
    "max_job_seconds",
    "worker_memory_bytes",
)
_WORKER_TABLES = ("models", "loras")
_FORWARDED = ("SKYLOOM_", "AWS_", "AZURE_", "GOOGLE_", "PG")  # prefixes of variables
_PROGRAM = "from skyloom.cli.app import main; main()"

log = logging.getLogger(__name__)


class WorkerSupervisor:
    """Keep one worker process running per device."""

    def __init__(self, leases: Leases, settings: Settings, devices: Sequence[str]) -> None:
        environment = worker_environment(settings)
        self._processes = [
            WorkerProcess(worker_command(device), environment, on_exit=leases.requeue_worker_jobs)
            for device in devices
        ]

    def start(self) -> "WorkerSupervisor":
        """Start all processes."""
        for process in self._processes:
            process.start()
        return self

    def health(self) -> WorkerHealth:
        """Count the processes that are expected, alive and restarted."""
        return WorkerHealth(
            expected=len(self._processes),
            alive=sum(process.alive for process in self._processes),
            restarts=sum(process.restarts for process in self._processes),
            names=tuple(process.name or "" for process in self._processes),
        )

    def drain(self) -> None:
        """Send SIGTERM to all processes: each returns its job to the queue and exits."""
        for process in self._processes:
            process.terminate()

    def kill(self) -> None:
        """Send SIGKILL to all processes; their jobs return to the queue."""
        for process in self._processes:
            process.kill()

    def stop(self) -> None:
        """Drain and wait for all processes; kill those still running after STOP_SECONDS."""
        self.drain()
        for process in self._processes:
            process.join()


def worker_command(device: str) -> list[str]:
    """Command line of a worker, without URLs: other users of the host can read arguments."""
    return [sys.executable, "-c", _PROGRAM, "worker", "--attached", "--device", device]


def worker_environment(settings: Settings) -> dict[str, str]:
    """Environment of a worker on this host: this process's variables plus the settings.

    Unlike on other hosts, the folders of models and files of LoRAs are those of the settings.
    """
    tables = {f"SKYLOOM_{name.upper()}": _toml(getattr(settings, name)) for name in _WORKER_TABLES}
    return {**os.environ, **settings_environment(settings), **tables}


def _toml(table: Mapping[str, str]) -> str:
    """Write a table of names as an inline table of TOML."""
    quote = partial(json.dumps, ensure_ascii=False)
    texts = (f"{quote(key)} = {quote(value)}" for key, value in table.items())
    return f"{{ {', '.join(texts)} }}"


def settings_environment(settings: Settings) -> dict[str, str]:
    """SKYLOOM_* variables from which a worker loads the settings that it uses."""
    values = {
        name: repr(value)
        for name in _WORKER_NUMBERS
        if (value := getattr(settings, name)) is not None
    }
    values["data"] = str(settings.data.absolute())
    values["database_url"] = settings.database
    values["storage_url"] = settings.storage
    values["log_prompts"] = "true" if settings.log_prompts else "false"
    return {f"SKYLOOM_{name.upper()}": value for name, value in values.items()}


def remote_environment(settings: Settings, *, with_data: bool) -> dict[str, str]:
    """Variables for workers on other hosts: settings, and credentials of stores and databases.

    Without `with_data` each host uses its own default data folder.
    """
    values = {name: value for name, value in os.environ.items() if name.startswith(_FORWARDED)}
    values.update(settings_environment(settings))
    if not with_data:
        del values["SKYLOOM_DATA"]
    return values


class WorkerProcess:
    """A worker process and the thread that restarts it.

    `on_exit` receives the worker name of each process that has ended. The delay before a restart
    doubles from 0.5 to 30 s and is reset once a process has run for a minute.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: dict[str, str],
        *,
        on_exit: Callable[[str], object],
    ) -> None:
        self.restarts = 0
        self.name: str | None = None
        self._command = list(command)
        self._environment = environment
        self._on_exit = on_exit
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._deadline = 0.0
        self._thread = threading.Thread(target=self._supervise, name="worker process", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the process is running."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """Process id of the current or last process."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the thread, which starts the process."""
        self._thread.start()

    def terminate(self) -> None:
        """Send SIGTERM once; a worker treats a second SIGTERM as "stop now"."""
        if self._stopping.is_set():
            return
        self._deadline = time.monotonic() + STOP_SECONDS
        self._stopping.set()
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def kill(self) -> None:
        """Send SIGKILL and start no further process."""
        self._stopping.set()
        if self._process is not None:
            self._process.kill()

    def join(self) -> None:
        """Wait until STOP_SECONDS after `terminate`, then kill."""
        self._thread.join(max(0.0, self._deadline - time.monotonic()))
        if self._thread.is_alive():
            self.kill()
        self._thread.join()

    def _supervise(self) -> None:
        delay = _MIN_RESTART_SECONDS
        while not self._stopping.is_set():
            started = time.monotonic()
            self.name = f"{os.uname().nodename}-{os.getpid()}-{time.monotonic_ns():x}"
            code = self._run_process(self.name)
            self._requeue_jobs(self.name)
            if self._stopping.is_set():
                return
            if time.monotonic() - started > _STABLE_SECONDS:
                delay = _MIN_RESTART_SECONDS
            else:
                delay = min(delay * 2, _MAX_RESTART_SECONDS)
            log.warning(
                "worker exited, restarting",
                extra={"code": code, "worker": self.name, "seconds": delay},
            )
            self.restarts += 1
            self._stopping.wait(delay)

    def _run_process(self, name: str) -> int:
        """Start the process and wait; its exit status, or the errno that prevented the start."""
        try:
            self._process = subprocess.Popen(
                [*self._command, "--name", name], env=self._environment, stdin=subprocess.PIPE
            )
        except OSError as error:  # out of memory or processes: worth another attempt
            return error.errno or 1
        if self._stopping.is_set():  # `terminate` was called while the process started
            self._process.terminate()
        code = self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        return code

    def _requeue_jobs(self, name: str) -> None:
        """Return a dead worker's jobs to the queue at once."""
        try:
            self._on_exit(name)
        except (SQLAlchemyError, SkyloomError) as error:
            log.warning("database unavailable", extra={"cause": type(error).__name__})
