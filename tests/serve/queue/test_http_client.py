"""Where requests of ours may go: public addresses over https, and nowhere else, whatever the URL
looks like."""

import http.server
import ipaddress
import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyloom.core.errors import RequestError
from skyloom.serve.queue import http_client as outbound
from skyloom.serve.queue.http_client import (
    CheckedUrl,
    Deadline,
    TooLongError,
    check_url,
    get,
    is_public,
    post,
    resolve,
)

PUBLIC = "93.184.216.34"
INSIDE = [
    "127.0.0.1", "127.8.8.8", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254",
    "100.64.0.1", "0.0.0.0", "255.255.255.255", "224.0.0.1", "192.0.2.1", "198.18.0.1",
    "240.0.0.1", "::1", "::", "fe80::1", "fc00::1", "fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1",
    "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a00:1", "2002:7f00:1::", "2002:a00:1::",
    "2001:0:0:0:0:0:80ff:fffe", "fec0::1", "2001:db8::1", "::127.0.0.1", "fe80::1%eth0",
    "not an address",
]  # fmt: skip


def leads_to(*addresses: str):
    """A resolver that always says the same."""
    return lambda host, port: list(addresses)


@pytest.mark.parametrize("address", INSIDE)
def test_private_addresses_are_not_public(address: str):
    assert not is_public(address)
    with pytest.raises(RequestError):
        check_url("https://example.org/", resolve=leads_to(address))
    with pytest.raises(RequestError):
        check_url("https://example.org/", resolve=leads_to(PUBLIC, address))


@pytest.mark.parametrize(
    "address", [PUBLIC, "8.8.8.8", "2606:4700:4700::1111", "64:ff9b::808:808", "2002:808:808::"]
)
def test_public_addresses_are_public(address: str):
    assert is_public(address)
    target = check_url("https://example.org:8443/a/b?c=d", resolve=leads_to(address))
    assert (target.host, target.port, target.path, target.addresses) == (
        "example.org",
        8443,
        "/a/b?c=d",
        (address,),
    )


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/", "ftp://example.org/", "file:///etc/passwd", "gopher://example.org/",
        "//example.org/", "https:///path", "https://", "example.org", "",
        "https://user@example.org/", "https://a:b@example.org/",
        "https://example.org\\@127.0.0.1/", "https://example.org\t/",
        "https://example.org/\r\nHost: x", "https://ex ample/", "https://example.org:0/",
        "https://example.org:99999/", "https://example.org:x/", "https://[::1/",
        "https://ex\u00e4mple/", "https://example\u3002org/", "https://\u2460\u2461/",
        "javascript:alert(1)", "data:text/plain,x", "https://{a}/",
    ],
)  # fmt: skip
def test_urls_that_parsers_read_differently_are_rejected(url: str):
    with pytest.raises(RequestError):
        check_url(url, resolve=leads_to(PUBLIC))


@pytest.mark.parametrize(
    "host",
    [
        "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0x7f.1", "127.0.0.1.", "localhost",
        "0", "[::1]", "[::ffff:127.0.0.1]", "[::]", "127.000.000.001", "017700000001",
        "[0:0:0:0:0:ffff:7f00:1]",
    ],
)  # fmt: skip
def test_other_spellings_of_loopback_are_rejected(host: str):
    with pytest.raises(RequestError):
        check_url(f"https://{host}/")


def test_loopback_is_allowed_only_with_the_option():
    with pytest.raises(RequestError):
        check_url("http://localhost:1/", resolve=leads_to("127.0.0.1"))
    assert (
        check_url("http://localhost:1/", loopback=True, resolve=leads_to("127.0.0.1", "::1")).port
        == 1
    )
    for addresses in (("10.0.0.1",), ("127.0.0.1", "10.0.0.1"), (PUBLIC,), ()):
        with pytest.raises(RequestError):
            check_url("http://localhost:1/", loopback=True, resolve=leads_to(*addresses))


