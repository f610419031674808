"""Seen from outside: whether the server lives, whether it takes jobs, and what it counts."""

from starlette.responses import Response

from skyloom.serve.api import response_models as answers
from skyloom.serve.api.context import Asked, Call, Reply
from skyloom.serve.api.errors import AWAY
from skyloom.serve.api.metrics import MEDIA_TYPE


def health(asked: Asked) -> Reply:
    """The process answers; degraded while a worker of its own is dead and not yet started again."""
    workers = asked.services.outside.workers()
    status = "ok" if workers.alive >= workers.expected else "degraded"
    return Reply({"status": status, "workers": workers.alive, "restarts": workers.restarts})


def ready(asked: Asked) -> Reply:
    """Whether jobs are taken: the database answers, the disk has room, and the server is not about to stop."""
    if asked.services.draining():
        return Reply({"status": "draining"}, 503)
    if not asked.services.reserve.holds():
        return Reply({"status": "disk_full"}, 503)
    try:
        counts = asked.services.jobs.counts()
    except AWAY:
        return Reply({"status": "no_database"}, 503)
    told = {"workers": counts.workers, "queued": counts.by_status.get("queued", 0)}
    return Reply({"status": "ready" if counts.workers else "no_workers", **told})


def metrics(asked: Asked) -> Response:
    """Numbers for Prometheus."""
    return Response(asked.services.metrics.text(), media_type=MEDIA_TYPE)


CALLS = (
    Call("GET", "/health", health, "Whether the server lives.", answers.Health, None, kind="loop"),
    Call(
        "GET",
        "/ready",
        ready,
        "Whether the server takes jobs.",
        answers.Health,
        None,
        faults=(503,),
        kind="ready",
    ),
    Call(
        "GET", "/metrics", metrics, "Numbers for Prometheus.", MEDIA_TYPE, "admin", kind="metrics"
    ),
)
