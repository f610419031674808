"""Heartbeat of a job: renew its lease, write progress and read requested actions in a thread.

The lease is renewed only while the watchdog finds the render alive; a stuck render ends the
process.
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
from skyloom.serve.workers.watchdog import (
    EXIT_STUCK,
    Watchdog,
    arm_hard_limit,
    disarm_hard_limit,
    retry_delay,
    stack_of,
)

POLL_SECONDS = 0.5  # longest time between two reads of the requested action
DRAIN_SECONDS = 8.0  # time for the current step when the worker drains, before SIGKILL

log = logging.getLogger(__name__)


class Heartbeat:
    """Context manager that runs the heartbeat thread while a job is rendered and stored.

    `interval` is the number of seconds between renewals, `draining` is set when the worker has to
    stop. `exit_process` ends the process with a status when the render is stuck, because a thread
    that hangs in a device library cannot be ended alone. `time_failure` is set once the job has
    exceeded a time limit.
    """

    def __init__(
        self,
        leases: Leases,
        lease: Lease,
        *,
        interval: float,
        draining: threading.Event,
        watchdog: Watchdog,
        exit_process: Callable[[int], object],
    ) -> None:
        self.time_failure: JobFailure | None = None
        self._leases = leases
        self._lease = lease
        self._interval = interval
        self._draining = draining
        self._watchdog = watchdog
        self._exit_process = exit_process
        self._render_thread = threading.get_ident()
        # (percent, phase, checkpoint): one tuple, so that the other thread reads it whole
        self._state: tuple[int, str, Mapping[str, str] | None] = (
            lease.job.progress,
            lease.job.phase or "",
            None,
        )
        self._written_state = self._state
        self._next_renewal = time.monotonic() + interval
        self._requested_action: RequestedAction | None = None
        self._lost_lease: LostLeaseError | None = None
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        arm_hard_limit(self._watchdog.stall_limit)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._finished.set()
        self._thread.join()
        disarm_hard_limit()

    def report_step(self, percent: int, phase: str, checkpoint: Mapping[str, str] | None) -> None:
        """Set what the next renewal writes. Raises LostLeaseError once the lease is lost."""
        self._raise_if_lost()
        self._state = (percent, phase, checkpoint or self._state[2])
        self._watchdog.report_step()
        arm_hard_limit(self._watchdog.stall_limit)

    def report_storing(self) -> None:
        """Report that results are stored next. Raises LostLeaseError once the lease is lost."""
        self._raise_if_lost()
        self._watchdog.report_storing()
        arm_hard_limit(self._watchdog.stall_limit)

    def should_stop(self) -> bool:
        """Whether the render has to stop: action requested, time limit exceeded or draining."""
        return (
            self._requested_action is not None
            or self.time_failure is not None
            or self._draining.is_set()
        )

    def _raise_if_lost(self) -> None:
        if self._lost_lease is not None:
            raise self._lost_lease

    def _run(self) -> None:
        drain_started: float | None = None
        while not self._finished.wait(min(POLL_SECONDS, self._interval)):
            arm_hard_limit(self._watchdog.stall_limit)
            if self._end_if_stuck():
                return
            if self._lost_lease is None:  # otherwise only the end of the render is awaited
                self._renew()
            if self._draining.is_set():
                drain_started = drain_started or time.monotonic()
                overdue = time.monotonic() - drain_started > DRAIN_SECONDS
                if overdue and not self._finished.is_set():
                    self._abandon()

    def _renew(self) -> None:
        """Write new progress or renew the lease when due; otherwise read the requested action."""
        state = self._state
        now = time.monotonic()
        try:
            if state == self._written_state and now < self._next_renewal:
                self._requested_action = self._leases.requested_action(self._lease)
                return
            percent, phase, checkpoint = state
            self._requested_action = self._leases.heartbeat(
                self._lease, progress=percent, phase=phase, checkpoint=checkpoint
            )
            self._written_state = state
            self._next_renewal = now + self._interval
        except LostLeaseError as error:
            self._lost_lease = error
        except SQLAlchemyError as error:
            log.warning("heartbeat not written", extra={"cause": type(error).__name__})

    def _end_if_stuck(self) -> bool:
        """Check the watchdog; fail the job and end the process if the render is stuck."""
        watchdog = self._watchdog
        self.time_failure = self.time_failure or watchdog.time_failure()
        cancelled = self._requested_action == "cancel"
        if cancelled or self.time_failure is not None or self._lost_lease is not None:
            watchdog.request_stop()
        if not watchdog.stuck() or self._finished.is_set():
            return False
        percent, phase, _ = self._state
        failure = self.time_failure or watchdog.stall_failure(phase, percent)
        log.error(
            "render stuck, worker exits",
            extra={
                "job": self._lease.job.id,
                "worker": self._lease.worker,
                "code": failure.code,
                "requested_action": self._requested_action,
                "stack": stack_of(self._render_thread),
            },
        )
        with contextlib.suppress(LostLeaseError, SQLAlchemyError):
            if cancelled:
                self._leases.release(self._lease)
            else:
                self._leases.fail(self._lease, failure, retry_in=retry_delay(failure))
        self._lost_lease = LostLeaseError("The render was stuck.")
        self._exit_process(EXIT_STUCK)
        return True

    def _abandon(self) -> None:
        """Release the job, so that another worker resumes it, and kill this process."""
        with contextlib.suppress(LostLeaseError, SQLAlchemyError):
            self._leases.release(self._lease)
        os.kill(os.getpid(), signal.SIGKILL)
