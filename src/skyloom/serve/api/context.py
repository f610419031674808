"""Calls: one row for each thing that the server can be asked. Routing, rights, the OpenAPI document and the tests of
rights all read the same rows."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel
from starlette.datastructures import Headers, QueryParams
from starlette.responses import Response

from skyloom.generate.request import Request
from skyloom.safety.moderation import ModerationResult
from skyloom.serve.api.errors import WireError, invalid
from skyloom.serve.api.limits import Gates, InFlight, Kind
from skyloom.serve.api.media_inputs import Fetch, Sources
from skyloom.serve.api.metrics import Metrics
from skyloom.serve.api.numbers import find_whole, read_whole
from skyloom.serve.api.request_models import Body
from skyloom.serve.api.submit import Desk, Keys
from skyloom.serve.queue.api_keys import Caller, KeyStore, Scope
from skyloom.serve.queue.batches import BatchStore
from skyloom.serve.queue.database import Database
from skyloom.serve.queue.jobs import JobStore
from skyloom.serve.queue.library import Library, Likeness
from skyloom.serve.queue.webhooks import EndpointStore, Post
from skyloom.serve.settings import Settings
from skyloom.serve.storage.disk_reserve import DiskReserve
from skyloom.serve.storage.folder import Asset, Storage
from skyloom.serve.workers.processes import Health

POLL_AFTER_MS = 500
LONGEST_PAGE = 100
_MOST_RETRIES = 9_999
_ID = re.compile(r"[A-Za-z0-9_.-]{1,100}", re.ASCII)
_KEY = re.compile(r"[!-~]{1,255}", re.ASCII)


@dataclass(frozen=True, eq=False)
class Services:
    """All that calls are answered with."""

    settings: Settings
    database: Database
    jobs: JobStore
    library: Library
    batches: BatchStore
    endpoints: EndpointStore
    storage: Storage
    sources: Sources
    desk: Desk
    keys: KeyStore
    metrics: Metrics
    outside: "Outside"
    reserve: DiskReserve
    gates: Gates
    memory: InFlight
    bodies: InFlight
    draining: Callable[[], bool]


@dataclass(frozen=True)
class Outside:
    """What the server cannot do by itself, so that tests can stand in for it.

    `moderate` says what the policy finds in a text, `view` what it finds in a stored picture or video and, if asked,
    who that shows; `verify` looks for marks in a stored file; `plan` says what a request would take; `check_url` raises
    RequestError for a URL that may not be called, `post` calls one and `fetch` gets what one answers; `workers` says
    how the worker processes are that the server has started.
    """

    moderate: Callable[[str], ModerationResult]
    view: Callable[[Asset, bool], tuple[ModerationResult, Likeness]]
    verify: Callable[[Asset], list[dict[str, Any]]]
    plan: Callable[[Request], dict[str, Any]]
    check_url: Callable[[str], object]
    post: Post
    fetch: Fetch
    workers: Callable[[], Health]


@dataclass(frozen=True, eq=False)
class Asked:
    """One call as its handler sees it: who asks, the ids of the path, the query, the body's fields."""

    services: Services
    caller: Caller
    path: Mapping[str, str]
    query: QueryParams
    headers: Headers
    fields: Mapping[str, Any]

    @property
    def owner(self) -> str:
        """Whose things may be seen."""
        return self.caller.owner

    @property
    def id(self) -> str:
        """The id in the path."""
        return self.path["id"]

    def keys(self) -> Keys:
        """By what this call is known when it comes again. Raises WireError for a key that is none."""
        key = self.headers.get("idempotency-key")
        if key is not None and not _KEY.fullmatch(key):
            raise WireError(
                400, "Idempotency-Key must be 1 to 255 printable characters.", "invalid_header"
            )
        told = self.headers.get("x-stainless-retry-count", "0")
        return Keys(key, min(find_whole(told) or 0, _MOST_RETRIES))

    def page(self) -> "Page":
        """What page of a list is asked for. Raises WireError."""
        limit, order = self.query.get("limit", "20"), self.query.get("order", "desc")
        length = read_whole("limit", limit, 1, LONGEST_PAGE)
        if order not in ("asc", "desc"):
            raise invalid("order", "order must be asc or desc.")
        after = self.query.get("after")
        if after is not None and not _ID.fullmatch(after):
            raise invalid("after", "after must be an id.")
        return Page(after, length, order == "desc")


@dataclass(frozen=True)
class Page:
    """A part of a list."""

    after: str | None
    limit: int
    newest_first: bool


@dataclass(frozen=True)
class Reply:
    """An answer as plain values, with headers."""

    body: Mapping[str, Any]
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict[str, str])


Handler = Callable[[Asked], Reply | Response]


@dataclass(frozen=True)
class Call:
    """A method and a path, what handles it, and what it takes and gives. `scope` None is open to everybody; `kind` says
    with which calls it shares a limit, `with_media` with which where a body may and does bring pictures or videos."""

    method: Literal["GET", "POST", "DELETE"]
    path: str
    handle: Handler
    summary: str
    answer: type[BaseModel] | str
    scope: Scope | None = "read"
    body: type[Body] | None = None
    query: tuple[str, ...] = ()
    faults: tuple[int, ...] = ()
    kind: Kind = "quick"
    with_media: Kind = "upload"

    @property
    def name(self) -> str:
        """A name for logs and metrics: the path as it is written here, without anybody's ids."""
        return f"{self.method} {self.path}"


PAGE = ("after", "limit", "order")
