"""The application: services, calls and the guard around them, as ASGI."""

import logging
import re
import threading
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from skyloom.core.errors import CapacityError, SafetyError, UncheckedError
from skyloom.serve.api.body import MAX_BODY, Intake, Upload, close_uploads, read_body
from skyloom.serve.api.context import Asked, Call, Outside, Reply, Services
from skyloom.serve.api.errors import AWAY, WireError, missing, tell
from skyloom.serve.api.limits import (
    MEMORY_BYTES,
    MEMORY_BYTES_PER_OWNER,
    Gates,
    Hold,
    InFlight,
    Kind,
)
from skyloom.serve.api.media_inputs import Sources
from skyloom.serve.api.metrics import Metrics
from skyloom.serve.api.middleware import Guard
from skyloom.serve.api.numbers import find_whole
from skyloom.serve.api.openapi import make_document
from skyloom.serve.api.routes import (
    batches,
    edits,
    health,
    library,
    safety,
    videos,
    webhooks,
)
from skyloom.serve.api.submit import Desk
from skyloom.serve.queue.api_keys import Caller, KeyStore
from skyloom.serve.queue.batches import BatchStore
from skyloom.serve.queue.database import Database
from skyloom.serve.queue.jobs import JobStore
from skyloom.serve.queue.library import Library
from skyloom.serve.queue.moderation_counters import BLOCKED, FAILED
from skyloom.serve.queue.quotas import Quotas
from skyloom.serve.queue.webhooks import EndpointStore
from skyloom.serve.settings import Settings
from skyloom.serve.storage import AssetStorage
from skyloom.serve.storage.disk_reserve import DiskReserve

ROUTES = (
    edits,
    library,
    videos,
    batches,
    webhooks,
    safety,
    health,
)
CALLS: tuple[Call, ...] = tuple(  # what has no id comes first, or {id} would take its name for one
    sorted((call for room in ROUTES for call in room.CALLS), key=lambda call: call.path.count("{"))
)
NOBODY = Caller("", ())
_ID = re.compile(r"[A-Za-z0-9_.-]{1,100}", re.ASCII)
_GONE = 499
_LARGE = 64 * 1024  # bytes of a body that is not searched for media
_LOOK_BYTES = 2**20  # of a form, after which the disk is looked at again
log = logging.getLogger(__name__)


def make_services(
    settings: Settings,
    database: Database,
    storage: AssetStorage,
    outside: Outside,
    token: str,
    stopping: threading.Event,
) -> Services:
    """Everything that calls are answered with, over one database and one storage."""
    quotas = Quotas(settings)
    jobs, library = JobStore(database, settings), Library(database, quotas)
    reserve = DiskReserve(settings.data, settings.disk_reserve)
    sources = Sources(
        jobs, library, storage, reserve, outside.fetch if settings.url_references else None
    )
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
        reserve=reserve,
        gates=Gates(),
        memory=InFlight(MEMORY_BYTES, MEMORY_BYTES_PER_OWNER),
        bodies=InFlight(settings.max_body_bytes, settings.max_body_bytes_per_owner),
        draining=stopping.is_set,
    )


def build_app(services: Services, hosts: set[str]) -> ASGIApp:
    """The application. `hosts` are the exact values of the Host header that it answers to."""
    document = JSONResponse(make_document(CALLS)).body

    async def show_document(_: HttpRequest) -> Response:
        return Response(document, media_type="application/json")

    routes = [Route(call.path, _endpoint(services, call), methods=[call.method]) for call in CALLS]
    routes.append(Route("/openapi.json", show_document))
    inner = Starlette(routes=routes, exception_handlers={HTTPException: _explain})
    inner.router.redirect_slashes = False
    return Guard(inner, hosts, services.metrics.count)


