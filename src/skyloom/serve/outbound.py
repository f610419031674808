"""Requests that leave this machine: to addresses that are checked first, and to no other.

One parser reads the URL, its host is resolved once, every address must be a public one, and the connection goes to one
of those addresses; redirects are not followed. So a name cannot lead inside, nor change its mind between the check and
the use.
"""

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from skyloom.core.errors import RequestError

Resolve = Callable[[str, int], Sequence[str]]
SECONDS, GET_SECONDS = 10, 30
_PIECE = 256 * 1024
_TRANSLATED = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))
# What Python 3.11 calls global and is not: protocol assignments (a cloud's metadata among them), the old 6to4 relay,
# documentation, segment routing, and the address by which Azure's machines ask their host.
_SPECIAL = tuple(
    map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "3fff::/20", "5f00::/16", "168.63.129.16/32"))
)


@dataclass(frozen=True)
class Target:
    """A URL that may be asked, and the addresses that it was checked for."""

    scheme: str
    host: str
    port: int
    path: str
    addresses: tuple[str, ...]


def resolve(host: str, port: int) -> list[str]:
    """All addresses of a host. Raises RequestError for one that has none."""
    try:
        return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError) as error:
        raise RequestError(f"The host {host!r:.80} is not known.", hint="Check the URL.") from error


def check_url(url: str, *, loopback: bool = False, resolve: Resolve = resolve) -> Target:
    """Where a URL leads, if it may be asked. Only https to public addresses; with `loopback`, also http and https to
    this machine itself. Raises RequestError."""
    parts = _split(url)
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    addresses = tuple(dict.fromkeys(resolve(host, port)))
    inside = [address for address in addresses if not is_public(address)]
    if loopback and addresses and all(ipaddress.ip_address(address).is_loopback for address in addresses):
        inside = []
    elif parts.scheme != "https":
        raise RequestError(f"{parts.scheme}:// is not allowed.", hint="Use https.")
    if inside or not addresses:
        raise RequestError("The URL leads to an address that is not public.", hint="Use a public host.")
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


def post(target: Target, headers: Mapping[str, str], body: bytes) -> int:
    """Send a body to a checked target; the HTTP status. A redirect is an answer like any other. Raises OSError."""
    connection = _connect(target)
    try:
        connection.request("POST", target.path, body=body, headers=dict(headers))
        return connection.getresponse().status
    except http.client.HTTPException as error:
        raise OSError(f"no HTTP answer ({type(error).__name__})") from error
    finally:
        connection.close()


def get(target: Target, most: int) -> bytes:
    """The body that a checked target answers with. Raises RequestError for any answer but 200, one that is longer than
    `most` bytes or takes too long, and OSError."""
    connection, until = _connect(target), time.monotonic() + GET_SECONDS
    parts: list[bytes] = []
    try:
        connection.request("GET", target.path, headers={"accept": "image/*, video/*", "user-agent": "skyloom"})
        answer = connection.getresponse()
        if answer.status != http.client.OK:
            raise RequestError(f"The URL answered {answer.status}.", hint="Send the file instead.")
        while piece := answer.read(_PIECE):
            parts.append(piece)
            if sum(map(len, parts)) > most or time.monotonic() > until:
                raise RequestError("What the URL answers is too long, or too slow.", hint="Send the file instead.")
    except http.client.HTTPException as error:
        raise OSError(f"no HTTP answer ({type(error).__name__})") from error
    finally:
        connection.close()
    return b"".join(parts)


def fetch(url: str, *, most: int = 64 * 2**20) -> bytes:
    """Check a URL and get what it answers. Raises RequestError, also when nothing answers."""
    try:
        return get(check_url(url), most)
    except OSError as error:
        raise RequestError("The URL cannot be reached.", hint="Send the file instead.") from error


def post_to(url: str, headers: Mapping[str, str], body: bytes, *, loopback: bool = False) -> int:
    """Check a URL and send to it. Raises RequestError and OSError."""
    return post(check_url(url, loopback=loopback), headers, body)


def _split(url: str) -> SplitResult:
    """A URL in parts. What parsers read differently is refused."""
    if not url.isascii() or any(character in '\\@<>"{}|^`' or not "!" <= character <= "~" for character in url):
        raise RequestError("The URL has characters that URLs do not have.", hint="Write a plain https URL.")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise RequestError("The URL cannot be read.", hint="Write a plain https URL.") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise RequestError("The URL is not one of the web.", hint="Write a plain https URL.")
    return parts


def _connect(target: Target) -> http.client.HTTPConnection:
    """A connection to the first address that answers; the certificate must be the host's."""
    error: OSError | None = None
    for address in target.addresses:
        try:
            opened = socket.create_connection((address, target.port), timeout=SECONDS)
            break
        except OSError as refused:
            error = refused
    else:
        raise error or OSError("no address")
    if target.scheme == "https":
        opened = ssl.create_default_context().wrap_socket(opened, server_hostname=target.host)
    connection = http.client.HTTPConnection(target.host, target.port, timeout=SECONDS)
    connection.sock = opened
    return connection
