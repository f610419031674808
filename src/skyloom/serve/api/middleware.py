"""ASGI middleware: request ids, security headers, the access log, checks of Host and Origin.

A page of another site can send requests to a server on this machine, and can give the server's
address a name of its own (DNS rebinding). So the Host header must be one of the server's, and
requests that change something must come from the same origin. `Origin` and `Sec-Fetch-Site` are
checked; the Origin `null` is refused.
"""

import logging
import secrets
import time
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from skyloom.serve.api.errors import ApiError, respond

MAX_HEADERS = 100
MAX_HEADER_BYTES = 32 * 1024
MAX_PATH = 2_000
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
}
log = logging.getLogger(__name__)


def local_hosts(port: int) -> set[str]:
    """Values of the Host header for a server on this machine."""
    return {f"{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]")}


class RequestLogMiddleware:
    """Give every request an id and security headers; count and log it.

    Answers unexpected exceptions (500).
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{secrets.token_hex(16)}"
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        start = time.monotonic()
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(raw=message["headers"])
                headers["x-request-id"] = request_id
                headers.update(SECURITY_HEADERS)
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception as error:
            if status:
                raise
            response = respond(error, request_id, state.get("route", "other"))
            await response(scope, receive, send_with_headers)
        self._record(scope, status, time.monotonic() - start)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        """Count and log an answered request."""
        state = scope["state"]
        route = state.get("route", "other")
        scope["app"].state.services.metrics.count(route, status, seconds)
        fields = {
            "request_id": state["request_id"],
            "call": route,
            "status": status,
            "owner": state.get("owner"),
        }
        log.info("%s answered %s in %.0f ms", route, status, 1_000 * seconds, extra=fields)


class HostOriginMiddleware:
    """Refuse other Host values than `hosts`, changes from other origins, and oversized heads."""

    def __init__(self, app: ASGIApp, hosts: Iterable[str]) -> None:
        self._app = app
        self._hosts = frozenset(host.lower() for host in hosts)
        self._origins = frozenset(
            f"{scheme}://{host}" for host in self._hosts for scheme in ("http", "https")
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http":
            try:
                headers = Headers(scope=scope)
                _check_size(scope["path"], headers)
                self._check_host(headers)
                if scope["method"] not in SAFE_METHODS:
                    self._check_origin(headers)
            except ApiError as error:
                response = respond(error, scope["state"]["request_id"], "other")
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check_host(self, headers: Headers) -> None:
        hosts = headers.getlist("host")
        if len(hosts) != 1 or hosts[0].lower() not in self._hosts:
            message = "This server is not known by that name. Add it to `hosts` in its settings."
            raise _forbidden(message, "host_not_allowed")

    def _check_origin(self, headers: Headers) -> None:
        origins = headers.getlist("origin")
        other = len(origins) > 1 or (origins and origins[0].lower() not in self._origins)
        if other or headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            message = "Pages of other sites cannot change anything here."
            raise _forbidden(message, "origin_not_allowed")


def _check_size(path: str, headers: Headers) -> None:
    """Raise ApiError for an oversized or ambiguous head."""
    if "transfer-encoding" in headers and "content-length" in headers:
        message = (
            "Send Content-Length or Transfer-Encoding, not both."  # proxies differ in which wins
        )
        raise ApiError(400, message, "invalid_header", headers={"connection": "close"})
    size = sum(len(name) + len(value) for name, value in headers.raw)
    if len(headers.raw) > MAX_HEADERS or size > MAX_HEADER_BYTES:
        raise ApiError(431, "The headers are too many or too long.", "headers_too_large")
    if len(path) > MAX_PATH:
        raise ApiError(414, "The path is too long.", "path_too_long")


def _forbidden(message: str, code: str) -> ApiError:
    return ApiError(403, message, code, type="permission_error")
