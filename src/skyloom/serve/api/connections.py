"""Connections, bounded: how many in all and per address, and how long a head, a body and an unread answer may take.

uvicorn's protocol with limits. When there is no room, the oldest connection without a request in hand makes room, so
half-open connections keep nobody out. What is answered here has the usual envelope.
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
from h11._receivebuffer import ReceiveBuffer  # the only place where line ends are seen
from uvicorn.protocols.http.h11_impl import H11Protocol

from skyloom.serve.api.errors import ApiError
from skyloom.serve.api.middleware import SECURITY_HEADERS

_IPV6_HOST_BITS = 64  # a host has as many addresses as it likes in its network
_LOOSE_LINES = re.compile(rb"(?<!\r)\n|\n[ \t]")
Phase = Literal["head", "body", "answer", "rest"]


@dataclass(frozen=True)
class Times:
    """Seconds that a connection may take for a request's head; for a body, plus a second for every `body_rate` bytes of
    it; for the rest of a body that was answered before its end; and without reading what is sent to it."""

    head: float = 10.0
    body: float = 30.0
    body_rate: float = 1_000.0
    rest: float = 5.0
    unread: float = 60.0
    close: float = 2.0


class Connections:
    """All open connections of a server: `total` of them, `per_address` of an address."""

    def __init__(self, total: int, per_address: int, times: Times | None = None) -> None:
        self._total, self._per_address, self.times = total, per_address, times or Times()
        self._open: dict[Connection, str] = {}  # in the order of their beginning
        self._counts: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._open)

    def admit(self, one: "Connection", address: str) -> bool:
        """Count a connection in, if need be in the place of one that has no request in hand; whether there was room."""
        if self._counts[address] >= self._per_address:
            admitted = self._make_room(
                [old for old, place in self._open.items() if place == address]
            )
        else:
            admitted = len(self) < self._total or self._make_room(list(self._open))
        if admitted:
            self._open[one] = address
            self._counts[address] += 1
        return admitted

    def forget(self, one: "Connection") -> None:
        """Count a connection out."""
        if (address := self._open.pop(one, None)) is not None:
            self._counts[address] -= 1
            self._counts += Counter()

    def _make_room(self, among: "list[Connection]") -> bool:
        """Drop the oldest that waits for a head, first of those that have never sent one."""
        waiting = [one for one in among if one.phase == "head"]
        victim = next(
            (one for one in waiting if one.cycle is None), waiting[0] if waiting else None
        )
        if victim is None:
            return False
        self.forget(victim)
        victim.abort()
        return True


class Connection(H11Protocol):
    """One connection."""

    def __init__(self, connections: Connections, **options: Any) -> None:
        super().__init__(**options)
        self.conn._receive_buffer = _StrictBuffer()
        self.phase: Phase = "head"
        self._connections, self._times = connections, connections.times
        self._timer: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._over, self._received, self._since = False, 0, 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Let it in, or say why not."""
        super().connection_made(transport)
        if self._connections.admit(self, _network(self.client[0] if self.client else "")):
            self._begin("head")
        else:
            self._refuse(
                503, "There are too many connections.", "too_many_connections", {"retry-after": "5"}
            )

    def connection_lost(self, exc: Exception | None) -> None:
        """Count it out."""
        self._connections.forget(self)
        self._over = True
        for timer in (self._timer, self._unread):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes, and look at the time that the next ones may take."""
        if self._over:
            return
        self._received += len(data)
        super().data_received(data)
        self._follow(some=True)

    def on_response_complete(self) -> None:
        """The next request's time begins."""
        super().on_response_complete()
        self._follow(some=False)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is answered in the usual envelope."""
        self._refuse(400, "That is not a valid HTTP/1.1 request.", "invalid_http")

    def pause_writing(self) -> None:
        """The client does not read: it has some time to begin again."""
        super().pause_writing()
        self._unread = self.loop.call_later(self._times.unread, self.abort)

    def resume_writing(self) -> None:
        """It reads again."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    def shutdown(self) -> None:
        """End after the answer in hand."""
        with suppress(h11.LocalProtocolError):  # it is ending already
            super().shutdown()

    def abort(self) -> None:
        """End at once."""
        self._over = True
        self.transport.abort()

    def _follow(self, *, some: bool) -> None:
        """Note the phase that the bytes so far have led to; `some` bytes came just now."""
        if self._over or self.transport.is_closing():
            return
        phase = self._find_phase()
        if phase != self.phase:
            self._begin(phase, timed=some or phase != "head")
        elif (
            phase == "head" and some and self._timer is None
        ):  # the first bytes since the last answer
            self._begin(phase)

    def _find_phase(self) -> Phase:
        if self.conn.their_state is h11.IDLE:
            return "head"
        if self.conn.their_state is not h11.SEND_BODY:
            return "answer"
        return "rest" if self.cycle.response_complete else "body"

    def _begin(self, phase: Phase, *, timed: bool = True) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.phase, self._since, self._received = phase, self.loop.time(), 0
        seconds = {
            "head": self._times.head,
            "body": self._times.body,
            "rest": self._times.rest,
        }.get(phase)
        if timed and seconds is not None:
            self._timer = self.loop.call_later(seconds, self._late)

    def _late(self) -> None:
        """The time of a phase is over."""
        self._timer = None
        if self.phase == "body":
            if self.flow.read_paused:  # it is our turn, not the client's
                self._begin("body")
                return
            more = (
                self._since
                + self._times.body
                + self._received / self._times.body_rate
                - self.loop.time()
            )
            if more > 0:
                self._timer = self.loop.call_later(more, self._late)
                return
        if self.phase == "rest" or (self.phase == "head" and not self._received):
            self.abort()
        else:
            self._refuse(
                408, f"The {self.phase} of the request came too slowly.", "request_timeout"
            )

    def _refuse(
        self, status: int, message: str, code: str, headers: dict[str, str] | None = None
    ) -> None:
        """Answer, unless an answer has begun, and close."""
        self._over = True
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            self.transport.write(_answer(ApiError(status, message, code, headers=headers)))
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()
        self._timer = self.loop.call_later(self._times.close, self.transport.abort)


class _StrictBuffer(ReceiveBuffer):
    """h11's buffer, without its patience for heads with bare line feeds and folded lines, which proxies read in other
    ways."""

    def __init__(self) -> None:
        super().__init__()
        self._head: bytearray | None = None

    def maybe_extract_lines(self) -> list[bytearray] | None:
        """The lines of a whole head. Raises LocalProtocolError for line ends that are none."""
        self._head = bytearray()
        lines = super().maybe_extract_lines()
        head, self._head = self._head, None
        if lines and _LOOSE_LINES.search(head):
            raise h11.LocalProtocolError("bare line feed or folded line")
        return lines

    def _extract(self, count: int) -> bytearray:
        taken = super()._extract(count)
        if self._head is not None:
            self._head = taken
        return taken


def _network(address: str) -> str:
    """The address, or the network of an IPv6 host."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    mapped = found.ipv4_mapped
    return str(mapped or ipaddress.IPv6Network((found, _IPV6_HOST_BITS), strict=False))


def _answer(fault: ApiError) -> bytes:
    """A whole answer, for a connection that ends with it."""
    request_id = f"req_{secrets.token_hex(16)}"
    body = json.dumps(fault.body).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
    }
    headers |= {"x-request-id": request_id, **SECURITY_HEADERS, **fault.headers}
    lines = [f"HTTP/1.1 {fault.status} {HTTPStatus(fault.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body
