"""Worker: lease jobs one after another, render them, store the results and complete the jobs.

The renderer is a generator of progress steps. Between two steps the worker checks whether the job
is cancelled or paused, whether its lease is lost and whether the worker itself has to stop; a
heartbeat thread renews the lease meanwhile. The renderer's `state` folder is stored at intervals as
the job's checkpoint, from which another worker can resume.
"""

import contextlib
import errno
import logging
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Collection, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy.exc import SQLAlchemyError

from skyloom.core.errors import (
    CapacityError,
    DiskFullError,
    SafetyError,
    SkyloomError,
    UncheckedError,
)
from skyloom.serve.queue.capabilities import Capabilities
from skyloom.serve.queue.job import BLOCKED, FAILED, Job, JobFailure, JobResult
from skyloom.serve.queue.leases import Lease, Leases, LostLeaseError
from skyloom.serve.redaction import clean_receipt, without_paths
from skyloom.serve.settings import Settings
from skyloom.serve.storage import Asset, AssetStorage
from skyloom.serve.workers.heartbeat import Heartbeat
from skyloom.serve.workers.watchdog import Clock, Watchdog, retry_delay

STATE = "state"
POLL_SECONDS = 0.2  # between two queries of an idle worker
RETRY_SECONDS = 1.0  # between two attempts to reach an unavailable database
SUBMIT_SECONDS = 300.0  # how long a finished job waits for an unavailable database
_OUT_OF_MEMORY_SIGNS = ("out of memory", "can't allocate memory")
_DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
_STATE_NAME = re.compile(r"\w[\w.-]{0,100}(?:/\w[\w.-]{0,100})?")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """A finished step of a render: percent of the whole job and the phase.

    The last step has `files` by name ("video", "thumbnail", ...) and the receipt.
    """

    percent: int
    phase: str
    files: Mapping[str, Path] | None = None
    receipt: Mapping[str, Any] | None = None


class Renderer(Protocol):
    """Render a job step by step, resuming from `folder`/state; may write inside `folder`."""

    def __call__(self, job: Job, folder: Path, *, output: Path) -> Generator[Progress]:
        """Yield steps; write result files to `output`. When closed, leave a complete state."""
        ...


