"""A worker: leases jobs one after another, has them rendered, stores what came out, hands in the result.

The renderer is a function from a job and a folder to steps; between two of them the worker looks whether the job is to
be cancelled or paused, whether its lease is lost, and whether it should go itself. A thread keeps the lease meanwhile
(pulse.py).
What a renderer leaves in the folder's `state` is stored from time to time, so that another worker can go on from it.
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
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from skyloom.core.errors import (
    CapacityError,
    DiskFullError,
    SafetyError,
    SkyloomError,
    UncheckedError,
)
from skyloom.serve.queue.job import Job, JobFailure, JobResult
from skyloom.serve.queue.leases import Lease, Leases, LostLeaseError
from skyloom.serve.queue.moderation_counters import BLOCKED, FAILED
from skyloom.serve.queue.watchdog import Clock, Watchdog, retry_of
from skyloom.serve.redaction import clean_receipt, without_paths
from skyloom.serve.settings import Settings
from skyloom.serve.storage import Asset, AssetStorage
from skyloom.serve.workers.heartbeat import Pulse

STATE = "state"
POLL_SECONDS = 0.2  # between two looks of an idle worker
RETRY_SECONDS = 1.0  # until the next try, while the database is away
HAND_IN_SECONDS = 300.0  # how long a finished video waits for a database that is away
_MEMORY_SIGNS = ("out of memory", "can't allocate memory")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_STATE_NAME = re.compile(r"\w[\w.-]{0,100}(?:/\w[\w.-]{0,100})?")

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """A step of a render is done: percent of the whole, and its phase. The last one brings the files that were made,
    by name ("video", "thumbnail", ...), and the receipt."""

    percent: int
    phase: str
    files: Mapping[str, Path] | None = None
    receipt: Mapping[str, Any] | None = None


class Renderer(Protocol):
    """Makes what a job asks for, step by step, from where `folder`/state says that it was; may write in `folder`."""

    def __call__(self, job: Job, folder: Path, *, output: Path) -> Generator[Progress]:
        """The steps; files of the last one lie in `output`. One that is closed leaves its state complete."""
        ...


class Worker:
    """One worker of one device. `run` works until it is told to `drain`.

    `end` ends the process with an exit status when a render is stuck; `clock` is the watchdog's.
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
        end: Callable[[int], object] | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.leases = leases
        self.storage = storage
        self.renderer = renderer
        self.settings = settings
        self.name = name
        self.device = device
        self._end, self._clock = end or _kill_self, clock
        self._leaving = threading.Event()

    def drain(self) -> None:
        """Give back the job in hand after the step that runs, and end."""
        self._leaving.set()

    def tidy(self) -> None:
        """Remove what runs of jobs that are done, or gone, have left on this machine."""
        runs = self.settings.runs
        there = [path for path in runs.iterdir() if path.is_dir()] if runs.is_dir() else []
        needed = self.leases.unfinished([path.name for path in there]) if there else set[str]()
        for path in there:
            if path.name not in needed:
                shutil.rmtree(path, ignore_errors=True)

    def run(self, *, until_empty: bool = False) -> None:
        """Work, until told to drain or, if asked so, until no job waits. An absent database is waited for."""
        due = 0.0
        while not self._leaving.is_set():
            try:
                if time.monotonic() >= due:
                    self.leases.greet(self.name, self.device)
                    self.leases.expire()
                    self.tidy()  # of jobs that others have ended, after their leases were lost here
                    due = time.monotonic() + self.settings.heartbeat_seconds
                if self.work_one():
                    continue
            except SQLAlchemyError as error:
                log.warning("the database does not answer", extra={"cause": type(error).__name__})
                self._leaving.wait(RETRY_SECONDS)
                continue
            if until_empty:
                return
            self._leaving.wait(POLL_SECONDS)

    def work_one(self) -> bool:
        """Take a job, if one waits, and bring it to whatever end it has in this worker's hands."""
        lease = self.leases.lease(self.name)
        if lease is None:
            return False
        log.info("job begun", extra={"job": lease.job.id, "worker": self.name})
        folder = self.settings.runs / lease.job.id
        watch = Watchdog(self.settings, lease.used, self._clock)
        try:
            with Pulse(
                self.leases, lease, self.settings.heartbeat_seconds, self._leaving, watch, self._end
            ) as pulse:
                end = self._make(lease, folder, pulse)
            job = self._hand_in(end)
        except LostLeaseError:
            log.warning("lease lost", extra={"job": lease.job.id, "worker": self.name})
            return True
        if job is None or job.done:
            shutil.rmtree(folder, ignore_errors=True)
        log.info(
            "job let go", extra={"job": lease.job.id, "status": job.status if job else "deleted"}
        )
        return True

    def _make(self, lease: Lease, folder: Path, pulse: Pulse) -> Callable[[], Job | None]:
        """Render; what to tell the queue in the end. Raises LostLeaseError."""
        kept = dict(lease.job.checkpoint)
        saver = _Saver(self.storage, folder / STATE, kept, self.settings.heartbeat_seconds)
        output = folder / f"output-{lease.token}"
        try:
            self._prepare(lease.job, folder, output)
            saver.restore()
            with contextlib.closing(self.renderer(lease.job, folder, output=output)) as steps:
                for step in steps:
                    if step.files is not None:
                        pulse.storing()
                        receipt = clean_receipt(step.receipt or {}, lease.job.request)
                        result = self._store(step.files, receipt)
                        return lambda: self.leases.finish(lease, result)
                    pulse.tell(step.percent, step.phase, saver.save())
                    if pulse.stopping():
                        break
                else:
                    raise RuntimeError("a render ends with its files")
            checkpoint = saver.save(now=True)  # a render that was closed has written its last step
            if (late := pulse.late) is not None:
                return lambda: self.leases.fail(
                    lease, late, retry_in=retry_of(late), checkpoint=checkpoint
                )
            return lambda: self.leases.release(lease, checkpoint)
        except LostLeaseError:
            raise
        except Exception as error:  # whatever a render does, the worker lives
            failure, retry_in = explain(error, self.settings.data, lease.job.request)
            told = {"job": lease.job.id, "code": failure.code}
            if failure.rule is not None:  # no traceback: it could tell what was refused
                log.warning("job refused", extra={**told, "rule": failure.rule})
            elif isinstance(
                error, SkyloomError
            ):  # it says itself what is wrong, in its owner's words
                log.warning("job went wrong", extra=told)
            else:
                log.warning("job went wrong", extra=told, exc_info=error)
            return lambda: self.leases.fail(lease, failure, retry_in=retry_in)

    def _prepare(self, job: Job, folder: Path, output: Path) -> None:
        """An empty output folder on a disk that has room. Raises DiskFullError."""
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

    def _hand_in(self, end: Callable[[], Job | None]) -> Job | None:
        """Tell the queue, however long its database is away. Raises LostLeaseError."""
        until = time.monotonic() + HAND_IN_SECONDS
        while True:
            try:
                return end()
            except SQLAlchemyError as error:
                log.warning("the database does not answer", extra={"cause": type(error).__name__})
                if time.monotonic() > until:
                    raise LostLeaseError("The database was away for too long.") from error
                time.sleep(RETRY_SECONDS)


