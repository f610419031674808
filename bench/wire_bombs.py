"""Send requests designed to exhaust a server (deep JSON, large forms) to a real `skyloom serve`.

`measure` starts the server without workers, sends each request, and returns the accepted ones, the
slowest response and the server's peak memory. `bench/media_bombs.py` calls it.
"""

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from skyloom.serve.api.body import MAX_JSON

SERVE = "from skyloom.cli.app import main; main()"
BOUND = "bound-of-parts"
JSON = {"content-type": "application/json"}
FORM = {"content-type": f"multipart/form-data; boundary={BOUND}"}
GZIP_MAGIC = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03"
ZIP_MAGIC = b"PK\x03\x04\x14\x00\x00\x00\x08\x00"
Bomb = tuple[str, str, Mapping[str, str], bytes]  # name, path, headers, body


def part(name: str, content: bytes, *, file: str | None = None, extra: bytes = b"") -> bytes:
    """Build one part of a form."""
    label = f'; filename="{file}"' if file else ""
    head = f'--{BOUND}\r\ncontent-disposition: form-data; name="{name}"{label}\r\n'.encode()
    return head + extra + b"\r\n" + content + b"\r\n"


def form(*parts: bytes) -> bytes:
    """Build a form."""
    return b"".join(parts) + f"--{BOUND}--\r\n".encode()


