"""Limits on connections: their count, and the time for a head, a body and an unread response.

uvicorn's HTTP/1.1 protocol with timeouts. When all places are taken, the oldest connection without
a request in progress is closed, so half-open connections keep no other client out. Responses made
here use the usual error body.
"""

import asyncio
import ipaddress
import json
import re
import secrets
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal

import h11
from h11._receivebuffer import ReceiveBuffer  # private, but the only place that sees line ends
from uvicorn.protocols.http.h11_impl import H11Protocol

from skyloom.serve.api.errors import ApiError
from skyloom.serve.api.middleware import SECURITY_HEADERS

_IPV6_HOST_BITS = 64  # a host can use every address of its /64 network
_LOOSE_LINES = re.compile(rb"(?<!\r)\n|\n[ \t]")
Phase = Literal["head", "body", "response", "rest"]


@dataclass(frozen=True)
class ConnectionTimeouts:
    """Timeouts in seconds.

    `head` and `body` limit the reading of a request; a body has one more second for every
    `body_rate` bytes received. `rest` limits the remainder of a body after the response was sent,
    `unread` the time that a client does not read the response, `close` the time from a refusal to
    the abort of the connection.
    """

    head: float = 10.0
    body: float = 30.0
    body_rate: float = 1_000.0
    rest: float = 5.0
    unread: float = 60.0
    close: float = 2.0


class Connections:
    """Table of open connections, limited to `total` and to `per_address` of one address."""

    def __init__(
        self, total: int, per_address: int, timeouts: ConnectionTimeouts | None = None
    ) -> None:
        self._total = total
        self._per_address = per_address
        self.timeouts = timeouts or ConnectionTimeouts()
        self._open: dict[Connection, str] = {}  # oldest first
        self._counts: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._open)

    def admit(self, connection: "Connection", address: str) -> bool:
        """Add a connection, closing an idle one if necessary. Returns False if no place is free."""
        if self._counts[address] >= self._per_address:
            candidates = [old for old, place in self._open.items() if place == address]
            admitted = self._close_idle(candidates)
        else:
            admitted = len(self) < self._total or self._close_idle(list(self._open))
        if admitted:
            self._open[connection] = address
            self._counts[address] += 1
        return admitted

    def remove(self, connection: "Connection") -> None:
        """Remove a connection; no effect if it was removed before."""
        if (address := self._open.pop(connection, None)) is not None:
            self._counts[address] -= 1
            self._counts += Counter()  # removes addresses with a count of 0

    def _close_idle(self, candidates: "list[Connection]") -> bool:
        """Abort the oldest connection that waits for a head; one without any request goes first."""
        idle = [connection for connection in candidates if connection.phase == "head"]
        unused = [connection for connection in idle if connection.cycle is None]
        if not idle:
            return False
        chosen = (unused or idle)[0]
        self.remove(chosen)
        chosen.abort()
        return True