def _endpoint(services: Services, call: Call) -> Callable[[HttpRequest], Awaitable[Response]]:
    """A call as Starlette takes it: rights first, then the body, then the handler on a thread of its kind's."""

    async def answer(request: HttpRequest) -> Response:
        state = request.scope["state"]
        state["call"] = call.name
        fields: dict[str, Any] = {}
        try:
            caller = await _caller(services, call, request)
            state["owner"] = caller.owner
            with Hold(caller.owner, services.memory, services.bodies) as hold:
                try:
                    if call.body is not None:
                        fields = await services.gates["body"].hold(
                            caller.owner, _read(services, call, caller.owner, request, hold)
                        )
                    query, headers = request.query_params, request.headers
                    asked = Asked(services, caller, request.path_params, query, headers, fields)
                    reply = await _handle(asked, call, _kind(call, fields, hold.size))
                finally:
                    close_uploads(fields)
        except ClientDisconnect:
            return Response(status_code=_GONE)  # nobody reads it
        except Exception as error:
            if isinstance(error, SafetyError):
                code = FAILED if isinstance(error, UncheckedError) else BLOCKED
                count = partial(services.jobs.count_refusal, error.rule or "", error.target, code)
                with suppress(CapacityError, *AWAY):  # the answer matters more
                    await services.gates["auth"].run("", count)
            return _fault(error, state["request_id"], call.name)
        if isinstance(reply, Reply):
            return JSONResponse(dict(reply.body), reply.status, dict(reply.headers))
        return _head(reply) if request.method == "HEAD" else reply

    return answer


async def _read(
    services: Services, call: Call, owner: str, request: HttpRequest, hold: Hold
) -> dict[str, Any]:
    """The body, within what may be in flight and what the disk has room for. Raises WireError, DiskFullError."""
    form = request.headers.get("content-type", "").strip().lower().startswith("multipart/")
    if form:
        told = find_whole(request.headers.get("content-length", "0")) or 0
        services.reserve.check(min(told, MAX_BODY))

    def take(count: int) -> None:
        before = hold.size
        hold.body(count)
        if form and before // _LOOK_BYTES < hold.size // _LOOK_BYTES:
            services.reserve.check()

    parse = partial(services.gates["parse"].run, owner)
    media = call.body is not None and call.body.takes_media
    return await read_body(
        request.headers,
        request.stream(),
        Intake(media=media, off_loop=parse, take=take, hold=hold.memory),
    )


def _kind(call: Call, fields: Mapping[str, Any], size: int) -> Kind:
    """What a call is limited with; a large body is taken for one with media."""
    media = call.kind == "quick" and call.body is not None and call.body.takes_media
    return call.with_media if media and (size > _LARGE or brings_media(fields)) else call.kind


async def _handle(asked: Asked, call: Call, kind: Kind) -> Reply | Response:
    """Let a call be handled by a thread of its kind; a stream keeps its place until it has ended."""
    gates, owner = asked.services.gates, asked.owner
    work = partial(call.handle, asked)
    if kind == "loop":
        return work()
    if kind != "stream":
        return await gates[kind].run(owner, work)
    await gates["stream"].enter(owner)
    leave = partial(gates["stream"].leave, owner)
    try:
        reply = await gates["quick"].run(owner, work)
    except BaseException:
        leave()
        raise
    assert isinstance(reply, Response)
    return _Placed(reply, leave)


class _Placed(Response):
    """A response that gives its place back when it has been sent, or nobody reads it any more."""

    def __init__(self, inner: Response, leave: Callable[[], None]) -> None:
        super().__init__(status_code=inner.status_code, headers=dict(inner.headers))
        self._inner, self.leave = inner, leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await self._inner(scope, receive, send)
        finally:
            self.leave()


def brings_media(value: object) -> bool:
    """Whether fields bring a picture or video, which is stored or fetched before the answer."""
    if isinstance(value, Upload):
        return True
    if isinstance(value, str):
        nested = value.lstrip()[:1] in ("{", "[") and "image_url" in value
        return nested or value[:6].lower().startswith(("data:", "http:", "https:"))
    if isinstance(value, Mapping):
        return any(map(brings_media, value.values()))
    return isinstance(value, list) and any(map(brings_media, value))


async def _caller(services: Services, call: Call, request: HttpRequest) -> Caller:
    """Who asks. Raises WireError for one who may not, or for an id that can be nobody's."""
    caller = NOBODY
    if call.scope is not None:
        look = partial(services.keys.caller, request.headers.get("authorization"))
        caller = await services.gates["auth"].run("", look)
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
    if isinstance(reply, _Placed):
        reply.leave()
    return Response(status_code=reply.status_code, headers=dict(reply.headers))


def _explain(request: HttpRequest, error: Exception) -> Response:
    """What Starlette refuses, in our words."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    message = {404: "There is nothing at that path.", 405: "That path does not take this method."}
    fault = WireError(
        error.status_code, message.get(error.status_code, "The request is wrong."), code
    )
    told = tell(fault, request.scope["state"]["request_id"])
    return JSONResponse(dict(told.body), told.status, dict(error.headers or {}))
