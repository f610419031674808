"""Total time that workers may spend on a job, over all of its attempts."""

from skyloom.serve.queue.job import JobFailure
from skyloom.serve.settings import Settings

TIME_LIMIT = "time_limit"  # code of a job that exceeded max_job_seconds; it is never retried


def job_time_failure(settings: Settings, seconds_used: float) -> JobFailure | None:
    """Failure of a job that used `max_job_seconds` or more of work; None below that."""
    limit = settings.max_job_seconds
    if limit == 0 or seconds_used < limit:
        return None
    return JobFailure(
        TIME_LIMIT,
        f"The job took longer than {limit:g} s of work (max_job_seconds). "
        "Request fewer seconds or steps.",
    )
