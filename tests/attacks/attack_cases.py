"""Attacks on a server by one key or by none, and the other client beside them. Tests and bench/attacks.py run both."""

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
    """Status, headers and JSON of an answer; status 0 where the connection ended without one."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] = field(default_factory=dict)

    @property
    def code(self) -> str | None:
        """The code of OpenAI's envelope."""
        return self.body.get("error", {}).get("code")


@dataclass(frozen=True)
class Client:
    """Asks one server as one key, by a new connection each time, from a source address of this machine."""

    url: str
    key: str | None = None
    source: str = "127.0.0.1"

    @property
    def host(self) -> str:
        """Host and port."""
        return self.url.removeprefix("http://")

    def connect(self) -> socket.socket:
        """A connection that has sent nothing."""
        name, port = self.host.split(":")
        return socket.create_connection(
            (name, int(port)), timeout=120, source_address=(self.source, 0)
        )

    def head(self, method: str, path: str, headers: Mapping[str, str]) -> bytes:
        """A request's head."""
        told = {
            "host": self.host,
            **({"authorization": f"Bearer {self.key}"} if self.key else {}),
            **headers,
        }
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in told.items())]
        return "\r\n".join([*lines, "", ""]).encode()

    def ask(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        body: bytes | Sequence[bytes] = b"",
    ) -> Answer:
        """Send a request, also where the answer comes before its end."""
        parts = [body] if isinstance(body, bytes) else body
        length = {"content-length": str(sum(map(len, parts))), "connection": "close"}
        with contextlib.suppress(OSError, http.client.HTTPException), self.connect() as line:
            with contextlib.suppress(OSError):  # it has seen enough
                for part in (self.head(method, path, {**length, **(headers or {})}), *parts):
                    line.sendall(part)
            answer = http.client.HTTPResponse(line, method=method)
            answer.begin()
            content = answer.read()
            told = json.loads(content) if content.startswith(b"{") else {}
            return Answer(
                answer.status, {name.lower(): value for name, value in answer.getheaders()}, told
            )
        return Answer(0)


class Beside:
    """Another client that goes on asking, by new connections, while the block runs: what it was answered and when."""

    def __init__(self, client: Client) -> None:
        self._client, self._over = client, threading.Event()
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
    """So many plans at once, as they are answered."""
    body = json.dumps({"prompt": "a cat"}).encode()
    with ThreadPoolExecutor(count) as pool:
        return list(
            pool.map(lambda _: client.ask("POST", "/v1/videos/plan", JSON, body), range(count))
        )


def escapes(client: Client, path: str = "/v1/videos") -> Answer:
    """JSON of 30 MiB that is one text of escapes."""
    return client.ask("POST", path, JSON, b'{"prompt": "' + b"\\u0061" * (5 * MIB) + b'"}')


def utf16(client: Client, values: int = 5_000_000) -> Answer:
    """JSON in UTF-16 of very many values."""
    text = '{"prompt": "a cat", "more": [' + "0," * values + "0]}"
    return client.ask("POST", "/v1/videos", JSON, text.encode("utf-16"))


def fields(client: Client, count: int = 22, size: int = 22 * MIB) -> Answer:
    """A form of large text fields."""
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
    """Connections that have sent a part of a head."""
    lines: list[socket.socket] = []
    for _ in range(count):
        lines.append(client.connect())
        with contextlib.suppress(OSError):  # it was closed already
            lines[-1].sendall(b"GET /health HTTP/1.1\r\nhost: ")
    return lines


@contextlib.contextmanager
def dripping(client: Client, heads: int = 5, bodies: int = 5) -> Iterator[list[socket.socket]]:
    """Connections that send a byte of a head, or of a body, again and again."""
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
    """What comes on a connection until the server ends it."""
    told = b""
    with contextlib.suppress(ConnectionError):
        while piece := line.recv(65_536):
            told += piece
    return told


def hold_open(client: Client, file: str, video: str, count: int = 5) -> list[socket.socket]:
    """Connections that would keep a server from ending: downloads that nobody reads, events of a video, half a head,
    half a body, silence."""
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
    """The id of a stored file of so many bytes."""
    told = {"file": 'name="file"; filename="a.png"', "purpose": 'name="purpose"'}
    content = {"file": PNG + bytes(size - len(PNG)), "purpose": b"vision"}
    parts = [
        f"--{BOUND}\r\ncontent-disposition: form-data; {told[name]}\r\n\r\n".encode()
        + content[name]
        + b"\r\n"
        for name in told
    ]
    return client.ask("POST", "/v1/files", FORM, [*parts, f"--{BOUND}--\r\n".encode()]).body["id"]


class Endpoint:
    """A webhook endpoint on this machine; one that drips sends a byte of its answer's head now and then, for ever."""

    def __init__(self, *, drips: bool) -> None:
        self._drips, self._over = drips, threading.Event()
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
    """The id of a new webhook endpoint that hears of ended videos."""
    body = {"name": "hook", "url": url, "event_types": ["video.completed", "video.failed"]}
    return client.ask("POST", "/v1/webhook_endpoints", JSON, json.dumps(body).encode()).body["id"]


def make_video(client: Client, prompt: str) -> str:
    """The id of a new video."""
    return client.ask("POST", "/v1/videos", JSON, json.dumps({"prompt": prompt}).encode()).body[
        "id"
    ]


def status_of(client: Client, video: str) -> str:
    """Where a video is; its error's code once it has failed."""
    told = client.ask("GET", f"/v1/videos/{video}").body
    return told["error"]["code"] if told.get("error") else told["status"]


def close(lines: Iterable[socket.socket]) -> None:
    """Let go of connections."""
    for line in lines:
        line.close()
