"""The watchdog of a render: decides when a render is stuck or out of time, and what its job is told then.

A render is stuck when it shows no step for `stall_seconds` (`load_seconds` before its first step and while results are
stored), or goes on for `cancel_seconds` after it was asked to stop. It is out of time after `max_attempt_seconds` in
one attempt or `max_job_seconds` in all attempts together.
"""

import faulthandler
import sys
import time
import traceback
from collections.abc import Callable

from skyloom.serve.queue.job import JobFailure
from skyloom.serve.settings import Settings

EXIT_STUCK = 75  # exit status of a worker that ended itself because of a stuck render; EX_TEMPFAIL of sysexits.h
STALLED, TIME_LIMIT, ATTEMPT_TIME_LIMIT = "stalled", "time_limit", "attempt_time_limit"
HARD_SLACK_SECONDS = (
    60.0  # past the soft limit, after which the process is ended without Python's help
)
_STDERR = 2
Clock = Callable[[], float]


class Watchdog:
    """Times of one attempt. The render's thread calls `moved`; the heartbeat thread asks all else.

    `used` is how many seconds earlier attempts of the job took; `clock` gives seconds that never go back.
    """

    def __init__(
        self, settings: Settings, used: float = 0.0, clock: Clock = time.monotonic
    ) -> None:
        self._settings, self._used, self._clock = settings, used, clock
        self._begun = clock()
        self._last = (
            "while it was loaded",
            settings.load_seconds,
            self._begun,
        )  # stage, limit, since when; set at once
        self._asked: float | None = None

    def moved(self, *, storing: bool = False) -> None:
        """The render has shown a step; with `storing`, its results are stored next, which may take longer."""
        if storing:
            self._last = ("while its files were stored", self._settings.load_seconds, self._clock())
        else:
            self._last = ("", self._settings.stall_seconds, self._clock())

    def ask_to_stop(self) -> None:
        """The render is to end; the first call counts."""
        if self._asked is None:
            self._asked = self._clock()

    @property
    def limit(self) -> float:
        """Seconds that may pass now without a sign of life; 0 for no limit."""
        return self._last[1]

    def stuck(self) -> bool:
        """Whether the process has to be ended."""
        _, limit, at = self._last
        now = self._clock()
        deaf = self._asked is not None and now - self._asked > self._settings.cancel_seconds > 0
        return deaf or now - at > limit > 0

    def stalled(self, phase: str, percent: int) -> JobFailure:
        """What is told of a job whose render made no progress."""
        stage, limit, _ = self._last
        where = stage or f"in the phase {phase} at {percent} %"
        return JobFailure(
            STALLED,
            f"The render made no progress for {limit:g} s {where}. Retry it, or ask for less.",
        )

    def out_of_time(self) -> JobFailure | None:
        """What is told of a job whose time is over; None while it is not."""
        took, settings = self._clock() - self._begun, self._settings
        if (over := over_time(settings, self._used + took)) is not None:
            return over
        if took > settings.max_attempt_seconds > 0:
            most = f"{settings.max_attempt_seconds:g} s (max_attempt_seconds)"
            return JobFailure(
                ATTEMPT_TIME_LIMIT,
                f"An attempt must end within {most}, this one did not. Ask for less.",
            )
        return None


def over_time(settings: Settings, used: float) -> JobFailure | None:
    """What is told of a job that was worked on for `used` seconds in all; None where that is allowed."""
    if used < settings.max_job_seconds or settings.max_job_seconds == 0:
        return None
    most = f"{settings.max_job_seconds:g} s of work (max_job_seconds)"
    return JobFailure(
        TIME_LIMIT,
        f"A job must end within {most}, this one did not. Ask for fewer seconds or steps.",
    )


def retry_of(failure: JobFailure) -> float | None:
    """After how many seconds a job that the watchdog has ended is tried again; None for never."""
    return None if failure.code == TIME_LIMIT else 0.0


def arm(limit: float) -> None:
    """End the process with status 1 and a traceback unless this is called again in time, even where a call of C holds
    the interpreter, so that no Python thread runs. A `limit` of 0 arms nothing."""
    if limit > 0:
        faulthandler.dump_traceback_later(limit + HARD_SLACK_SECONDS, exit=True, file=_STDERR)
    else:
        disarm()


def disarm() -> None:
    """Take back `arm`."""
    faulthandler.cancel_dump_traceback_later()


def stack_of(thread: int) -> str:
    """Where a thread is: files, lines and functions, no values."""
    frame = sys._current_frames().get(thread)
    return "" if frame is None else "".join(traceback.format_stack(frame))
