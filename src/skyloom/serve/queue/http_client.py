"""Requests that leave this machine: to addresses that are checked first, and to no other.

One parser reads the URL, its host is resolved once, every address must be a public one, and the connection goes to one
of those addresses; redirects are not followed. So a name cannot lead inside, nor change its mind between the check and
the use.

A call has one deadline for all of it: name look-up, connection, TLS, request, and answer. It is looked at before every
read and write, so a peer that sends a byte from time to time gains nothing. Bytes of an answer are counted too.
"""

import contextlib
import http.client
import io
import ipaddress
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import SplitResult, urlsplit

from skyloom.core.errors import RequestError

Resolve = Callable[[str, int], Sequence[str]]
SECONDS, GET_SECONDS = 8.0, 30.0  # for all of a call, and for all of a download
_PIECE = 256 * 1024
_HEAD_BYTES = 64 * 1024  # of a status line and headers, and of what frames the chunks of a body
_LOOKUPS = threading.BoundedSemaphore(32)  # a look-up cannot be stopped: so many may hang at once
_TRANSLATED = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))
# What Python 3.11 calls global and is not: protocol assignments (a cloud's metadata among them), the old 6to4 relay,
# documentation, segment routing, and the address by which Azure's machines ask their host.
_SPECIAL = tuple(
    map(
        ipaddress.ip_network,
        ("192.0.0.0/24", "192.88.99.0/24", "3fff::/20", "5f00::/16", "168.63.129.16/32"),
    )
)


@dataclass(frozen=True)
class Target:
    """A URL that may be asked, and the addresses that it was checked for."""

    scheme: str
    host: str
    port: int
    path: str
    addresses: tuple[str, ...]


class TooLongError(OSError):
    """An answer has more bytes than it may have."""


class Deadline:
    """A point in time, `seconds` from now by `clock`, by which all of a call must be done."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until = clock() + seconds

    def left(self) -> float:
        """Seconds left, more than 0. Raises TimeoutError when there are none."""
        left = self._until - self._clock()
        if left <= 0:
            raise TimeoutError("the deadline of the call is over")
        return left


def resolve(host: str, port: int, deadline: Deadline | None = None) -> list[str]:
    """All addresses of a host, by the deadline (default: SECONDS from now). Raises RequestError for one that has none,
    or whose look-up takes too long."""
    deadline = deadline or Deadline(SECONDS)
    slots = _LOOKUPS
    found: queue.SimpleQueue[list[str] | Exception] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            rows = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found.put([str(row[4][0]) for row in rows])
        except (OSError, UnicodeError) as error:
            found.put(error)
        finally:
            slots.release()

    late = RequestError(
        f"The host {host!r:.80} is not found in time.", hint="Check the URL, or try again."
    )
    try:
        if not slots.acquire(timeout=deadline.left()):
            raise late
        threading.Thread(
            target=look_up, name="look-up", daemon=True
        ).start()  # the C library's look-up has no time-out
        addresses = found.get(timeout=deadline.left())
    except (queue.Empty, TimeoutError) as error:
        raise late from error
    if isinstance(addresses, Exception):
        raise RequestError(
            f"The host {host!r:.80} is not known.", hint="Check the URL."
        ) from addresses
    return addresses


def check_url(url: str, *, loopback: bool = False, resolve: Resolve = resolve) -> Target:
    """Where a URL leads, if it may be asked. Only https to public addresses; with `loopback`, also http and https to
    this machine itself. Raises RequestError."""
    parts = _split(url)
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    addresses = tuple(dict.fromkeys(resolve(host, port)))
    inside = [address for address in addresses if not is_public(address)]
    if (
        loopback
        and addresses
        and all(ipaddress.ip_address(address).is_loopback for address in addresses)
    ):
        inside = []
    elif parts.scheme != "https":
        raise RequestError(f"{parts.scheme}:// is not allowed.", hint="Use https.")
    if inside or not addresses:
        raise RequestError(
            "The URL leads to an address that is not public.", hint="Use a public host."
        )
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(parts.scheme, host, port, path, addresses)


def is_public(address: str) -> bool:
    """Whether an address is one of the open internet, also inside what IPv6 wraps around IPv4."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        wrapped = found.ipv4_mapped or found.sixtofour or (found.teredo and found.teredo[1])
        if wrapped:
            return is_public(str(wrapped))
        if any(found in network for network in _TRANSLATED):
            return is_public(str(ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)))
        if found.scope_id or found.is_site_local:
            return False
    special = any(found in network for network in _SPECIAL)
    return found.is_global and not found.is_multicast and not found.is_reserved and not special


def post(
    target: Target, headers: Mapping[str, str], body: bytes, deadline: Deadline | None = None
) -> int:
    """Send a body to a checked target; the HTTP status. Of the answer only the head is read. A redirect is an answer
    like any other. Raises OSError, TimeoutError when it is not done by the deadline (default: SECONDS from now)."""
    deadline = deadline or Deadline(SECONDS)
    with contextlib.closing(_open(target, deadline)) as opened:
        connection = _connection(target, _Wire(opened, deadline, _HEAD_BYTES))
        try:
            connection.request("POST", target.path, body=body, headers=dict(headers))
            return connection.getresponse().status
        except http.client.HTTPException as error:
            raise OSError(f"no HTTP answer ({type(error).__name__})") from error


