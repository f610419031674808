"""Attacks on a server with or without a key, and a concurrent client (used by bench/attacks.py)."""

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

MIB = 2**20
BOUND = "bound-of-parts"
JSON = {"content-type": "application/json"}
FORM = {"content-type": f"multipart/form-data; boundary={BOUND}"}
PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Answer:
    """Status, headers and JSON of a response; status 0 if the connection closed without one."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] = field(default_factory=dict)

    @property
    def code(self) -> str | None:
        """Error code in OpenAI's error object."""
        return self.body.get("error", {}).get("code")


@dataclass(frozen=True)
class Client:
    """HTTP client with an API key and a source address; opens a new connection per request."""

    url: str
    key: str | None = None
    source: str = "127.0.0.1"

    @property
    def host(self) -> str:
        """Host and port."""
        return self.url.removeprefix("http://")

    def connect(self) -> socket.socket:
        """Open a connection."""
        name, port = self.host.split(":")
        return socket.create_connection(
            (name, int(port)), timeout=120, source_address=(self.source, 0)
        )

    def head(self, method: str, path: str, headers: Mapping[str, str]) -> bytes:
        """Build the request line and headers."""
        fields = {
            "host": self.host,
            **({"authorization": f"Bearer {self.key}"} if self.key else {}),
            **headers,
        }
        lines = [f"{name}: {value}" for name, value in fields.items()]
        return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode()

    def ask(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        body: bytes | Sequence[bytes] = b"",
    ) -> Answer:
        """Send a request; the response may arrive before the body is sent completely."""
        parts = [body] if isinstance(body, bytes) else body
        length = {"content-length": str(sum(map(len, parts))), "connection": "close"}
        with contextlib.suppress(OSError, http.client.HTTPException), self.connect() as line:
            with contextlib.suppress(OSError):  # it has seen enough
                for part in (self.head(method, path, {**length, **(headers or {})}), *parts):
                    line.sendall(part)
            answer = http.client.HTTPResponse(line, method=method)
            answer.begin()
            content = answer.read()
            return Answer(
                status=answer.status,
                headers={name.lower(): value for name, value in answer.getheaders()},
                body=json.loads(content) if content.startswith(b"{") else {},
            )
        return Answer(0)


class Beside:
    """Client that sends requests during the block; records failures and latencies."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.served = 0
        self.failed: list[tuple[str, int, str | None]] = []
        self.seconds: list[float] = []

    def __enter__(self) -> "Beside":
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        number = 0
        while not self._over.is_set():
            number += 1
            made = json.dumps({"prompt": f"a cat {number}"}).encode()
            for method, path, body in (
                ("GET", "/health", b""),
                ("GET", "/ready", b""),
                ("GET", "/v1/videos?limit=2", b""),
                ("POST", "/v1/videos", made),
            ):
                begun = time.monotonic()
                answer = self._client.ask(method, path, JSON if body else {}, body)
                self.seconds.append(time.monotonic() - begun)
                if (
                    answer.status == 200 or answer.code == "rate_limit_exceeded"
                ):  # its own queue may be full
                    self.served += 1
                else:
                    self.failed.append((path, answer.status, answer.code))
            self._over.wait(0.05)


def plans(client: Client, count: int = 45) -> list[Answer]:
    """Request `count` plans at once."""
    body = json.dumps({"prompt": "a cat"}).encode()
    with ThreadPoolExecutor(count) as pool:
        return list(
            pool.map(lambda _: client.ask("POST", "/v1/videos/plan", JSON, body), range(count))
        )


def escapes(client: Client, path: str = "/v1/videos") -> Answer:
    """Send 30 MiB of JSON with one string of escapes."""
    return client.ask("POST", path, JSON, b'{"prompt": "' + b"\\u0061" * (5 * MIB) + b'"}')


def utf16(client: Client, values: int = 5_000_000) -> Answer:
    """Send JSON in UTF-16 with very many values."""
    text = '{"prompt": "a cat", "more": [' + "0," * values + "0]}"
    return client.ask("POST", "/v1/videos", JSON, text.encode("utf-16"))


def fields(client: Client, count: int = 22, size: int = 22 * MIB) -> Answer:
    """Send a form with large text fields."""
    piece = b"a" * MIB
    parts: list[bytes] = []
    for number in range(count):
        parts.append(
            f'--{BOUND}\r\ncontent-disposition: form-data; name="field{number}"\r\n\r\n'.encode()
        )
        parts += [*([piece] * (size // MIB)), b"\r\n"]
    parts.append(f"--{BOUND}--\r\n".encode())
    return client.ask("POST", "/v1/videos", FORM, parts)


def half_open(client: Client, count: int = 520) -> list[socket.socket]:
    """Open connections that have sent a part of the headers."""
    lines: list[socket.socket] = []
    for _ in range(count):
        lines.append(client.connect())
        with contextlib.suppress(OSError):  # it was closed already
            lines[-1].sendall(b"GET /health HTTP/1.1\r\nhost: ")
    return lines


@contextlib.contextmanager
def dripping(client: Client, heads: int = 5, bodies: int = 5) -> Iterator[list[socket.socket]]:
    """Open connections that send headers or a body one byte at a time."""
    lines = [client.connect() for _ in range(heads + bodies)]
    for number, line in enumerate(lines):
        with_body = (
            client.head("POST", "/v1/videos", {**JSON, "content-length": "100000"})
            + b'{"prompt": "'
        )
        line.sendall(with_body if number >= heads else b"GET /health HTTP/1.1\r\nx-a: ")
    over = threading.Event()

    def drip() -> None:
        while not over.wait(0.3):
            for line in lines:
                with contextlib.suppress(OSError):
                    line.send(b"a")

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    try:
        yield lines
    finally:
        over.set()
        thread.join()
        close(lines)


def end_of(line: socket.socket) -> bytes:
    """Receive until the server closes the connection."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while piece := line.recv(65_536):
            received += piece
    return received