@given(st.ip_addresses())
def test_public_is_never_more_than_global(address: ipaddress.IPv4Address | ipaddress.IPv6Address):
    if is_public(str(address)):
        assert address.is_global
        assert not address.is_multicast


def test_it_connects_to_the_checked_address_and_follows_no_redirect(monkeypatch):
    monkeypatch.undo()  # loopback is meant here
    requests = []

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            requests.append(
                (
                    self.path,
                    self.headers["host"],
                    self.rfile.read(int(self.headers["content-length"])),
                )
            )
            self.send_response(302)
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_) -> None:
            """Silence."""

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://name.invalid:{server.server_port}/hook?a=b"
        target = check_url(url, loopback=True, resolve=leads_to("127.0.0.1"))
        assert post(target, {"x": "y"}, b"body") == 302
        server.shutdown()
    assert requests == [("/hook?a=b", f"name.invalid:{target.port}", b"body")]


def test_a_refused_connection_is_an_os_error(monkeypatch):
    monkeypatch.undo()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    target = check_url(f"http://localhost:{port}/", loopback=True, resolve=leads_to("127.0.0.1"))
    with pytest.raises(OSError, match="refused"):
        post(target, {}, b"")


class Dripping:
    """A socket that says one byte each time, and takes four seconds of a clock for it."""

    def __init__(self, said: bytes) -> None:
        self.said, self.now, self.limits = iter(said), 0.0, []

    def settimeout(self, seconds: float) -> None:
        self.limits.append(seconds)

    def send(self, said: bytes) -> int:
        return len(said)

    def recv_into(self, buffer: memoryview) -> int:
        self.now += 4.0
        buffer[:1] = bytes([next(self.said)])
        return 1

    def close(self) -> None:
        """Nothing is open."""


TARGET = CheckedUrl("http", "name.invalid", 80, "/", ("127.0.0.1",))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda deadline: post(TARGET, {}, b"x", deadline),
            b"HTTP/1.1 200 OK\r\nX: " + b"x" * 1_000,
        ),
        (lambda deadline: post(TARGET, {}, b"x", deadline), b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
        (lambda deadline: get(TARGET, 1_000, deadline), b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 1_000),
    ],
    ids=["headers", "continue", "body"],
)
def test_each_read_gets_what_is_left_of_one_deadline(monkeypatch, call, said):
    peer = Dripping(said)
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: peer)
    with pytest.raises(TimeoutError):
        call(Deadline(10.0, clock=lambda: peer.now))
    assert peer.now == 12.0
    assert peer.limits[-3:] == [10.0, 6.0, 2.0]


class Peer:
    """A server on this machine that does one thing with each connection, on a thread."""

    def __init__(self, serve) -> None:
        self.door = socket.create_server(("127.0.0.1", 0))
        self.over = threading.Event()
        self.target = CheckedUrl(
            "http", "localhost", self.door.getsockname()[1], "/", ("127.0.0.1",)
        )
        threading.Thread(target=self._run, args=(serve,), daemon=True).start()

    def _run(self, serve) -> None:
        while not self.over.is_set():
            try:
                opened, _ = self.door.accept()
                with opened:
                    serve(opened, self.over)
            except OSError:
                continue

    def close(self) -> None:
        self.over.set()
        self.door.close()


@pytest.fixture
def peer(monkeypatch):
    """Makes peers."""
    monkeypatch.undo()  # loopback is meant here
    made = []

    def make(serve) -> CheckedUrl:
        made.append(Peer(serve))
        return made[-1].target

    yield make
    for one in made:
        one.close()


def dripping(start: bytes, drop: bytes = b"x"):
    """Says something, then a byte from time to time for ever."""

    def serve(opened: socket.socket, over: threading.Event) -> None:
        opened.sendall(start)
        while not over.wait(0.01):
            opened.sendall(drop)

    return serve


def in_a_thread(call):
    """What a call raises or returns, if it ends within a minute."""
    came = []

    def run() -> None:
        try:
            came.append(call())
        except Exception as error:
            came.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert came, "it did not end"
    return came[0]


