# pyright: basic
"""HTTP client for URLs that clients supply: it connects to public addresses only.

The URL is parsed once, its host resolved once, every address must be public, and the connection
goes to one of those addresses; redirects are not followed. So a name can neither lead to a private
address nor change its address between the check and the use (SSRF, DNS rebinding).

A call has one deadline for name lookup, connection, TLS, request and response. It is checked before
every read and write, so a peer that sends slowly cannot extend it. Response bytes are limited too.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import SplitResult, urlsplit

from skyloom.core.errors import RequestError

Resolve = Callable[[str, int], Sequence[str]]
POST_SECONDS = 8.0  # deadline of a call
GET_SECONDS = 30.0  # deadline of a download
_CHUNK = 256 * 1024  # bytes read at a time
_HEAD_BYTES = 64 * 1024  # limit of the status line, headers and chunk framing
_LOOKUPS = threading.BoundedSemaphore(32)  # lookups cannot be stopped, and so many may hang
_NAT64 = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))
# Networks that Python 3.11 calls global although they are not: protocol assignments (with metadata
# services), the 6to4 relay, documentation, segment routing, and Azure's host address.
_SPECIAL = [
    ipaddress.ip_network(network)
    for network in ("192.0.0.0/24", "192.88.99.0/24", "3fff::/20", "5f00::/16", "168.63.129.16/32")
]


@dataclass(frozen=True)
class CheckedUrl:
    """A URL whose addresses were checked. A connection uses these addresses only."""

    scheme: str
    host: str
    port: int
    path: str
    addresses: tuple[str, ...]


class TooLongError(OSError):
    """A response is longer than its limit."""


class Deadline:
    """The time by which a call must be complete: `seconds` from now by `clock`."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until = clock() + seconds

    def left(self) -> float:
        """Return the seconds left, more than 0. Raises TimeoutError after the deadline."""
        left = self._until - self._clock()
        if left <= 0:
            raise TimeoutError("the deadline has passed")
        return left


def resolve(host: str, port: int, deadline: Deadline | None = None) -> list[str]:
    """Resolve a host to all of its addresses by the deadline (default: POST_SECONDS from now).

    Raises RequestError when the host is unknown or the lookup takes too long.
    """
    deadline = deadline or Deadline(POST_SECONDS)
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
        f"The host {host!r:.80} was not resolved in time.", hint="Check the URL, or try again."
    )
    try:
        if not slots.acquire(timeout=deadline.left()):
            raise late
        # on a thread, since getaddrinfo has no timeout
        threading.Thread(target=look_up, name="dns-lookup", daemon=True).start()
        addresses = found.get(timeout=deadline.left())
    except (queue.Empty, TimeoutError) as error:
        raise late from error
    if isinstance(addresses, Exception):
        message = f"The host {host!r:.80} is unknown."
        raise RequestError(message, hint="Check the URL.") from addresses
    return addresses


