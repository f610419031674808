"""Periodic maintenance: expire leases, delete old rows, collect unreferenced files.

Each task has its own thread, so that none delays another. Several servers may run the same task at
once, and a task may be missed for a while.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial

from sqlalchemy.exc import SQLAlchemyError

from skyloom.core.errors import ConfigError, SkyloomError
from skyloom.serve.queue.jobs import JobStore
from skyloom.serve.queue.leases import Leases
from skyloom.serve.queue.retention import delete_old_rows
from skyloom.serve.storage import AssetStorage
from skyloom.serve.storage.garbage import collect

EXPIRE_SECONDS = 5.0
RETENTION_SECONDS = 5.0
COLLECT_SECONDS = 3_600.0
_JOIN_SECONDS = 1.0  # `stop` waits so long; the daemon threads do not keep the process alive
MaintenanceTask = tuple[float, Callable[[], object]]
"""The interval in seconds, and the function to call."""

log = logging.getLogger(__name__)


class MaintenanceThreads:
    """One thread per task, which calls it at its interval until stopped."""

    def __init__(self, tasks: Iterable[MaintenanceTask]) -> None:
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=task, name="maintenance", daemon=True)
            for task in tasks
        ]

    def start(self) -> "MaintenanceThreads":
        """Start the threads; each calls its task at once."""
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> None:
        """Stop after the running calls; wait a second for them at most."""
        self._stopping.set()
        until = time.monotonic() + _JOIN_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _run(self, interval: float, task: Callable[[], object]) -> None:
        while not self._stopping.is_set():
            due = time.monotonic() + interval
            try:
                task()
            except (SkyloomError, SQLAlchemyError, OSError) as error:
                log.warning("maintenance failed", extra={"cause": type(error).__name__})
            self._stopping.wait(max(0.0, due - time.monotonic()))


def queue_tasks(store: JobStore) -> list[MaintenanceTask]:
    """Return the tasks that expire leases and delete old rows."""
    return [
        (EXPIRE_SECONDS, Leases(store.database, store.settings).expire),
        (RETENTION_SECONDS, partial(delete_old_rows, store.database, store.settings)),
    ]


def garbage_collection_task(
    store: JobStore, storage: AssetStorage, stopping: Callable[[], bool]
) -> MaintenanceTask:
    """Return the task that collects unreferenced files, which can take minutes."""

    def run() -> None:
        try:
            collect(
                store.database,
                storage,
                store.settings,
                stopping=stopping,
                pause=COLLECT_SECONDS / 2,
            )
        except ConfigError as error:
            log.error("nothing is collected: %s", error)

    return (COLLECT_SECONDS, run)
