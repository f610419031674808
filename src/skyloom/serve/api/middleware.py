"""The guard before everything: who may talk to this server at all, under what name, and from what page.

A page of another site can send requests to a server on this machine, and can give that server's address a name of its
own (DNS rebinding). So the Host header must be exactly one of ours, and what changes something must not come from
another origin: `Origin` and `Sec-Fetch-Site` are looked at, also where a browser says `null`. The guard gives every
answer its id and its safe headers.
"""

import logging
import secrets
import time
from collections.abc import Callable, Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from skyloom.serve.api.errors import WireError, tell

MAX_HEADERS, MAX_HEADER_BYTES, MAX_PATH = 100, 32 * 1024, 2_000
READS = ("GET", "HEAD", "OPTIONS")
SAFE_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
}
_LONGEST_ID = 200
log = logging.getLogger(__name__)
Count = Callable[[str, int, float], None]


def local_hosts(port: int) -> set[str]:
    """The names under which a server on this machine is asked."""
    return {f"{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]")}


class Guard:
    """An ASGI application around the application. `hosts` are the exact values of Host that are answered."""

    def __init__(self, app: ASGIApp, hosts: Iterable[str], count: Count) -> None:
        self._app, self._count = app, count
        self._hosts = frozenset(host.lower() for host in hosts)
        self._origins = frozenset(
            f"{scheme}://{host}" for host in self._hosts for scheme in ("http", "https")
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id, since = f"req_{secrets.token_hex(16)}", time.monotonic()
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def mark(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(raw=message["headers"])
                headers["x-request-id"] = request_id
                for name, value in SAFE_HEADERS.items():
                    headers[name] = value
            await send(message)

        try:
            self.check(scope["method"], scope["path"], Headers(scope=scope))
        except WireError as fault:
            told = tell(fault, request_id)
            await JSONResponse(dict(told.body), told.status, dict(told.headers))(
                scope, receive, mark
            )
        else:
            await self._app(scope, receive, mark)
        seconds = time.monotonic() - since
        call = scope["state"].get("call", "other")
        self._count(call, status, seconds)
        fields = {
            "request_id": request_id,
            "call": call,
            "status": status,
            "owner": scope["state"].get("owner"),
        }
        log.info("%s answered %s in %.0f ms", call, status, 1_000 * seconds, extra=fields)

    def check(self, method: str, path: str, headers: Headers) -> None:
        """Raise WireError for a request that must not be looked at further."""
        if (
            "transfer-encoding" in headers and "content-length" in headers
        ):  # a proxy may believe the other one
            close = {"connection": "close"}
            message = "Send Content-Length or Transfer-Encoding, not both."
            raise WireError(400, message, "invalid_header", headers=close)
        if (
            len(headers.raw) > MAX_HEADERS
            or sum(len(k) + len(v) for k, v in headers.raw) > MAX_HEADER_BYTES
        ):
            raise WireError(431, "The headers are too many or too long.", "headers_too_large")
        if len(path) > MAX_PATH:
            raise WireError(414, "The path is too long.", "path_too_long")
        given = headers.getlist("host")
        if len(given) != 1 or given[0].lower() not in self._hosts:
            raise _forbidden(
                "This server is not known by that name. Add it to `hosts` in its settings.", "host"
            )
        origin = headers.getlist("origin")
        if method in READS:
            return
        if origin and (len(origin) > 1 or origin[0].lower() not in self._origins):
            raise _forbidden("Pages of other sites cannot change anything here.", "origin")
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise _forbidden("Pages of other sites cannot change anything here.", "origin")


def _forbidden(message: str, what: str) -> WireError:
    return WireError(403, message, f"{what}_not_allowed", type="permission_error")
