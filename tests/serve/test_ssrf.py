"""More than 200 URLs that try to reach internal addresses: none leads to a connection.

The network is fake: a resolver that parses numbers as the C library does and knows a few names,
and a `create_connection` that records the addresses called.
"""

import ipaddress
import itertools
import socket
import ssl
from io import BytesIO
from typing import Any

import pytest

from skyloom.core.errors import RequestError
from skyloom.serve.queue import http_client as outbound

PUBLIC = "93.184.216.34"
NAMES = {
    "example.org": [PUBLIC],
    "xn--exmple-cua.org": [PUBLIC],
    "localhost": ["127.0.0.1", "::1"],
    "ip6-localhost": ["::1"],
    "metadata": ["169.254.169.254"],
    "metadata.google.internal": ["169.254.169.254"],
    "127.0.0.1.nip.io": ["127.0.0.1"],
    "localtest.me": ["127.0.0.1"],
    "half.example.org": [PUBLIC, "10.0.0.7"],
    "halves.example.org": ["10.0.0.7", PUBLIC],
    "six.example.org": [PUBLIC, "fd00::1"],
    "nothing.example.org": [],
    "kubernetes.default.svc": ["10.96.0.1"],
    "host.docker.internal": ["192.168.65.2"],
    "router.lan": ["192.168.1.1"],
}
NUMBERS = [
    "127.0.0.1", "127.1", "127.0.1", "127.255.255.254", "2130706433", "0x7f000001", "0X7F000001",
    "017700000001", "0177.0.0.1", "0177.0.0.01", "0x7f.0.0.1", "0x7f.1", "0x7f.0x0.0x0.0x1",
    "0177.1", "127.0x0.0.1", "127.000.000.001", "00000177.0.0.1", "0", "0.0.0.0", "0x0", "00",
    "0.0", "10.0.0.1", "10.1", "167772161", "0xa000001", "012.0.0.1", "172.16.0.1",
    "172.31.255.255", "2886729729", "0xac100001", "0254.020.0.1", "192.168.0.1", "192.168.1",
    "3232235521", "0xc0a80001", "0300.0250.0.1", "192.0xa8.1", "169.254.169.254", "2852039166",
    "0xa9fea9fe", "0251.0376.0251.0376", "169.254.43518", "0xa9.0xfe.0xa9.0xfe", "025177524776",
    "169.254.0.1", "100.64.0.1", "100.127.255.255", "1681915905", "100.100.100.200", "198.18.0.1",
    "198.19.255.255", "192.0.0.192", "192.0.2.1", "198.51.100.1", "203.0.113.1", "224.0.0.1",
    "239.255.255.250", "240.0.0.1", "255.255.255.255", "168.63.129.16", "4294967295", "0xffffffff",
    "192.88.99.1", "127.0.0.1.", "localhost.", "localhost", "LOCALHOST", "LocalHost",
    "ip6-localhost", "metadata", "metadata.google.internal", "127.0.0.1.nip.io", "localtest.me",
    "half.example.org", "halves.example.org", "six.example.org", "nothing.example.org",
    "kubernetes.default.svc", "host.docker.internal", "router.lan", "4294967296",
    "340282366920938463463374607431768211455", "-1", "1e3", "0x", "127.0.0.1.1", "256.256.256.256",
]  # fmt: skip
SIXES = [
    "::", "::1", "0:0:0:0:0:0:0:1", "0000:0000:0000:0000:0000:0000:0000:0001", "::0001",
    "::ffff:127.0.0.1", "::ffff:7f00:1", "0:0:0:0:0:ffff:127.0.0.1", "::FFFF:10.0.0.1",
    "::ffff:a9fe:a9fe", "::ffff:192.168.0.1", "::ffff:0.0.0.0", "::ffff:100.64.0.1", "::127.0.0.1",
    "::7f00:1", "::a00:1", "::ffff:0:127.0.0.1", "64:ff9b::127.0.0.1", "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe", "64:ff9b:1::a00:1", "64:ff9b:1::127.0.0.1", "2002:7f00:1::",
    "2002:a00:1::", "2002:c0a8:1::1", "2002:a9fe:a9fe::", "2001:0:0:0:0:0:80ff:fffe", "2001::1",
    "fe80::1", "fe80::1%25eth0", "fe80::1%eth0", "febf::1", "fec0::1", "feff::1", "fc00::1",
    "fd00:ec2::254", "fdff:ffff::1", "ff02::1", "ff05::2", "ff0e::1", "2001:db8::1", "100::1",
    "2001:2::1", "2001:10::1", "3fff::1", "5f00::1", "::1%25lo", "1::2::3", "::ffff:999.0.0.1",
    "v1.fe80", "127.0.0.1", ":", "",
]  # fmt: skip
CONFUSED = [
    "https://example.org@127.0.0.1/", "https://127.0.0.1@example.org/", "https://a:b@127.0.0.1/",
    "https://@127.0.0.1/", "https://example.org:443@127.0.0.1/",
    "https://example.org%40127.0.0.1/", "https://example.org\\@127.0.0.1/",
    "https://127.0.0.1\\@example.org/", "https://example.org\\.127.0.0.1/",
    "https:\\\\127.0.0.1\\", "https:/\\127.0.0.1/", "https://127.0.0.1#@example.org/",
    "https://127.0.0.1?@example.org/", "https://127.0.0.1;@example.org/",
    "https://example.org#@127.0.0.1:x@/", "https://[::1]@example.org/",
    "https://example.org@[::1]/", "https://[::1].example.org/", "https://[::1", "https://::1/",
    "https://[127.0.0.1]/", "https://[[::1]]/", "https://[::1]:x/", "https://[::1]x/",
    "https:127.0.0.1/", "https:/127.0.0.1/", "https:///127.0.0.1/", "https:////127.0.0.1/",
    "//127.0.0.1/", "127.0.0.1", " https://127.0.0.1/", "https://127.0.0.1 /",
    "https://127.0.0.1\t/", "https://127.\t0.0.1/", "ht\ntps://127.0.0.1/",
    "https://127.0.0.1\r\nHost: example.org", "https://example.org\r\n@127.0.0.1/",
    "https://127.0.0.1\x00.example.org/", "https://127.0.0.1%00.example.org/",
    "https://127.0.0.1%2f@example.org/", "https://%31%32%37.0.0.1/", "https://127%2e0.0.1/",
    "https://local%68ost/", "https://%6c%6f%63alhost/",
    "https://\u24db\u24de\u24d2\u24d0\u24db\u24d7\u24de\u24e2\u24e3/",
    "https://\uff11\uff12\uff17.0.0.1/", "https://\u2460\u2461\u2466.0.0.1/",
    "https://127\u30020\u30020\u30021/", "https://127\uff0e0\uff0e0\uff0e1/",
    "https://127\uff610\uff610\uff611/", "https://example.org\uff0f@127.0.0.1/",
    "https://example.org\uff03@127.0.0.1/", "https://loc\u00adalhost/", "https://local\u200bhost/",
    "https://\u202e127.0.0.1/", "https://localho\u017ft/", "https://\u0131p6-localhost/",
    "https://[\uff1a\uff1a1]/", "https://\u0967\u0968\u096d.0.0.1/", "http://127.0.0.1/",
    "http://example.org/", "HTTP://LOCALHOST/", "file:///etc/passwd",
    "file://127.0.0.1/etc/passwd", "ftp://127.0.0.1/", "gopher://127.0.0.1:6379/_INFO",
    "dict://127.0.0.1:11211/stats", "ldap://127.0.0.1/", "tftp://127.0.0.1/",
    "jar:https://127.0.0.1!/", "unix:///run/docker.sock", "http+unix://%2frun%2fdocker.sock/",
    "ws://127.0.0.1/", "data:,x", "url:https://127.0.0.1/", "view-source:https://127.0.0.1/",
    "javascript:fetch('//127.0.0.1')", "netdoc:///etc/hosts", "https://localhost:22/",
    "https://localhost:2375/", "https://127.0.0.1:6379/", "https://127.0.0.1:0/",
    "https://127.0.0.1:/", "https://127.0.0.1:65536/", "https://127.0.0.1:-1/",
    "https://127.0.0.1:443:80/", "https://127.0.0.1:0x1bb/", "https://127.0.0.1:+443/",
    "https://example.org:0/", "https://example.org:99999/", "https://example.org:80@127.0.0.1:22/",
    "https://127.0.0.1:\u0664\u0664\u0663/", "https://{127.0.0.1}/", "https://<127.0.0.1>/",
    "https://127.0.0.1|/", "https://^127.0.0.1/", "https://`127.0.0.1`/", "",
]  # fmt: skip
CORPUS = [
    *(f"https://{host}/latest/meta-data/" for host in NUMBERS),
    *(f"https://[{host}]/" for host in SIXES),
    *CONFUSED,
]
REDIRECTS = list(
    itertools.product(
        (301, 302, 303, 307, 308),
        (
            "http://127.0.0.1/",
            "https://169.254.169.254/latest/",
            "//localhost/",
            "file:///etc/passwd",
            "/again",
        ),
    )
)