@pytest.mark.parametrize(
    ("scheme", "start"),
    [
        ("http", b"HTTP/1.1 200 OK\r\nX: "),
        ("http", b"HTTP/1.1 200 OK\r\nContent-Length: 900000\r\n\r\n"),
        ("http", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;"),
        ("https", b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc"),
    ],
    ids=["headers", "body", "chunk", "handshake"],
)
def test_a_slow_response_ends_at_the_deadline(peer, scheme, start):
    target = peer(dripping(start))
    target = CheckedUrl(scheme, target.host, target.port, target.path, target.addresses)
    assert isinstance(in_a_thread(lambda: get(target, 2**20, Deadline(0.3))), TimeoutError)


def test_a_peer_that_does_not_read_ends_at_the_deadline(peer):
    target = peer(lambda opened, over: over.wait(60))
    assert isinstance(
        in_a_thread(lambda: post(target, {}, bytes(64 * 2**20), Deadline(0.3))), TimeoutError
    )


def flooding(start: bytes, piece: bytes):
    """Says something, then the same piece as fast as it is heard."""

    def serve(opened: socket.socket, over: threading.Event) -> None:
        opened.recv(65_536)
        opened.sendall(start)
        while not over.is_set():
            opened.sendall(piece)

    return serve


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n", b"x" * 1_000),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 1_000),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"X: y\r\n"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    ],
    ids=["continue", "length", "body", "trailers", "chunks"],
)
def test_a_response_has_a_maximum_size(peer, start, piece):
    target = peer(flooding(start, piece))
    assert isinstance(in_a_thread(lambda: get(target, 10_000, Deadline(50))), TooLongError)


def test_only_the_head_of_a_post_response_is_read(peer):
    assert (
        in_a_thread(
            lambda: post(peer(flooding(b"HTTP/1.1 204 X\r\n\r\n", b"x")), {}, b"", Deadline(50))
        )
        == 204
    )
    long = in_a_thread(
        lambda: post(peer(flooding(b"", b"HTTP/1.1 100 C\r\n\r\n")), {}, b"", Deadline(50))
    )
    assert isinstance(long, TooLongError)


def test_a_slow_lookup_is_rejected(monkeypatch):
    found, lookups, begun = threading.Event(), [], threading.Semaphore(0)

    def hangs(host, port, **_):
        lookups.append(host)
        begun.release()
        found.wait(60)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", hangs)
    monkeypatch.setattr(outbound, "_LOOKUPS", threading.BoundedSemaphore(2))
    for _ in range(4):
        with pytest.raises(RequestError, match="in time"):
            resolve("tar.example.org", 443, Deadline(0.05))
    assert begun.acquire(timeout=60)
    assert begun.acquire(timeout=60)
    assert len(lookups) == 2, "look-ups that hang are no more than two"
    found.set()


def test_a_call_has_one_deadline_for_lookup_and_response(monkeypatch):
    peer = Dripping(b"HTTP/1.1 200 OK\r\n")

    def slow(host, port, **_):
        peer.now += 9.0
        return [(0, 0, 0, "", (PUBLIC, port))]

    class Tls:
        def wrap_socket(self, opened, *, server_hostname):
            return opened

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: peer)
    monkeypatch.setattr(outbound.ssl, "create_default_context", Tls)
    with pytest.raises(TimeoutError):
        outbound.post_to(
            "https://example.org/", {}, b"", deadline=Deadline(10.0, clock=lambda: peer.now)
        )
    assert peer.now == 13.0, "one byte was read"


def test_addresses_that_do_not_respond_share_the_time(monkeypatch):
    now, tried = [0.0], []

    def silent(address, timeout):
        tried.append((address[0], timeout))
        now[0] += timeout
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", silent)
    target = CheckedUrl("http", "x", 80, "/", ("192.0.2.1", "192.0.2.2"))
    with pytest.raises(TimeoutError):
        post(target, {}, b"", Deadline(10.0, clock=lambda: now[0]))
    assert tried == [("192.0.2.1", 5.0), ("192.0.2.2", 5.0)]