def _kill_self(_status: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class _Saver:
    """Copies what a render keeps in its state folder to the storage, and back where it is missing."""

    def __init__(self, storage: AssetStorage, folder: Path, kept: dict[str, str], every: float) -> None:
        self._storage, self._folder, self._kept, self._every = storage, folder, kept, every
        self._seen: dict[str, tuple[int, int]] = {}
        self._due = time.monotonic() + every

    def restore(self) -> None:
        """Fetch the files that this machine does not have."""
        for name, reference in self._kept.items():
            target = self._folder / name
            if _STATE_NAME.fullmatch(name) and not target.exists():
                target.parent.mkdir(exist_ok=True)
                self._storage.fetch(Asset.parse(reference), target)

    def save(self, *, now: bool = False) -> Mapping[str, str] | None:
        """Store what has changed, if it is time; the new checkpoint, or None."""
        if not now and time.monotonic() < self._due:
            return None
        there: dict[str, str] = {}
        for path in sorted(self._folder.rglob("*")):
            name = path.relative_to(self._folder).as_posix()
            if _STATE_NAME.fullmatch(name) and path.suffix != ".part" and path.is_file():
                told = path.stat()
                seen = (told.st_mtime_ns, told.st_size)
                if self._seen.get(name) != seen or name not in self._kept:
                    self._kept[name] = self._storage.put(path, "bin").reference
                    self._seen[name] = seen
                there[name] = self._kept[name]
        self._kept, self._due = there, time.monotonic() + self._every
        return dict(there)


def explain(
    error: Exception, data: Path, request: Mapping[str, Any]
) -> tuple[JobFailure, float | None]:
    """What a client is told of an error, and after how many seconds another try makes sense (None: never).

    Paths of this machine and the words of unknown errors stay here: a file of the request is called by its field.
    """
    text = str(error)
    if isinstance(error, MemoryError) or any(sign in text.lower() for sign in _MEMORY_SIGNS):
        return JobFailure(
            "out_of_memory", "The memory is full. Ask for a smaller size or fewer seconds."
        ), 5.0
    if isinstance(error, DiskFullError) or (isinstance(error, OSError) and error.errno in _FULL):
        return JobFailure("disk_full", "The disk is full. Free some space and retry."), 60.0
    if isinstance(error, SafetyError):
        code = FAILED if isinstance(error, UncheckedError) else BLOCKED
        return JobFailure(code, without_paths(text, request, data), error.rule, error.target), None
    if isinstance(error, SkyloomError):
        retry_in = error.retry_after if isinstance(error, CapacityError) else None
        return JobFailure(error.code, without_paths(text, request, data)), retry_in
    return JobFailure("internal", "Something went wrong inside; the worker's log says what."), None
