"""Watchdog of a render: detect renders that are stuck or over their time limits.

A render is stuck when it reports no step for `stall_seconds` (`load_seconds` before its first step
and while results are stored), or still runs `cancel_seconds` after a stop was requested. An attempt
is limited by `max_attempt_seconds`, all attempts of a job together by `max_job_seconds`.
"""

import faulthandler
import sys
import time
import traceback
from collections.abc import Callable

from skyloom.serve.queue.job import JobFailure
from skyloom.serve.queue.time_limits import TIME_LIMIT, job_time_failure
from skyloom.serve.settings import Settings

EXIT_STUCK = 75  # exit status of a worker with a stuck render; EX_TEMPFAIL of sysexits.h
STALLED = "stalled"
ATTEMPT_TIME_LIMIT = "attempt_time_limit"
HARD_SLACK_SECONDS = 60.0  # added to the soft limit before the process is ended from C
_STDERR = 2
Clock = Callable[[], float]


class Watchdog:
    """Timers of one attempt. The render thread reports steps; the heartbeat thread checks limits.

    `seconds_used` is the time that earlier attempts of the job took; `clock` is monotonic.
    """

    def __init__(
        self, settings: Settings, seconds_used: float = 0.0, clock: Clock = time.monotonic
    ) -> None:
        self._settings = settings
        self._seconds_used = seconds_used
        self._clock = clock
        self._started = clock()
        self._stop_requested: float | None = None
        # (stage, limit in seconds, start): one tuple, so that the other thread reads it whole
        self._waiting = ("while the model was loaded", settings.load_seconds, self._started)

    def report_step(self) -> None:
        """Restart the stall timer after a step."""
        self._waiting = ("", self._settings.stall_seconds, self._clock())

    def report_storing(self) -> None:
        """Restart the stall timer with the longer limit for storing results."""
        self._waiting = (
            "while the results were stored",
            self._settings.load_seconds,
            self._clock(),
        )

    def request_stop(self) -> None:
        """Start the `cancel_seconds` timer; further calls change nothing."""
        if self._stop_requested is None:
            self._stop_requested = self._clock()

    @property
    def stall_limit(self) -> float:
        """Seconds allowed now without a report; 0 for no limit."""
        return self._waiting[1]

    def stuck(self) -> bool:
        """Whether the process has to be ended."""
        _, limit, since = self._waiting
        now = self._clock()
        cancel_seconds = self._settings.cancel_seconds
        requested = self._stop_requested
        ignores_stop = requested is not None and now - requested > cancel_seconds > 0
        return ignores_stop or now - since > limit > 0

    def stall_failure(self, phase: str, percent: int) -> JobFailure:
        """Failure of a job whose render stalled in this phase and at this percentage."""
        stage, limit, _ = self._waiting
        where = stage or f"in the phase {phase} at {percent} %"
        return JobFailure(
            STALLED,
            f"The render made no progress for {limit:g} s {where}. "
            "Retry the job, or request fewer seconds or steps.",
        )

    def time_failure(self) -> JobFailure | None:
        """Failure of a job that exceeded a time limit; None while it is within both."""
        seconds = self._clock() - self._started
        settings = self._settings
        failure = job_time_failure(settings, self._seconds_used + seconds)
        if failure is None and seconds > settings.max_attempt_seconds > 0:
            return JobFailure(
                ATTEMPT_TIME_LIMIT,
                f"The attempt took longer than {settings.max_attempt_seconds:g} s "
                "(max_attempt_seconds). Request fewer seconds or steps.",
            )
        return failure


def retry_delay(failure: JobFailure) -> float | None:
    """Seconds until a job that the watchdog ended is retried; None for never."""
    return None if failure.code == TIME_LIMIT else 0.0


def arm_hard_limit(limit: float) -> None:
    """End the process unless this is called again within `limit` + HARD_SLACK_SECONDS.

    The process prints a traceback and exits with status 1, even while a C call holds the
    interpreter lock and no Python thread runs. A `limit` of 0 disarms.
    """
    if limit > 0:
        faulthandler.dump_traceback_later(limit + HARD_SLACK_SECONDS, exit=True, file=_STDERR)
    else:
        disarm_hard_limit()


def disarm_hard_limit() -> None:
    """Cancel `arm_hard_limit`."""
    faulthandler.cancel_dump_traceback_later()


def stack_of(thread: int) -> str:
    """Stack of a thread: files, lines and functions, without values."""
    frame = sys._current_frames().get(thread)
    return "" if frame is None else "".join(traceback.format_stack(frame))