def hold_open(client: Client, file: str, video: str, count: int = 5) -> list[socket.socket]:
    """Open connections that could delay a shutdown.

    Unread downloads, event streams, incomplete headers, incomplete bodies, and idle connections.
    """
    heads = [
        client.head("GET", f"/v1/files/{file}/content", {}),
        client.head("GET", f"/v1/videos/{video}/events", {}),
        client.head("POST", "/v1/videos", {**JSON, "content-length": "100000"}) + b"{",
        b"GET /hea",
        b"",
    ]
    lines: list[socket.socket] = []
    for head in heads * count:
        lines.append(client.connect())
        lines[-1].sendall(head)
    return lines


def keep_file(client: Client, size: int) -> str:
    """Upload a file of `size` bytes; return its id."""
    fields = {
        'name="file"; filename="a.png"': PNG + bytes(size - len(PNG)),
        'name="purpose"': b"vision",
    }
    parts = [
        f"--{BOUND}\r\ncontent-disposition: form-data; {name}\r\n\r\n".encode() + content + b"\r\n"
        for name, content in fields.items()
    ]
    return client.ask("POST", "/v1/files", FORM, [*parts, f"--{BOUND}--\r\n".encode()]).body["id"]


class Endpoint:
    """Webhook endpoint on this machine; with `drips` it sends endless headers byte by byte."""

    def __init__(self, *, drips: bool) -> None:
        self._drips = drips
        self._over = threading.Event()
        self._door = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._door.getsockname()[1]}/hook"
        self.called = 0
        threading.Thread(target=self._run, daemon=True).start()

    def __enter__(self) -> "Endpoint":
        return self

    def __exit__(self, *raised: object) -> None:
        self._over.set()
        self._door.close()

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # the door is closed
            while True:
                threading.Thread(
                    target=self._answer, args=[self._door.accept()[0]], daemon=True
                ).start()

    def _answer(self, line: socket.socket) -> None:
        with contextlib.suppress(OSError), line:
            line.recv(65_536)
            self.called += 1
            if not self._drips:
                line.sendall(b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n")
                return
            line.sendall(b"HTTP/1.1 200 OK\r\nx-a: ")
            while not self._over.wait(0.5):
                line.send(b"a")


def add_webhook(client: Client, url: str) -> str:
    """Create a webhook endpoint for finished videos; return its id."""
    body = {"name": "hook", "url": url, "event_types": ["video.completed", "video.failed"]}
    return client.ask("POST", "/v1/webhook_endpoints", JSON, json.dumps(body).encode()).body["id"]


def make_video(client: Client, prompt: str) -> str:
    """Create a video; return its id."""
    return client.ask("POST", "/v1/videos", JSON, json.dumps({"prompt": prompt}).encode()).body[
        "id"
    ]


def status_of(client: Client, video: str) -> str:
    """Return the status of a video, or its error code if it failed."""
    body = client.ask("GET", f"/v1/videos/{video}").body
    return body["error"]["code"] if body.get("error") else body["status"]


def close(lines: Iterable[socket.socket]) -> None:
    """Close connections."""
    for line in lines:
        line.close()
