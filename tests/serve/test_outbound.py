"""Where requests of ours may go: public addresses over https, and nowhere else, whatever the URL looks like."""

import http.server
import ipaddress
import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyloom.core.errors import RequestError
from skyloom.serve.outbound import check_url, is_public, post

PUBLIC = "93.184.216.34"
INSIDE = [
    *("127.0.0.1", "127.8.8.8", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
    *("255.255.255.255", "224.0.0.1", "192.0.2.1", "198.18.0.1", "240.0.0.1", "::1", "::", "fe80::1", "fc00::1"),
    *("fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a00:1"),
    *("2002:7f00:1::", "2002:a00:1::", "2001:0:0:0:0:0:80ff:fffe", "fec0::1", "2001:db8::1", "::127.0.0.1"),
    *("fe80::1%eth0", "not an address"),
]


def leads_to(*addresses: str):
    """A resolver that always says the same."""
    return lambda host, port: list(addresses)


@pytest.mark.parametrize("address", INSIDE)
def test_no_address_inside_is_public(address: str):
    assert not is_public(address)
    with pytest.raises(RequestError):
        check_url("https://example.org/", resolve=leads_to(address))
    with pytest.raises(RequestError):
        check_url("https://example.org/", resolve=leads_to(PUBLIC, address))


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "2606:4700:4700::1111", "64:ff9b::808:808", "2002:808:808::"])
def test_open_addresses_are_public(address: str):
    assert is_public(address)
    target = check_url("https://example.org:8443/a/b?c=d", resolve=leads_to(address))
    assert (target.host, target.port, target.path, target.addresses) == ("example.org", 8443, "/a/b?c=d", (address,))


@pytest.mark.parametrize(
    "url",
    [
        *("http://example.org/", "ftp://example.org/", "file:///etc/passwd", "gopher://example.org/", "//example.org/"),
        *("https:///path", "https://", "example.org", "", "https://user@example.org/", "https://a:b@example.org/"),
        *("https://example.org\\@127.0.0.1/", "https://example.org\t/"),
        *("https://example.org/\r\nHost: x", "https://ex ample/"),
        *("https://example.org:0/", "https://example.org:99999/", "https://example.org:x/", "https://[::1/", "https://ex\u00e4mple/"),
        *("https://example\u3002org/", "https://\u2460\u2461/", "javascript:alert(1)", "data:text/plain,x", "https://{a}/"),
    ],
)  # fmt: skip
def test_urls_that_parsers_read_differently_are_refused(url: str):
    with pytest.raises(RequestError):
        check_url(url, resolve=leads_to(PUBLIC))


@pytest.mark.parametrize(
    "host",
    [
        *("127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0x7f.1", "127.0.0.1.", "localhost", "0", "[::1]"),
        *("[::ffff:127.0.0.1]", "[::]", "127.000.000.001", "017700000001", "[0:0:0:0:0:ffff:7f00:1]"),
    ],
)
def test_other_spellings_of_this_machine_lead_nowhere(host: str):
    with pytest.raises(RequestError):
        check_url(f"https://{host}/")


def test_this_machine_is_reached_only_when_that_is_allowed():
    with pytest.raises(RequestError):
        check_url("http://localhost:1/", resolve=leads_to("127.0.0.1"))
    assert check_url("http://localhost:1/", loopback=True, resolve=leads_to("127.0.0.1", "::1")).port == 1
    for addresses in (("10.0.0.1",), ("127.0.0.1", "10.0.0.1"), (PUBLIC,), ()):
        with pytest.raises(RequestError):
            check_url("http://localhost:1/", loopback=True, resolve=leads_to(*addresses))


@given(st.ip_addresses())
def test_public_is_never_more_than_global(address: ipaddress.IPv4Address | ipaddress.IPv6Address):
    if is_public(str(address)):
        assert address.is_global
        assert not address.is_multicast


def test_it_connects_to_the_address_that_was_checked_and_follows_nothing(monkeypatch):
    monkeypatch.undo()  # loopback is meant here
    asked = []

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append((self.path, self.headers["host"], self.rfile.read(int(self.headers["content-length"]))))
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
    assert asked == [("/hook?a=b", f"name.invalid:{target.port}", b"body")]


def test_nobody_there_is_an_os_error(monkeypatch):
    monkeypatch.undo()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    target = check_url(f"http://localhost:{port}/", loopback=True, resolve=leads_to("127.0.0.1"))
    with pytest.raises(OSError, match="refused"):
        post(target, {}, b"")