class Internet:
    """Fake resolver and network; records resolved hosts and called addresses."""

    def __init__(self) -> None:
        self.resolved: list[str] = []
        self.called: list[str] = []
        self.answer = b""

    def getaddrinfo(self, host: str, port: int, **_: Any) -> list[Any]:
        """Numbers as inet_aton reads them, IPv6, and names."""
        self.resolved.append(host)
        known = host.lower().rstrip(".")
        return [
            (0, 0, 0, "", (address, port)) for address in NAMES.get(known) or [self.number(known)]
        ]

    def number(self, host: str) -> str:
        try:
            return socket.inet_ntoa(socket.inet_aton(host))
        except (OSError, UnicodeError):
            try:
                return str(ipaddress.ip_address(host.replace("%25", "%")))
            except ValueError as error:
                raise socket.gaierror("unknown") from error

    def create_connection(self, address: tuple[str, int], timeout: float) -> "Answering":
        """Connect to a server with a canned answer; refuse if there is none."""
        self.called.append(address[0])
        if not self.answer:
            raise ConnectionRefusedError
        return Answering(self.answer)


class Answering:
    """A connection with one canned answer."""

    def __init__(self, answer: bytes) -> None:
        self.answer = BytesIO(answer)

    def settimeout(self, seconds: float) -> None:
        """Ignore the timeout."""

    def send(self, data: bytes) -> int:
        """Accept all bytes."""
        return len(data)

    def recv_into(self, buffer: memoryview) -> int:
        """Read the answer."""
        return self.answer.readinto(buffer)

    def close(self) -> None:
        """Close nothing."""