class Worker:
    """A worker on one device; `run` works until `drain` is called.

    It announces its `capabilities` to the queue. `warm_models` returns the names of the models that
    the renderer has loaded; their jobs are preferred.
    `exit_process` ends the process with a status when a render is stuck (default: SIGKILL);
    `clock` is the watchdog's monotonic clock.
    """

    def __init__(
        self,
        leases: Leases,
        storage: AssetStorage,
        renderer: Renderer,
        settings: Settings,
        *,
        name: str,
        device: str,
        capabilities: Capabilities | None = None,
        warm_models: Callable[[], Collection[str]] = tuple,
        exit_process: Callable[[int], object] | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.leases = leases
        self.storage = storage
        self.renderer = renderer
        self.settings = settings
        self.name = name
        self.device = device
        self.capabilities = capabilities
        self._warm_models = warm_models
        self._exit_process = exit_process or _kill_process
        self._clock = clock
        self._draining = threading.Event()

    def drain(self) -> None:
        """Stop after the current step and return the job to the queue."""
        self._draining.set()

    def clean_up(self) -> None:
        """Delete local run folders of jobs that have ended or were deleted."""
        runs = self.settings.runs
        folders = [path for path in runs.iterdir() if path.is_dir()] if runs.is_dir() else []
        if not folders:
            return
        unfinished = self.leases.unfinished([path.name for path in folders])
        for path in folders:
            if path.name not in unfinished:
                shutil.rmtree(path, ignore_errors=True)

    def run(self, *, until_empty: bool = False) -> None:
        """Work until drained or, with `until_empty`, until no job is ready.

        Waits while the database is unavailable.
        """
        next_maintenance = 0.0
        while not self._draining.is_set():
            try:
                if time.monotonic() >= next_maintenance:
                    self.leases.register_worker(self.name, self.device, self.capabilities)
                    self.leases.expire()
                    self.clean_up()  # includes jobs that others ended after a lease was lost here
                    next_maintenance = time.monotonic() + self.settings.heartbeat_seconds
                if self.work_one():
                    continue
            except SQLAlchemyError as error:
                log.warning("database unavailable", extra={"cause": type(error).__name__})
                self._draining.wait(RETRY_SECONDS)
                continue
            if until_empty:
                return
            self._draining.wait(POLL_SECONDS)

    def work_one(self) -> bool:
        """Lease one job and run it until it completes, fails or is released; False if none."""
        lease = self.leases.lease(self.name, self._warm_models())
        if lease is None:
            return False
        log.info("job started", extra={"job": lease.job.id, "worker": self.name})
        folder = self.settings.runs / lease.job.id
        heartbeat = Heartbeat(
            self.leases,
            lease,
            interval=self.settings.heartbeat_seconds,
            draining=self._draining,
            watchdog=Watchdog(self.settings, lease.seconds_used, self._clock),
            exit_process=self._exit_process,
        )
        try:
            with heartbeat:
                write_outcome = self._render(lease, folder, heartbeat)
            job = self._retry_while_unavailable(write_outcome)
        except LostLeaseError:
            log.warning("lease lost", extra={"job": lease.job.id, "worker": self.name})
            return True
        if job is None or job.done:
            shutil.rmtree(folder, ignore_errors=True)
        status = job.status if job else "deleted"
        log.info("job ended", extra={"job": lease.job.id, "status": status})
        return True

    def _render(self, lease: Lease, folder: Path, heartbeat: Heartbeat) -> Callable[[], Job | None]:
        """Render and store a job; the call that writes the outcome. Raises LostLeaseError."""
        saver = _CheckpointSaver(
            self.storage,
            folder / STATE,
            lease.job.checkpoint,
            interval=self.settings.heartbeat_seconds,
        )
        output = folder / f"output-{lease.token}"
        try:
            self._prepare_folders(folder, output)
            saver.restore()
            with contextlib.closing(self.renderer(lease.job, folder, output=output)) as steps:
                for step in steps:
                    if step.files is not None:
                        heartbeat.report_storing()
                        receipt = clean_receipt(step.receipt or {}, lease.job.request)
                        result = self._store(step.files, receipt)
                        return lambda: self.leases.finish(lease, result)
                    heartbeat.report_step(step.percent, step.phase, saver.save_if_due())
                    if heartbeat.should_stop():
                        break
                else:
                    raise RuntimeError("the renderer ended without files")
            checkpoint = saver.save()  # after the renderer was closed and wrote its last state
            failure = heartbeat.time_failure
            if failure is None:
                return lambda: self.leases.release(lease, checkpoint)
            return lambda: self.leases.fail(
                lease, failure, retry_in=retry_delay(failure), checkpoint=checkpoint
            )
        except LostLeaseError:
            raise
        except Exception as error:  # one failing job must not stop the worker
            failure, retry_in = explain(error, self.settings.data, lease.job.request)
            _log_failure(lease.job.id, failure, error)
            return lambda: self.leases.fail(lease, failure, retry_in=retry_in)

    def _prepare_folders(self, folder: Path, output: Path) -> None:
        """Create an empty output folder. Raises DiskFullError below the disk reserve."""
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        (folder / STATE).mkdir(exist_ok=True)
        if shutil.disk_usage(folder).free < self.settings.disk_reserve:
            raise DiskFullError("The disk is nearly full.", hint="Free some space.")

    def _store(self, files: Mapping[str, Path], receipt: Mapping[str, Any]) -> JobResult:
        assets = {
            name: self.storage.put(path, path.suffix[1:]).reference for name, path in files.items()
        }
        return JobResult(assets, receipt)

    def _retry_while_unavailable(self, write: Callable[[], Job | None]) -> Job | None:
        """Call `write`; retry for SUBMIT_SECONDS without a database. Raises LostLeaseError."""
        deadline = time.monotonic() + SUBMIT_SECONDS
        while True:
            try:
                return write()
            except SQLAlchemyError as error:
                log.warning("database unavailable", extra={"cause": type(error).__name__})
                if time.monotonic() > deadline:
                    message = f"The database was unavailable for {SUBMIT_SECONDS:g} s."
                    raise LostLeaseError(message) from error
                time.sleep(RETRY_SECONDS)


def _kill_process(_status: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _log_failure(job: str, failure: JobFailure, error: Exception) -> None:
    """Log why a job failed; a traceback only where it cannot quote moderated or user input."""
    values = {"job": job, "code": failure.code}
    if failure.rule is not None:
        log.warning("job refused", extra={**values, "rule": failure.rule})
    else:
        expected = isinstance(error, SkyloomError)
        log.warning("job failed", extra=values, exc_info=None if expected else error)


class _CheckpointSaver:
    """Copy a renderer's state folder to the storage, and back on a host that lacks it.

    `checkpoint` maps file names inside the folder to stored assets.
    """

    def __init__(
        self, storage: AssetStorage, folder: Path, checkpoint: Mapping[str, str], *, interval: float
    ) -> None:
        self._storage = storage
        self._folder = folder
        self._checkpoint = dict(checkpoint)
        self._interval = interval
        self._stored_versions: dict[str, tuple[int, int]] = {}  # name: (mtime in ns, size)
        self._next_save = time.monotonic() + interval

    def restore(self) -> None:
        """Fetch the files that are missing in the folder."""
        for name, reference in self._checkpoint.items():
            target = self._folder / name
            if _STATE_NAME.fullmatch(name) and not target.exists():
                target.parent.mkdir(exist_ok=True)
                self._storage.fetch(Asset.parse(reference), target)

    def save_if_due(self) -> Mapping[str, str] | None:
        """Save once per interval; None in between."""
        return None if time.monotonic() < self._next_save else self.save()

    def save(self) -> Mapping[str, str]:
        """Store new and changed files; the new checkpoint."""
        checkpoint: dict[str, str] = {}
        for path in sorted(self._folder.rglob("*")):
            name = path.relative_to(self._folder).as_posix()
            if _STATE_NAME.fullmatch(name) and path.suffix != ".part" and path.is_file():
                status = path.stat()
                version = (status.st_mtime_ns, status.st_size)
                if self._stored_versions.get(name) != version or name not in self._checkpoint:
                    self._checkpoint[name] = self._storage.put(path, "bin").reference
                    self._stored_versions[name] = version
                checkpoint[name] = self._checkpoint[name]
        self._checkpoint = checkpoint
        self._next_save = time.monotonic() + self._interval
        return dict(checkpoint)


def explain(
    error: Exception, data: Path, request: Mapping[str, Any]
) -> tuple[JobFailure, float | None]:
    """Public failure for an exception, and the seconds until a retry makes sense (None: never).

    Messages name files of the request by their API field; they contain no path of this host and
    no text of an unexpected exception.
    """
    text = str(error)
    out_of_memory = any(sign in text.lower() for sign in _OUT_OF_MEMORY_SIGNS)
    if out_of_memory or isinstance(error, MemoryError):
        message = "The worker ran out of memory. Request a smaller size or fewer seconds."
        return JobFailure("out_of_memory", message), 5.0
    disk_full = isinstance(error, OSError) and error.errno in _DISK_FULL_ERRNOS
    if disk_full or isinstance(error, DiskFullError):
        return JobFailure("disk_full", "The disk is full. Free some space and retry."), 60.0
    if isinstance(error, SafetyError):
        code = FAILED if isinstance(error, UncheckedError) else BLOCKED
        return JobFailure(code, without_paths(text, request, data), error.rule, error.target), None
    if isinstance(error, SkyloomError):
        retry_in = error.retry_after if isinstance(error, CapacityError) else None
        return JobFailure(error.code, without_paths(text, request, data)), retry_in
    return JobFailure("internal", "Internal error; the worker's log has details."), None
