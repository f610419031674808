"""Dependencies of the routes: services, caller, pagination, idempotency key and parsed body."""

import re
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import Depends, Query, Request, Security
from fastapi.security import HTTPBearer, SecurityScopes
from pydantic import AfterValidator, BeforeValidator, Field

from skyloom.generate.request import Request as VideoRequest
from skyloom.safety.moderation import ModerationResult
from skyloom.serve.api.body import MAX_BODY, SMALL, BodyOptions, Upload, close_uploads, read_body
from skyloom.serve.api.content_checks import ContentChecks
from skyloom.serve.api.errors import ApiError, invalid, missing
from skyloom.serve.api.events import EventBroadcaster
from skyloom.serve.api.limits import BodyReservation, ByteBudget, ConcurrencyLimiters
from skyloom.serve.api.media_inputs import Fetch, MediaResolver
from skyloom.serve.api.metrics import Metrics
from skyloom.serve.api.middleware import SAFE_METHODS
from skyloom.serve.api.numbers import find_whole, read_whole
from skyloom.serve.api.request_models import RequestBody, parse_body
from skyloom.serve.api.submit import JobSubmitter, SubmitOptions
from skyloom.serve.health import WorkerHealth
from skyloom.serve.queue.api_keys import Caller, KeyStore, Scope
from skyloom.serve.queue.batches import BatchStore
from skyloom.serve.queue.database import Database
from skyloom.serve.queue.jobs import JobStore
from skyloom.serve.queue.library import CharacterLikeness, Library
from skyloom.serve.queue.sessions import CODE_PREFIX, SessionStore
from skyloom.serve.queue.webhooks import EndpointStore, Post
from skyloom.serve.settings import Settings
from skyloom.serve.storage import Asset, AssetStorage
from skyloom.serve.storage.disk_reserve import DiskReserve

MAX_PAGE = 100
_MAX_RETRY_COUNT = 9_999
_LARGE_BODY = 64 * 1024  # bytes; larger ones count as media without a search
_RESERVE_CHECK_BYTES = 2**20  # bytes of a form between two checks of the disk reserve
_ID = re.compile(r"[A-Za-z0-9_.-]{1,100}", re.ASCII)
_IDEMPOTENCY_KEY = re.compile(r"[!-~]{1,255}", re.ASCII)
_SESSION_COOKIE = "skyloom_session"
_bearer = HTTPBearer(auto_error=False, scheme_name="key")


@dataclass(frozen=True)
class SideEffects:
    """Functions that reach outside of the server process; tests replace them.

    moderate: the policy's verdict on a text
    view: the verdict on a stored picture or video and, if the flag is set, who it shows
    verify: provenance marks in a stored file
    plan: the cost of a request
    check_url: raises RequestError for a URL that must not be called
    post, fetch: HTTP requests to public addresses
    workers: state of the worker processes that the server has started
    """

    moderate: Callable[[str], ModerationResult]
    view: Callable[[Asset, bool], tuple[ModerationResult, CharacterLikeness]]
    verify: Callable[[Asset], list[dict[str, Any]]]
    plan: Callable[[VideoRequest], dict[str, Any]]
    check_url: Callable[[str], object]
    post: Post
    fetch: Fetch
    workers: Callable[[], WorkerHealth]


@dataclass(frozen=True, eq=False)
class Services:
    """Stores, limits and side effects that the routes use."""

    settings: Settings
    database: Database
    jobs: JobStore
    library: Library
    batches: BatchStore
    endpoints: EndpointStore
    storage: AssetStorage
    media: MediaResolver
    checks: ContentChecks
    submitter: JobSubmitter
    keys: KeyStore
    sessions: SessionStore
    metrics: Metrics
    effects: SideEffects
    reserve: DiskReserve
    limiters: ConcurrencyLimiters
    memory: ByteBudget
    bodies: ByteBudget
    events: EventBroadcaster
    draining: Callable[[], bool]


async def get_services(request: Request) -> Services:
    """The services of the application."""
    return request.app.state.services


AppServices = Annotated[Services, Depends(get_services)]


async def get_caller(
    request: Request,
    required: SecurityScopes,
    services: AppServices,
    _header: Annotated[object, Depends(_bearer)],
) -> Caller:
    """Authenticate the caller by API key or session cookie; check scopes and id format.

    Raises ApiError (401, 403, 404).
    """
    cookie = session_of(request)
    if cookie is None:
        authenticate = partial(services.keys.authenticate, request.headers.get("authorization"))
    else:
        _check_same_origin(request)
        authenticate = partial(services.sessions.authenticate, cookie)
    caller = await services.limiters["auth"].run("", authenticate)
    for scope in required.scopes:
        if scope not in caller.scopes:
            message = f"This key may not do that: it lacks the scope {scope}."
            raise ApiError(403, message, "insufficient_scope", type="permission_error")
    id = request.path_params.get("id")
    if id is not None and not _ID.fullmatch(id):
        raise missing("thing", id)
    request.state.owner = caller.owner
    return caller


async def sign_in(
    request: Request, services: AppServices, _header: Annotated[object, Depends(_bearer)]
) -> Caller:
    """Authenticate by an API key or a one-use code in the header. Raises ApiError (401)."""
    authorization = request.headers.get("authorization", "")
    scheme, _, text = authorization.partition(" ")
    if scheme.lower() == "bearer" and text.startswith(CODE_PREFIX):
        authenticate = partial(services.sessions.redeem, text)
    else:
        authenticate = partial(services.keys.authenticate, authorization)
    caller = await services.limiters["auth"].run("", authenticate)
    request.state.owner = caller.owner
    return caller


