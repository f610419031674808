"""What has to happen from time to time beside the requests: leases that ran out, webhooks that are due, old files.

One thread of the server does it. Nothing breaks when two servers do it at once, or when none does for a while.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial

from sqlalchemy.exc import SQLAlchemyError

from skyloom.core.errors import ConfigError, SkyloomError
from skyloom.serve import outbound
from skyloom.serve.collector import collect
from skyloom.serve.jobs import JobStore
from skyloom.serve.leases import Leases
from skyloom.serve.retention import sweep
from skyloom.serve.storage import Storage
from skyloom.serve.webhooks import deliver_due

EXPIRE_SECONDS, DELIVER_SECONDS, COLLECT_SECONDS = 5.0, 2.0, 3_600.0
SWEEP_SECONDS = 5.0
Task = tuple[float, Callable[[], object]]

log = logging.getLogger(__name__)


class Upkeep:
    """A thread that does tasks, each every so many seconds, until it is stopped."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._tasks = list(tasks)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="upkeep", daemon=True)

    def start(self) -> "Upkeep":
        """Begin; the tasks are done a first time at once."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """End after the task that runs."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        due = [0.0] * len(self._tasks)
        while True:
            for index, (every, task) in enumerate(self._tasks):
                if time.monotonic() >= due[index] and not self._over.is_set():
                    due[index] = time.monotonic() + every
                    try:
                        task()
                    except (SkyloomError, SQLAlchemyError, OSError) as error:
                        log.warning("upkeep went wrong", extra={"cause": type(error).__name__})
            if self._over.wait(max(0.0, min(due) - time.monotonic())):
                return


def usual_tasks(store: JobStore) -> list[Task]:
    """Expire leases, deliver webhooks, remove rows whose retention is over."""
    database, loopback = store.database, store.settings.webhooks_to_loopback
    return [
        (EXPIRE_SECONDS, Leases(database, store.settings).expire),
        (DELIVER_SECONDS, partial(deliver_due, database, partial(outbound.post_to, loopback=loopback))),
        (SWEEP_SECONDS, partial(sweep, database, store.settings)),
    ]


def collecting(store: JobStore, storage: Storage, stopping: Callable[[], bool]) -> list[Task]:
    """Collect what nothing names any more. A sweep can take minutes, so a thread of its own does it."""

    def once() -> None:
        try:
            collect(store.database, storage, store.settings, stopping=stopping, pause=COLLECT_SECONDS / 2)
        except ConfigError as error:
            log.error("nothing is collected: %s", error)

    return [(COLLECT_SECONDS, once)]