def get(target: Target, most: int, deadline: Deadline | None = None) -> bytes:
    """The body that a checked target answers with. Raises RequestError for any answer but 200 and one that is longer
    than `most` bytes, and OSError, TimeoutError when it is not done by the deadline (default: GET_SECONDS from now)."""
    deadline = deadline or Deadline(GET_SECONDS)
    with contextlib.closing(_open(target, deadline)) as opened:
        connection = _connection(target, _Wire(opened, deadline, most + _HEAD_BYTES))
        try:
            connection.request(
                "GET", target.path, headers={"accept": "image/*, video/*", "user-agent": "skyloom"}
            )
            return _body(connection.getresponse(), most)
        except http.client.HTTPException as error:
            raise OSError(f"no HTTP answer ({type(error).__name__})") from error


def fetch(url: str, *, most: int = 64 * 2**20, deadline: Deadline | None = None) -> bytes:
    """Check a URL and get what it answers. Raises RequestError, also when nothing answers by the deadline (default:
    GET_SECONDS from now)."""
    deadline = deadline or Deadline(GET_SECONDS)
    try:
        return get(check_url(url, resolve=partial(resolve, deadline=deadline)), most, deadline)
    except (TimeoutError, TooLongError) as error:
        raise RequestError(
            "What the URL answers is too long, or too slow.", hint="Send the file instead."
        ) from error
    except OSError as error:
        raise RequestError("The URL cannot be reached.", hint="Send the file instead.") from error


def post_to(
    url: str,
    headers: Mapping[str, str],
    body: bytes,
    *,
    loopback: bool = False,
    deadline: Deadline | None = None,
) -> int:
    """Check a URL and send to it, by one deadline (default: SECONDS from now). Raises RequestError and OSError."""
    deadline = deadline or Deadline(SECONDS)
    target = check_url(url, loopback=loopback, resolve=partial(resolve, deadline=deadline))
    return post(target, headers, body, deadline)


class _Reader(io.RawIOBase):
    """Reads a socket until a deadline, and so many bytes at most."""

    def __init__(self, opened: socket.socket, deadline: Deadline, most: int) -> None:
        self._opened, self._deadline, self._left = opened, deadline, most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._opened.settimeout(self._deadline.left())
        size = self._opened.recv_into(buffer)
        self._left -= size
        if self._left < 0:
            raise TooLongError("the answer is too long")
        return size


class _Wire:
    """A connected socket as http.client uses one: reads and writes end at the deadline. Its opener closes it."""

    def __init__(self, opened: socket.socket, deadline: Deadline, most: int) -> None:
        self._opened, self._deadline, self._most = opened, deadline, most

    def sendall(self, said: bytes) -> None:
        """Send all of it."""
        rest = memoryview(said)
        while rest:
            self._opened.settimeout(self._deadline.left())
            rest = rest[self._opened.send(rest) :]

    def makefile(self, mode: str) -> io.BufferedReader:
        """What the peer says."""
        return io.BufferedReader(_Reader(self._opened, self._deadline, self._most))

    def close(self) -> None:
        """Leave it open: the body may still be read."""


def _body(answer: http.client.HTTPResponse, most: int) -> bytes:
    """The body of an answer. Raises RequestError for a bad status, and TooLongError."""
    if answer.status != http.client.OK:
        raise RequestError(f"The URL answered {answer.status}.", hint="Send the file instead.")
    if answer.length is not None and answer.length > most:
        raise TooLongError("the answer is too long")
    body = bytearray()
    while piece := answer.read(_PIECE):
        body += piece
        if len(body) > most:
            raise TooLongError("the answer is too long")
    return bytes(body)


def _split(url: str) -> SplitResult:
    """A URL in parts. What parsers read differently is refused."""
    if not url.isascii() or any(
        character in '\\@<>"{}|^`' or not "!" <= character <= "~" for character in url
    ):
        raise RequestError(
            "The URL has characters that URLs do not have.", hint="Write a plain https URL."
        )
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise RequestError("The URL cannot be read.", hint="Write a plain https URL.") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise RequestError("The URL is not one of the web.", hint="Write a plain https URL.")
    return parts


def _open(target: Target, deadline: Deadline) -> socket.socket:
    """A socket to the first address that answers; over https the certificate must be the host's. Addresses that do not
    answer share what time is left."""
    refused: OSError = OSError("no address")
    for index, address in enumerate(target.addresses):
        seconds = deadline.left() / (len(target.addresses) - index)
        try:
            opened = socket.create_connection((address, target.port), timeout=seconds)
            break
        except OSError as error:
            refused = error
    else:
        raise refused
    if target.scheme != "https":
        return opened
    try:
        opened.settimeout(deadline.left())  # of the whole handshake
        return ssl.create_default_context().wrap_socket(opened, server_hostname=target.host)
    except BaseException:
        opened.close()
        raise


def _connection(target: Target, wire: _Wire) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(target.host, target.port)
    connection.sock = wire
    return connection
