"""What has to happen from time to time beside the requests: leases that ran out, old deliveries, old files.

Each task has a thread of its own, so that none waits for another. Nothing breaks when two servers do a task at once, or
when none does for a while.
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
from skyloom.serve.queue.retention import sweep
from skyloom.serve.storage import AssetStorage
from skyloom.serve.storage.garbage import collect

EXPIRE_SECONDS, SWEEP_SECONDS, COLLECT_SECONDS = 5.0, 5.0, 3_600.0
_JOIN_SECONDS = (
    1.0  # a stop waits so long for a task that runs; its thread does not keep the process alive
)
Task = tuple[float, Callable[[], object]]

log = logging.getLogger(__name__)


class Upkeep:
    """Threads that do a task each, every so many seconds, until they are stopped."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=task, name="upkeep", daemon=True)  # one a task
            for task in tasks
        ]

    def start(self) -> "Upkeep":
        """Begin; the tasks are done a first time at once."""
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> None:
        """End after the tasks that run; one that takes longer than a second is left behind."""
        self._over.set()
        until = time.monotonic() + _JOIN_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _run(self, every: float, task: Callable[[], object]) -> None:
        while not self._over.is_set():
            due = time.monotonic() + every
            try:
                task()
            except (SkyloomError, SQLAlchemyError, OSError) as error:
                log.warning("upkeep went wrong", extra={"cause": type(error).__name__})
            self._over.wait(max(0.0, due - time.monotonic()))


def usual_tasks(store: JobStore) -> list[Task]:
    """Expire leases, and remove rows whose retention is over."""
    return [
        (EXPIRE_SECONDS, Leases(store.database, store.settings).expire),
        (SWEEP_SECONDS, partial(sweep, store.database, store.settings)),
    ]


def collecting(store: JobStore, storage: AssetStorage, stopping: Callable[[], bool]) -> list[Task]:
    """Collect what nothing names any more. A sweep can take minutes, so a thread of its own does it."""

    def once() -> None:
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

    return [(COLLECT_SECONDS, once)]
