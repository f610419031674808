"""A model hub on this machine that can misbehave, and entries of a catalogue for it."""

import hashlib
import socket
from collections import deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from safetensors.numpy import save

from skyloom.hub.catalog import CatalogFile

REPOSITORY = "owner/small"
COMMIT = "c" * 40


@dataclass(frozen=True)
class Answer:
    """How the hub answers one GET. None of these: as it should.

    cut: bytes after which the connection ends. range_start: wrong start of the range. longer:
    further bytes than the file has. flip: index of a byte that arrives wrong.
    """

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    whole: bool = False
    range_start: int | None = None
    longer: bytes = b""
    flip: int | None = None


class Hub:
    """A hub with files by path, a script of answers, and a record of the requests."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}
        self.answers: deque[Answer] = deque()
        self.always: Answer | None = None
        self.linked = True
        self.redirect_to: str | None = None
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format, *args):
                pass

            def do_HEAD(self):
                hub.answer(self)

            def do_GET(self):
                hub.answer(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda request, address: None  # clients that hang up
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def put(self, name: str, content: bytes, etag: str | None = None) -> None:
        """Publish a file."""
        path = f"/{REPOSITORY}/resolve/main/{name}"
        self.files[path] = self.files[f"/{REPOSITORY}/resolve/{COMMIT}/{name}"] = content
        tag = etag or hashlib.sha256(content).hexdigest()
        self.etags[path] = self.etags[f"/{REPOSITORY}/resolve/{COMMIT}/{name}"] = tag

    def gets(self, header: str) -> list[str | None]:
        """A header of all GET requests."""
        return [headers.get(header) for method, _, headers in self.requests if method == "GET"]

    def answer(self, request: Any) -> None:
        """Answer a request by the script."""
        self.requests.append((request.command, request.path, dict(request.headers)))
        get = request.command == "GET"
        answer = self.always or (self.answers.popleft() if get and self.answers else Answer())
        content = self.files.get(request.path)
        status = answer.status or (302 if self.redirect_to else 200 if content else 404)
        headers = {"ETag": f'"{self.etags.get(request.path, "")}"', **answer.headers}
        if content and self.linked:
            headers |= {
                "X-Linked-Size": str(len(content)),
                "X-Linked-Etag": headers["ETag"],
                "X-Repo-Commit": COMMIT,
            }
        if status == 302:
            headers["Location"] = f"{self.redirect_to}{request.path}"
        body = content if status == 200 and content else b""
        begin, _, _ = request.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        if status == 200 and get and int(begin) and not answer.whole:
            status, body = 206, body[int(begin) :]
            start = int(begin) if answer.range_start is None else answer.range_start
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if answer.flip is not None:
            body = bytearray(body)
            body[answer.flip] ^= 1
        body = bytes(body) + answer.longer
        request.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        if get:
            request.wfile.write(body[: answer.cut])
        if answer.cut is not None:
            request.wfile.flush()
            request.connection.shutdown(socket.SHUT_RDWR)
            request.close_connection = True


def weights(seed: int, size: int = 3_000_000) -> bytes:
    """A safetensors file of random bytes."""
    values = np.random.default_rng(seed).integers(0, 255, size, dtype=np.uint8)
    return save({"weight": values})


def entry(name: str, content: bytes | None = None, **values: Any) -> CatalogFile:
    """An entry of the catalogue; with `content`, its size and hash are known."""
    known = (
        {}
        if content is None
        else {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    )
    return CatalogFile(REPOSITORY, name, **{"about_bytes": 3_000_000, **known, **values})


class Recorder:
    """What a transfer would have slept and said."""

    def __init__(self) -> None:
        self.slept: list[float] = []
        self.notices: list[str] = []
