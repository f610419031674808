"""The application: services, calls and the guard around them, as ASGI."""

import logging
import re
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from skyloom.core.errors import SafetyError, UncheckedError
from skyloom.serve import (
    routes_batches,
    routes_edits,
    routes_health,
    routes_library,
    routes_safety,
    routes_videos,
    routes_webhooks,
)
from skyloom.serve.auth import Caller, KeyStore
from skyloom.serve.batches import BatchStore
from skyloom.serve.body import close_uploads, read_body
from skyloom.serve.calls import Asked, Call, Outside, Reply, Services
from skyloom.serve.database import Database
from skyloom.serve.desk import Desk
from skyloom.serve.faults import AWAY, WireError, missing, tell
from skyloom.serve.guard import Guard
from skyloom.serve.jobs import JobStore
from skyloom.serve.library import Library
from skyloom.serve.metrics import Metrics
from skyloom.serve.openapi import make_document
from skyloom.serve.quotas import Quotas
from skyloom.serve.references import Sources
from skyloom.serve.refusals import BLOCKED, FAILED
from skyloom.serve.settings import Settings
from skyloom.serve.storage import Storage
from skyloom.serve.webhooks import EndpointStore

ROUTES = (routes_edits, routes_library, routes_videos, routes_batches, routes_webhooks, routes_safety, routes_health)
CALLS: tuple[Call, ...] = tuple(  # what has no id comes first, or {id} would take its name for one
    sorted((call for room in ROUTES for call in room.CALLS), key=lambda call: call.path.count("{"))
)
NOBODY = Caller("", ())
_ID = re.compile(r"[A-Za-z0-9_.-]{1,100}", re.ASCII)
_GONE = 499
log = logging.getLogger(__name__)


def make_services(
    settings: Settings, database: Database, storage: Storage, outside: Outside, token: str, stopping: threading.Event
) -> Services:
    """Everything that calls are answered with, over one database and one storage."""
    quotas = Quotas(settings)
    jobs, library = JobStore(database, settings), Library(database, quotas)
    sources = Sources(jobs, library, storage, outside.fetch if settings.url_references else None)
    return Services(
        settings=settings,
        database=database,
        jobs=jobs,
        library=library,
        batches=BatchStore(database, jobs, quotas),
        endpoints=EndpointStore(database, quotas),
        storage=storage,
        sources=sources,
        desk=Desk(settings, jobs, library, sources, outside.moderate),
        keys=KeyStore(database, token),
        metrics=Metrics(jobs.counts, jobs.refusals, outside.workers),
        outside=outside,
        draining=stopping.is_set,
    )


def build_app(services: Services, hosts: set[str]) -> ASGIApp:
    """The application. `hosts` are the exact values of the Host header that it answers to."""
    document = make_document(CALLS)

    async def show_document(_: HttpRequest) -> Response:
        return JSONResponse(document)

    routes = [Route(call.path, _endpoint(services, call), methods=[call.method]) for call in CALLS]
    routes.append(Route("/openapi.json", show_document))
    inner = Starlette(routes=routes, exception_handlers={HTTPException: _explain})
    inner.router.redirect_slashes = False
    return Guard(inner, hosts, services.metrics.count)


def _endpoint(services: Services, call: Call) -> Callable[[HttpRequest], Awaitable[Response]]:
    """A call as Starlette takes it: rights first, then the body, then the handler on a thread of its own."""

    async def answer(request: HttpRequest) -> Response:
        state = request.scope["state"]
        state["call"] = call.name
        fields: dict[str, Any] = {}
        try:
            caller = await _caller(services, call, request)
            state["owner"] = caller.owner
            if call.body is not None:
                fields = await read_body(request.headers, request.stream())
            asked = Asked(services, caller, request.path_params, request.query_params, request.headers, fields)
            reply = await run_in_threadpool(call.handle, asked)
        except ClientDisconnect:
            return Response(status_code=_GONE)  # nobody reads it
        except Exception as error:
            if isinstance(error, SafetyError):
                code = FAILED if isinstance(error, UncheckedError) else BLOCKED
                await run_in_threadpool(services.jobs.count_refusal, error.rule or "", error.target, code)
            return _fault(error, state["request_id"], call.name)
        finally:
            close_uploads(fields)
        if isinstance(reply, Reply):
            return JSONResponse(dict(reply.body), reply.status, dict(reply.headers))
        return _head(reply) if request.method == "HEAD" else reply

    return answer


async def _caller(services: Services, call: Call, request: HttpRequest) -> Caller:
    """Who asks. Raises WireError for one who may not, or for an id that can be nobody's."""
    caller = NOBODY
    if call.scope is not None:
        caller = await run_in_threadpool(services.keys.caller, request.headers.get("authorization"))
        if call.scope not in caller.scopes:
            message = f"This key may not do that: it lacks the scope {call.scope}."
            raise WireError(403, message, "insufficient_scope", type="permission_error")
    if (id := request.path_params.get("id")) is not None and not _ID.fullmatch(id):
        raise missing("thing", id)
    return caller


def _fault(error: Exception, request_id: str, call: str) -> Response:
    told = tell(error, request_id)
    if isinstance(error, AWAY):  # said once a call, in one line: it may be away for long
        log.warning("the database does not answer", extra={"request_id": request_id, "call": call})
    elif told.status >= 500:  # noqa: PLR2004 - ours, not the client's
        log.error("a call failed", exc_info=error, extra={"request_id": request_id, "call": call})
    return JSONResponse(dict(told.body), told.status, dict(told.headers))


def _head(reply: Response) -> Response:
    """The same headers, and no body to read for nobody."""
    return Response(status_code=reply.status_code, headers=dict(reply.headers))


def _explain(request: HttpRequest, error: Exception) -> Response:
    """What Starlette refuses, in our words."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    message = {404: "There is nothing at that path.", 405: "That path does not take this method."}
    fault = WireError(error.status_code, message.get(error.status_code, "The request is wrong."), code)
    told = tell(fault, request.scope["state"]["request_id"])
    return JSONResponse(dict(told.body), told.status, dict(error.headers or {}))