def bombs() -> Iterator[Bomb]:
    """Generate the requests; the path "batch" means a batch's input file."""
    videos = "/v1/videos"
    prompt = part("prompt", b"a cat")
    filled = MAX_JSON - 1_000  # just under the limit on a JSON body
    yield "deep JSON", videos, JSON, b'{"prompt": ' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}"
    yield "wide JSON", videos, JSON, b'{"prompt": [' + b"[]," * (filled // 3) + b"[]]}"
    yield (
        "many keys",
        videos,
        JSON,
        b'{"a":0' + b"".join(b',"%x":0' % n for n in range(2_000_000)) + b"}",
    )
    yield "long JSON", videos, JSON, b'{"prompt": "' + b"a" * (MAX_JSON + 1) + b'"}'
    yield "endless number", videos, JSON, b'{"prompt": "a cat", "seed": ' + b"9" * filled + b"}"
    yield "escapes", videos, JSON, b'{"prompt": "' + b"\\u0061" * (filled // 6) + b'"}'
    yield "long prompt", videos, JSON, json.dumps({"prompt": "a cat " * 1_750_000}).encode()
    card = {"at": 0, "prompt": "a cat"}
    yield "cards", "/v1/videos/storyboard", JSON, json.dumps({"cards": [card] * 100_000}).encode()
    yield (
        "packed JSON",
        videos,
        {**JSON, "content-encoding": "gzip"},
        zlib.compress(bytes(200_000_000), 9),
    )
    yield "fields", videos, FORM, form(*(part(f"field{n}", b"a") for n in range(20_000)))
    yield (
        "files",
        videos,
        FORM,
        form(prompt, *(part(f"f{n}", b"a", file="a.png") for n in range(2_000))),
    )
    yield "long field", videos, FORM, form(part("prompt", b"a" * 30_000_000))
    yield "deep field", videos, FORM, form(part("cards" + "[0]" * 20_000, b"a"))
    yield (
        "head of a part",
        videos,
        FORM,
        form(part("prompt", b"a", extra=b"x-a: " + b"a" * 5_000_000 + b"\r\n")),
    )
    yield "heads of a part", videos, FORM, form(part("prompt", b"a", extra=b"x-a: b\r\n" * 200_000))
    picture = {"name": "input_reference", "file": "a.png"}
    for name, magic in (("gzip", GZIP_MAGIC), ("zip", ZIP_MAGIC)):
        packed = magic + zlib.compress(bytes(200_000_000), 9)
        yield f"{name} as a picture", videos, FORM, form(prompt, part(content=packed, **picture))
    yield "headers", videos, {**JSON, **{f"x-{n}": "a" * 100 for n in range(500)}}, b"{}"
    yield "header", videos, {**JSON, "x-a": "a" * 60_000}, b"{}"
    yield "path", f"/v1/videos/{'a' * 60_000}", JSON, b"{}"
    yield "length", videos, {**JSON, "content-length": str(10**15)}, b"{}"
    lines = b'{"custom_id": "%d", "method": "POST", "url": "/v1/videos", "body": {"prompt": "a"}}'
    yield "million lines", "batch", {}, b"\n".join(lines % n for n in range(700_000))
    yield "empty lines", "batch", {}, b"\n" * 60_000_000
    wide = (
        b'{"custom_id": "%d", "method": "POST", "url": "/v1/videos", "body": {"prompt": ['
        + b"[]," * 330_000
        + b"0]}}"
    )
    yield "wide lines", "batch", {}, b"\n".join(wide % n for n in range(60))
    yield "giant line", "batch", {}, b'{"custom_id": "a", "body": {"prompt": ' + b"[]," * 20_000_000
    yield "deep line", "batch", {}, b'{"custom_id": "a", "body": ' + b"[" * 60_000_000


class Client:
    """HTTP client of one server."""

    def __init__(self, url: str, token: str) -> None:
        self._host = url.removeprefix("http://")
        self._token = token

    def post(
        self, path: str, headers: Mapping[str, str], body: bytes
    ) -> tuple[int, dict[str, Any]]:
        """Send a request; return status and body. The server may respond early and close."""
        host, port = self._host.split(":")
        with socket.create_connection((host, int(port)), timeout=60) as line:
            fields = {
                "host": self._host,
                "authorization": f"Bearer {self._token}",
                "content-length": str(len(body)),
                **headers,
            }
            head = [
                f"POST {path} HTTP/1.1",
                *(f"{name}: {value}" for name, value in fields.items()),
            ]
            with contextlib.suppress(OSError):  # the response is still readable
                line.sendall("\r\n".join([*head, "connection: close", "", ""]).encode() + body)
            answer = http.client.HTTPResponse(line, method="POST")
            answer.begin()
            content = answer.read()
        return answer.status, json.loads(content) if content.startswith(b"{") else {}

    def batch(self, lines: bytes) -> tuple[int, dict[str, Any]]:
        """Upload an input file and create a batch; return the first error or the last response."""
        upload = form(part("purpose", b"batch"), part("file", lines, file="a.jsonl"))
        status, file = self.post("/v1/files", FORM, upload)
        if status != 200:
            return status, file
        batch = {"input_file_id": file["id"], "endpoint": "/v1/videos", "completion_window": "24h"}
        return self.post("/v1/batches", JSON, json.dumps(batch).encode())


def measure(folder: Path) -> dict[str, Any]:
    """Start a server, send all requests, and return the measurements."""
    command = [
        sys.executable,
        "-c",
        SERVE,
        "serve",
        "--port",
        "0",
        "--data",
        str(folder),
        "--json",
        "--no-worker",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ
    ) as server:
        assert server.stdout
        client = Client(**json.loads(server.stdout.readline()))
        seconds: dict[str, float] = {}
        work: dict[str, float] = {}
        accepted: list[str] = []
        for name, path, headers, body in bombs():
            begun = time.perf_counter()
            before = cpu_seconds(server.pid)
            status, response = (
                client.batch(body) if path == "batch" else client.post(path, headers, body)
            )
            seconds[name] = round(time.perf_counter() - begun, 2)
            work[name] = round(cpu_seconds(server.pid) - before, 2)
            if not 400 <= status < 500:
                accepted.append(f"{name}: {status} {response!s:.80}")
        memory = peak(server.pid)
        server.terminate()
    slowest = max(seconds, key=lambda name: seconds[name])
    hardest = max(work, key=lambda name: work[name])
    return {
        "bench": "wire_bombs",
        "bombs": len(seconds),
        "not_refused": accepted,
        "slowest": [slowest, seconds[slowest]],
        "most_cpu_seconds": [hardest, work[hardest]],
        "server_mib": memory,
    }


def cpu_seconds(process: int) -> float:
    """Return the processor time of a process, in seconds."""
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", maxsplit=1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak(process: int) -> int:
    """Return the peak memory of a process, in MiB."""
    rows = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(row.split()[1]) for row in rows if row.startswith("VmHWM")) // 1024


if __name__ == "__main__":
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as scratch:
        print(json.dumps(measure(Path(scratch))))