class NoTls:
    """A TLS context without TLS."""

    def wrap_socket(self, opened: Answering, *, server_hostname: str) -> Answering:
        return opened


@pytest.fixture
def internet(monkeypatch) -> Internet:
    """Replace the network."""
    fake = Internet()
    monkeypatch.setattr(socket, "getaddrinfo", fake.getaddrinfo)
    monkeypatch.setattr(socket, "create_connection", fake.create_connection)
    monkeypatch.setattr(ssl, "create_default_context", NoTls)
    return fake


def test_the_corpus_has_200_urls():
    assert len(set(CORPUS)) >= 200


@pytest.mark.parametrize("url", dict.fromkeys(CORPUS))
def test_no_internal_address_is_called(internet, url: str):
    with pytest.raises(RequestError):
        outbound.fetch(url)
    assert internet.called == []
    with pytest.raises(RequestError):
        outbound.post_to(url, {}, b"")
    assert internet.called == []


@pytest.mark.parametrize(("status", "location"), REDIRECTS)
def test_a_redirect_is_not_followed(internet, status: int, location: str):
    internet.answer = (
        f"HTTP/1.1 {status} Go\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()
    )
    with pytest.raises(RequestError, match=f"status {status}"):
        outbound.fetch("https://example.org/picture.png")
    assert outbound.post_to("https://example.org/hook", {}, b"{}") == status
    assert internet.called == [PUBLIC, PUBLIC]


@pytest.mark.parametrize("inside", ["127.0.0.1", "10.0.0.7", "169.254.169.254", "::1", "fd00::1"])
def test_a_name_is_resolved_once_against_rebinding(internet, monkeypatch, inside: str):
    answers = iter([[PUBLIC], [inside], [inside]])
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, port, **_: [(0, 0, 0, "", (a, port)) for a in next(answers)],
    )
    internet.answer = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody"
    assert outbound.fetch("https://flip.example.org/") == b"body"
    assert internet.called == [PUBLIC]
    with pytest.raises(RequestError):
        outbound.fetch("https://flip.example.org/")
    assert internet.called == [PUBLIC]


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org/",
        "https://EXAMPLE.org:8443/a?b",
        f"https://{PUBLIC}/",
        "https://[2606:4700:4700::1111]/",
    ],
)
def test_public_addresses_are_called(internet, url: str):
    internet.answer = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody"
    assert outbound.fetch(url) == b"body"
    assert len(internet.called) == 1