class Connection(H11Protocol):
    """One HTTP/1.1 connection with timeouts for each phase of a request."""

    def __init__(self, connections: Connections, **options: Any) -> None:
        super().__init__(**options)
        self.conn._receive_buffer = _StrictBuffer()
        self.phase: Phase = "head"
        self._connections = connections
        self._timeouts = connections.timeouts
        self._timer: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._closed = False
        self._received = 0  # bytes since the phase began
        self._since = 0.0  # time of the event loop at which the phase began

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Admit the connection, or answer 503 and close it."""
        super().connection_made(transport)
        if self._connections.admit(self, _network(self.client[0] if self.client else "")):
            self._begin("head")
            return
        message = "The server has no free connection. Try again in a moment."
        self._refuse(503, message, "too_many_connections", {"retry-after": "5"})

    def connection_lost(self, exc: Exception | None) -> None:
        """Remove the connection from the table and cancel its timers."""
        self._connections.remove(self)
        self._closed = True
        for timer in (self._timer, self._unread):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Process received bytes and update the phase and its timer."""
        if self._closed:
            return
        self._received += len(data)
        super().data_received(data)
        self._update_phase(received=True)

    def on_response_complete(self) -> None:
        """Update the phase after a response."""
        super().on_response_complete()
        self._update_phase(received=False)

    def send_400_response(self, msg: str) -> None:
        """Answer invalid HTTP with the usual error body."""
        self._refuse(400, "The request must be valid HTTP/1.1.", "invalid_http")

    def pause_writing(self) -> None:
        """Start the timer for an unread response."""
        super().pause_writing()
        self._unread = self.loop.call_later(self._timeouts.unread, self.abort)

    def resume_writing(self) -> None:
        """Cancel the timer for an unread response."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    def shutdown(self) -> None:
        """Close after the current response."""
        with suppress(h11.LocalProtocolError):  # already closing
            super().shutdown()

    def abort(self) -> None:
        """Close at once."""
        self._closed = True
        self.transport.abort()

    def _update_phase(self, *, received: bool) -> None:
        """Enter the phase of h11's state; `received` is False after a response was sent."""
        if self._closed or self.transport.is_closing():
            return
        phase = self._find_phase()
        if phase != self.phase:
            self._begin(phase, timed=received or phase != "head")
        elif phase == "head" and received and self._timer is None:
            self._begin(phase)  # the first bytes of the next request

    def _find_phase(self) -> Phase:
        if self.conn.their_state is h11.IDLE:
            return "head"
        if self.conn.their_state is not h11.SEND_BODY:
            return "response"
        return "rest" if self.cycle.response_complete else "body"

    def _begin(self, phase: Phase, *, timed: bool = True) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.phase = phase
        self._since = self.loop.time()
        self._received = 0
        timeouts = {
            "head": self._timeouts.head,
            "body": self._timeouts.body,
            "rest": self._timeouts.rest,
        }
        if timed and phase in timeouts:
            self._timer = self.loop.call_later(timeouts[phase], self._expire)

    def _expire(self) -> None:
        """End the connection after a timeout, unless a body has earned more time."""
        self._timer = None
        if self.phase == "body":
            if self.flow.read_paused:  # the application does not read: the client is on time
                self._begin("body")
                return
            earned = self._received / self._timeouts.body_rate
            remaining = self._since + self._timeouts.body + earned - self.loop.time()
            if remaining > 0:
                self._timer = self.loop.call_later(remaining, self._expire)
                return
        if self.phase == "rest" or (self.phase == "head" and not self._received):
            self.abort()
            return
        message = f"The {self.phase} of the request was not received in time."
        self._refuse(408, message, "request_timeout")

    def _refuse(
        self, status: int, message: str, code: str, headers: dict[str, str] | None = None
    ) -> None:
        """Close the connection; send an error first unless a response has started."""
        self._closed = True
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            self.transport.write(_response(ApiError(status, message, code, headers=headers)))
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()
        self._timer = self.loop.call_later(self._timeouts.close, self.transport.abort)


class _StrictBuffer(ReceiveBuffer):
    """h11's receive buffer, strict about line ends.

    It rejects bare line feeds and folded lines, which proxies parse differently.
    """

    def __init__(self) -> None:
        super().__init__()
        self._head: bytearray | None = None

    def maybe_extract_lines(self) -> list[bytearray] | None:
        """Return the lines of a complete head.

        Raises LocalProtocolError for malformed line ends.
        """
        self._head = bytearray()
        lines = super().maybe_extract_lines()
        head = self._head
        self._head = None
        if lines and _LOOSE_LINES.search(head):
            raise h11.LocalProtocolError("bare line feed or folded line")
        return lines

    def _extract(self, count: int) -> bytearray:
        extracted = super()._extract(count)
        if self._head is not None:
            self._head = extracted
        return extracted


def _network(address: str) -> str:
    """Return the address of an IPv4 client, the /64 network of an IPv6 client."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    mapped = found.ipv4_mapped
    return str(mapped or ipaddress.IPv6Network((found, _IPV6_HOST_BITS), strict=False))


def _response(error: ApiError) -> bytes:
    """Serialise an error as a whole HTTP response that closes the connection."""
    request_id = f"req_{secrets.token_hex(16)}"
    body = json.dumps(error.body).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        "x-request-id": request_id,
        **SECURITY_HEADERS,
        **error.headers,
    }
    lines = [
        f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}",
        *(f"{name}: {value}" for name, value in headers.items()),
        "",
        "",
    ]
    return "\r\n".join(lines).encode() + body
