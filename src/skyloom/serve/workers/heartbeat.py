"""The pulse of a render: a thread that renews the lease, writes progress and hears what is wanted.

It renews the lease only while the watchdog (watchdog.py) is content, and ends the process of a render that is stuck.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping

from sqlalchemy.exc import SQLAlchemyError

from skyloom.serve.queue.job import JobFailure, RequestedAction
from skyloom.serve.queue.leases import Lease, Leases, LostLeaseError
from skyloom.serve.queue.watchdog import EXIT_STUCK, Watchdog, arm, disarm, retry_of, stack_of

PULSE_SECONDS = 0.5  # between two looks at what is wanted, and two writes of progress
DRAIN_SECONDS = 8.0  # after which a step that does not end is left behind

log = logging.getLogger(__name__)


class Pulse:
    """A thread that keeps a lease, writes progress and hears what is wanted, while a job is made.

    It ends the process of a render that is stuck: a thread that hangs in a device's library cannot be ended alone.
    """

    def __init__(
        self,
        leases: Leases,
        lease: Lease,
        every: float,
        leaving: threading.Event,
        watch: Watchdog,
        end: Callable[[int], object],
    ) -> None:
        self._leases, self._lease, self._every, self._leaving = leases, lease, every, leaving
        self._watch, self._end, self._rendering = watch, end, threading.get_ident()
        self.late: JobFailure | None = None
        self._said: tuple[int, str, Mapping[str, str] | None] = (
            lease.job.progress,
            lease.job.phase or "",
            None,
        )
        self._written, self._due = self._said, time.monotonic() + every
        self._wanted: RequestedAction | None = None
        self._lost: LostLeaseError | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)

    def __enter__(self) -> "Pulse":
        arm(self._watch.limit)
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._over.set()
        self._thread.join()
        disarm()

    def storing(self) -> None:
        """The render is done, its files are stored next. Raises LostLeaseError once the lease is gone."""
        if self._lost is not None:
            raise self._lost
        self._watch.moved(storing=True)
        arm(self._watch.limit)

    def tell(self, percent: int, phase: str, checkpoint: Mapping[str, str] | None) -> None:
        """What to write at the next beat. Raises LostLeaseError once the lease is gone."""
        if self._lost is not None:
            raise self._lost
        self._said = (percent, phase, checkpoint or self._said[2])
        self._watch.moved()
        arm(self._watch.limit)

    def stopping(self) -> bool:
        """Whether the job is to be let go of now."""
        return self._wanted is not None or self.late is not None or self._leaving.is_set()

    def _beat(self) -> None:
        left: float | None = None
        while not self._over.wait(min(PULSE_SECONDS, self._every)):
            arm(self._watch.limit)
            if self._look():
                return
            if self._lost is None:  # else only the end of the render is waited for
                self._renew()
            if self._leaving.is_set():
                left = left or time.monotonic()
                if time.monotonic() - left > DRAIN_SECONDS and not self._over.is_set():
                    self._leave()

    def _renew(self) -> None:
        """Write what is new, or that the lease is still held; else only hear what is wanted."""
        said, now = self._said, time.monotonic()
        try:
            if said != self._written or now >= self._due:
                percent, phase, checkpoint = said
                self._wanted = self._leases.heartbeat(
                    self._lease, progress=percent, phase=phase, checkpoint=checkpoint
                )
                self._written, self._due = said, now + self._every
            else:
                self._wanted = self._leases.requested_action(self._lease)
        except LostLeaseError as error:
            self._lost = error
        except SQLAlchemyError as error:
            log.warning("a heartbeat was not heard", extra={"cause": type(error).__name__})

    def _look(self) -> bool:
        """Look at the render's times; end the process, and return True, if it is stuck."""
        self.late = self.late or self._watch.out_of_time()
        if self._wanted == "cancel" or self.late is not None or self._lost is not None:
            self._watch.ask_to_stop()
        if not self._watch.stuck() or self._over.is_set():
            return False
        percent, phase, _ = self._said
        cause = self.late or self._watch.stalled(phase, percent)
        told = {
            "job": self._lease.job.id,
            "worker": self._lease.worker,
            "code": cause.code,
            "wanted": self._wanted,
        }
        log.error(
            "a render is stuck, the worker ends", extra={**told, "stack": stack_of(self._rendering)}
        )
        with contextlib.suppress(LostLeaseError, SQLAlchemyError):
            if self._wanted == "cancel":
                self._leases.release(self._lease)
            else:
                self._leases.fail(self._lease, cause, retry_in=retry_of(cause))
        self._lost = LostLeaseError("The render was stuck.")
        self._end(EXIT_STUCK)
        return True

    def _leave(self) -> None:
        """The step does not end and the time to go is over: another worker may go on from the last checkpoint."""
        with contextlib.suppress(LostLeaseError, SQLAlchemyError):
            self._leases.release(self._lease)
        os.kill(os.getpid(), signal.SIGKILL)