def check_url(url: str, *, loopback: bool = False, resolve: Resolve = resolve) -> CheckedUrl:
    """Parse a URL and check that all of its addresses are public and that it uses https.

    With `loopback`, http and https to this machine itself are allowed too. Raises RequestError.
    """
    parts = _split(url)
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    addresses = tuple(dict.fromkeys(resolve(host, port)))
    if not (loopback and addresses and all(map(_is_loopback, addresses))):
        if parts.scheme != "https":
            raise RequestError(f"url must use https, got {parts.scheme}://.")
        if not addresses or not all(map(is_public, addresses)):
            message = "url must lead to public addresses only."
            raise RequestError(message, hint="Use a public host.")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return CheckedUrl(parts.scheme, host, port, path, addresses)


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def is_public(address: str) -> bool:
    """Whether an address is on the public internet, also where IPv6 embeds an IPv4 address."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        embedded = found.ipv4_mapped or found.sixtofour or (found.teredo and found.teredo[1])
        if embedded:
            return is_public(str(embedded))
        if any(found in network for network in _NAT64):
            return is_public(str(ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)))
        if found.scope_id or found.is_site_local:
            return False
    special = any(found in network for network in _SPECIAL)
    return found.is_global and not found.is_multicast and not found.is_reserved and not special


def post(
    target: CheckedUrl, headers: Mapping[str, str], body: bytes, deadline: Deadline | None = None
) -> int:
    """Post a body; return the HTTP status, 3xx included. Only the response's head is read.

    Raises OSError, and TimeoutError at the deadline (default: POST_SECONDS from now).
    """
    with _request(target, deadline or Deadline(POST_SECONDS), _HEAD_BYTES) as connection:
        connection.request("POST", target.path, body=body, headers=dict(headers))
        return connection.getresponse().status


def get(target: CheckedUrl, max_bytes: int, deadline: Deadline | None = None) -> bytes:
    """Get a body of at most `max_bytes`.

    Raises RequestError for a status other than 200, OSError (TooLongError for a longer body), and
    TimeoutError at the deadline (default: GET_SECONDS from now).
    """
    deadline = deadline or Deadline(GET_SECONDS)
    headers = {"accept": "image/*, video/*", "user-agent": "skyloom"}
    with _request(target, deadline, max_bytes + _HEAD_BYTES) as connection:
        connection.request("GET", target.path, headers=headers)
        return _read_body(connection.getresponse(), max_bytes)


def fetch(url: str, *, max_bytes: int = 64 * 2**20, deadline: Deadline | None = None) -> bytes:
    """Check a URL and get its body by the deadline (default: GET_SECONDS from now).

    Raises RequestError.
    """
    deadline = deadline or Deadline(GET_SECONDS)
    hint = "Send the file instead."
    try:
        target = check_url(url, resolve=partial(resolve, deadline=deadline))
        return get(target, max_bytes, deadline)
    except (TimeoutError, TooLongError) as error:
        raise RequestError("The URL's response is too long or too slow.", hint=hint) from error
    except OSError as error:
        raise RequestError("The URL cannot be reached.", hint=hint) from error


def post_to(
    url: str,
    headers: Mapping[str, str],
    body: bytes,
    *,
    loopback: bool = False,
    deadline: Deadline | None = None,
) -> int:
    """Check a URL and post to it by one deadline (default: POST_SECONDS from now).

    Raises RequestError and OSError.
    """
    deadline = deadline or Deadline(POST_SECONDS)
    target = check_url(url, loopback=loopback, resolve=partial(resolve, deadline=deadline))
    return post(target, headers, body, deadline)


@contextlib.contextmanager
def _request(
    target: CheckedUrl, deadline: Deadline, max_bytes: int
) -> Iterator[http.client.HTTPConnection]:
    """Open a connection for one request. HTTP protocol errors become OSError."""
    with contextlib.closing(_open(target, deadline)) as opened:
        connection = http.client.HTTPConnection(target.host, target.port)
        connection.sock = _LimitedSocket(opened, deadline, max_bytes)
        try:
            yield connection
        except http.client.HTTPException as error:
            raise OSError(f"no HTTP response ({type(error).__name__})") from error


class _LimitedReader(io.RawIOBase):
    """Reads from a socket until a deadline, `max_bytes` at most."""

    def __init__(self, opened: socket.socket, deadline: Deadline, max_bytes: int) -> None:
        self._opened = opened
        self._deadline = deadline
        self._left = max_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._opened.settimeout(self._deadline.left())
        size = self._opened.recv_into(buffer)
        self._left -= size
        if self._left < 0:
            raise TooLongError("the response is too long")
        return size


class _LimitedSocket:
    """A connected socket for http.client: reads and writes end at the deadline.

    The code that opened the socket closes it.
    """

    def __init__(self, opened: socket.socket, deadline: Deadline, max_bytes: int) -> None:
        self._opened = opened
        self._deadline = deadline
        self._max_bytes = max_bytes

    def sendall(self, data: bytes) -> None:
        """Send all bytes."""
        rest = memoryview(data)
        while rest:
            self._opened.settimeout(self._deadline.left())
            rest = rest[self._opened.send(rest) :]

    def makefile(self, mode: str) -> io.BufferedReader:
        """Open a reader of the response."""
        return io.BufferedReader(_LimitedReader(self._opened, self._deadline, self._max_bytes))

    def close(self) -> None:
        """Keep the socket open: http.client closes it before the body is read."""


def _read_body(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    """Read a body. Raises RequestError for a status other than 200, and TooLongError."""
    if response.status != http.client.OK:
        message = f"The URL answered with status {response.status}."
        raise RequestError(message, hint="Send the file instead.")
    if response.length is not None and response.length > max_bytes:
        raise TooLongError("the response is too long")
    body = bytearray()
    while chunk := response.read(_CHUNK):
        body += chunk
        if len(body) > max_bytes:
            raise TooLongError("the response is too long")
    return bytes(body)


def _split(url: str) -> SplitResult:
    """Parse a URL. Raises RequestError for URLs that parsers read differently."""
    hint = "Write a plain https URL."
    if any(character in '\\@<>"{}|^`' or not "!" <= character <= "~" for character in url):
        raise RequestError("url must have only characters that URLs may have.", hint=hint)
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise RequestError("url must be a valid URL.", hint=hint) from error
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise RequestError("url must be an http or https URL with a host.", hint=hint)
    return parts


def _open(target: CheckedUrl, deadline: Deadline) -> socket.socket:
    """Connect to the first address that accepts; over https, verify the host's certificate.

    Addresses that do not respond share the time that is left.
    """
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
        opened.settimeout(deadline.left())  # for the whole handshake
        return ssl.create_default_context().wrap_socket(opened, server_hostname=target.host)
    except BaseException:
        opened.close()
        raise