SignIn = Annotated[Caller, Depends(sign_in)]


def session_cookie(request: Request) -> str:
    """Name of the session cookie. It has the port, since browsers share cookies between ports."""
    port = request.url.port
    return _SESSION_COOKIE if port is None else f"{_SESSION_COOKIE}_{port}"


def session_of(request: Request) -> str | None:
    """The session cookie of a request without an Authorization header."""
    if "authorization" in request.headers:
        return None
    return request.cookies.get(session_cookie(request))


def _check_same_origin(request: Request) -> None:
    """Check that a browser sends a change from a page of this server.

    The middleware refuses foreign origins; a request with a cookie must name its origin. Raises
    ApiError (403).
    """
    if request.method in SAFE_METHODS or "origin" in request.headers:
        return
    if request.headers.get("sec-fetch-site") != "same-origin":
        message = "A change with a session cookie must have the header Origin."
        raise ApiError(403, message, "origin_required", type="permission_error")


def require_scope(scope: Scope) -> Any:
    """Dependency: the caller, authenticated and with `scope`."""
    return Security(get_caller, scopes=[scope])


Reader = Annotated[Caller, require_scope("read")]
Writer = Annotated[Caller, require_scope("write")]
Admin = Annotated[Caller, require_scope("admin")]


async def get_idempotency(request: Request) -> SubmitOptions:
    """The idempotency key and the client's retry count. Raises ApiError (400)."""
    key = request.headers.get("idempotency-key")
    if key is not None and not _IDEMPOTENCY_KEY.fullmatch(key):
        message = "Idempotency-Key must be 1 to 255 printable characters."
        raise ApiError(400, message, "invalid_header")
    retries = find_whole(request.headers.get("x-stainless-retry-count", "0")) or 0
    return SubmitOptions(key, min(retries, _MAX_RETRY_COUNT))


Idempotency = Annotated[SubmitOptions, Depends(get_idempotency)]


def _check_cursor(id: str) -> str:
    if not _ID.fullmatch(id):
        raise invalid("after", "after must be an id.")
    return id


Cursor = Annotated[Annotated[str, AfterValidator(_check_cursor)] | None, Query()]
PageSize = Annotated[
    Annotated[int, Field(ge=1, le=MAX_PAGE)],
    BeforeValidator(lambda text: read_whole("limit", text, 1, MAX_PAGE)),
    Query(),
]
Order = Literal["asc", "desc"]


async def hold_stream_place(services: AppServices, caller: Reader) -> AsyncIterator[None]:
    """Count a stream until its response has ended. Raises CapacityError over the limit."""
    limiter = services.limiters["stream"]
    await limiter.acquire(caller.owner)
    try:
        yield
    finally:
        limiter.release(caller.owner)


@dataclass(frozen=True)
class BodyOf:
    """Dependency: the body of a request, JSON or multipart, as a model.

    Its bytes count as in flight, and its uploads stay open, until the handler has returned.
    """

    model: type[RequestBody]

    async def __call__(
        self, request: Request, services: AppServices, caller: Writer
    ) -> AsyncIterator[RequestBody]:
        """Read, check and parse. Raises ApiError (400, 413, 415, 429, 503), DiskFullError."""
        owner, limiters = caller.owner, services.limiters
        fields: dict[str, Any] = {}
        with BodyReservation(owner, services.memory, services.bodies) as reservation:
            try:
                fields = await limiters["body"].run_coroutine(
                    owner, self._read(request, services, owner, reservation)
                )
                large = reservation.size > _LARGE_BODY
                request.state.has_media = self.model.takes_media and (large or has_media(fields))
                parse = partial(parse_body, self.model, fields)
                yield (
                    parse()
                    if reservation.size <= SMALL
                    else await limiters["parse"].run(owner, parse)
                )
            finally:
                close_uploads(fields)

    async def _read(
        self, request: Request, services: Services, owner: str, reservation: BodyReservation
    ) -> dict[str, Any]:
        """Read the fields, within the limits on bytes in flight and the disk reserve."""
        kind = request.headers.get("content-type", "").strip().lower()
        is_form = kind.startswith("multipart/")
        if is_form:
            length = find_whole(request.headers.get("content-length", "0")) or 0
            services.reserve.check(min(length, MAX_BODY))

        def take(count: int) -> None:
            before = reservation.size
            reservation.add_body(count)
            if (
                is_form
                and before // _RESERVE_CHECK_BYTES < reservation.size // _RESERVE_CHECK_BYTES
            ):
                services.reserve.check()

        intake = BodyOptions(
            media=self.model.takes_media,
            off_loop=partial(services.limiters["parse"].run, owner),
            on_read=take,
            on_buffer=reservation.add_memory,
        )
        return await read_body(request.headers, request.stream(), intake)


def has_media(value: object) -> bool:
    """Whether fields hold an upload or a URL (also data:), which takes long to store or fetch."""
    if isinstance(value, Upload):
        return True
    if isinstance(value, str):
        nested = value.lstrip()[:1] in ("{", "[") and "image_url" in value
        return nested or value[:6].lower().startswith(("data:", "http:", "https:"))
    if isinstance(value, Mapping):
        return any(map(has_media, value.values()))
    return isinstance(value, list) and any(map(has_media, value))
