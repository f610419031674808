"""Health, readiness and metrics."""

from fastapi import Response

from skyloom.serve.api.dependencies import Admin, AppServices
from skyloom.serve.api.errors import DATABASE_ERRORS
from skyloom.serve.api.metrics import MEDIA_TYPE
from skyloom.serve.api.openapi import content
from skyloom.serve.api.response_models import HealthResponse, ReadyResponse
from skyloom.serve.api.routing import limit, make_router

_UNAVAILABLE = 503
router = make_router()


@router.get("/health")
@limit("loop")
async def get_health(services: AppServices) -> HealthResponse:
    """Check that the process lives; `degraded` while a worker of its own is dead."""
    workers = services.effects.workers()
    status = "ok" if workers.alive >= workers.expected else "degraded"
    return HealthResponse(status=status, workers=workers.alive, restarts=workers.restarts)


@router.get(
    "/ready",
    response_model_exclude_none=True,
    responses={_UNAVAILABLE: {"model": ReadyResponse, "description": "Jobs are not accepted."}},
)
@limit("ready")
def get_readiness(services: AppServices, response: Response) -> ReadyResponse:
    """Check that jobs are accepted."""
    answer = _readiness(services)
    if answer.workers is None:
        response.status_code = _UNAVAILABLE
    return answer


def _readiness(services: AppServices) -> ReadyResponse:
    if services.draining():
        return ReadyResponse(status="draining")
    if not services.reserve.holds():
        return ReadyResponse(status="disk_full")
    try:
        counts = services.jobs.counts()
    except DATABASE_ERRORS:
        return ReadyResponse(status="no_database")
    return ReadyResponse(
        status="ready" if counts.workers else "no_workers",
        workers=counts.workers,
        queued=counts.by_status.get("queued", 0),
    )


@router.get("/metrics", response_class=Response, responses=content(MEDIA_TYPE))
@limit("metrics")
def get_metrics(caller: Admin, services: AppServices) -> Response:
    """Metrics for Prometheus."""
    return Response(services.metrics.text(), media_type=MEDIA_TYPE)
