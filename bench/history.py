"""Compare the latency of calls with 1,000 and with 100,000 finished jobs in the database.

python bench/history.py [--fast] [--database postgresql://user@host/name] [--jobs 1000 100000]

Fills two databases, starts a server without workers on each, and sends every call to both in turns
over keep-alive connections. Prints one JSON line: the median of each call in milliseconds with few
and with many jobs, and the ratios of many to few (target: at most 1.1), including startup time
until /ready succeeds, and memory after startup. `kept_alive` is a GET with default TCP settings;
all other calls use TCP_QUICKACK, so that delayed acknowledgements do not hide the cost of a call.
With --database (a Postgres whose user may create databases) two databases are created there and
dropped.
"""

import argparse
import hashlib
import http.client
import json
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.engine import make_url

from skyloom.serve.queue.database import Database
from skyloom.serve.queue.leases import Leases
from skyloom.serve.queue.tables import (
    deliveries,
    endpoints,
    events,
    files,
    idempotency_keys,
    jobs,
    results,
)
from skyloom.serve.settings import Settings

_PROGRAM = "from skyloom.cli.app import main; main()"
_OWNERS = 20
_PIECE = 2_000  # rows per transaction
_KINDS = ("queued", "in_progress", "progress", "progress", "progress")
_SETTLE_SECONDS = 3.0  # from /ready until the first upkeep tasks are done


def seed(database: Database, count: int, owner: str = "local") -> None:
    """Insert finished jobs with results, events, idempotency keys, deliveries and some files.

    Nine of ten jobs are completed. Every second job belongs to `owner`; those have the same prompt.
    All are less than 20 hours old.
    """
    with database.write() as write:
        row = {
            "owner": owner,
            "name": "",
            "url": "https://example.org",
            "event_types": ["video.completed"],
        }
        times = {"created_at": write.now, "updated_at": write.now}
        if not write.connection.execute(
            select(endpoints.c.id).where(endpoints.c.owner == owner)
        ).first():
            write.connection.execute(
                insert(endpoints).values(id=f"we_{owner}", secret="whsec_", **row, **times)
            )
    for first in range(0, count, _PIECE):
        with database.write() as write:
            begun = write.now - 72_000.0
            rows = [
                _job(index, owner, begun + 60_000.0 * index / count)
                for index in range(first, min(first + _PIECE, count))
            ]
            write.connection.execute(insert(jobs), rows)
            last = write.connection.execute(
                select(jobs.c.number).order_by(jobs.c.number.desc()).limit(1)
            ).scalar_one()
            numbered = list(enumerate(rows, start=last - len(rows) + 1))
            done = [(number, row) for number, row in numbered if row["status"] == "completed"]
            write.connection.execute(
                insert(results), [_result(number, row) for number, row in done]
            )
            event_rows = [
                _event(number, row, kind)
                for number, row in numbered
                for kind in (*_KINDS, row["status"])
            ]
            write.connection.execute(insert(events), event_rows)
            write.connection.execute(
                insert(idempotency_keys), [_key(number, row) for number, row in numbered]
            )
            write.connection.execute(
                insert(deliveries), [_delivery(row, owner) for _, row in numbered]
            )
            write.connection.execute(insert(files), [_file(row) for _, row in numbered[::10]])
    if database.postgres:
        with database.engine.connect().execution_options(
            isolation_level="AUTOCOMMIT"
        ) as connection:
            connection.exec_driver_sql("ANALYZE")


def _job(index: int, owner: str, at: float) -> dict[str, Any]:
    mine = index % 2 == 0
    prompt = "a cat on the beach" if mine else f"a cat on beach {index}"
    extra = {
        "model": "sora-2",
        "prompt": prompt,
        "seconds": "4",
        "size": "128x128",
        "requested_size": "720x1280",
    }
    failed = index % 10 == 9
    return {
        "id": f"video_{secrets.token_hex(16)}",
        "owner": owner if mine else f"owner-{index % _OWNERS}",
        "kind": "video",
        "status": "failed" if failed else "completed",
        "request": {
            "prompt": prompt,
            "seconds": 4.0,
            "seed": index,
            "size": "128x128",
            "model": "diorama",
        },
        "metadata": {
            **extra,
            "fps": 16.0,
            "notices": ["diorama makes 128x128: 128x128 for 720x1280."],
        },
        "fingerprint": hashlib.sha256(prompt.encode()).hexdigest(),
        "progress": 99,
        "checkpoint": {"windows/0.bin": _asset(f"checkpoint {index}", "bin")} if failed else {},
        "token": 1,
        "error": {"code": "internal", "message": "Something went wrong.", "rule": None}
        if failed
        else None,
        "created_at": at,
        "started_at": at + 1.0,
        "completed_at": at + 9.0,
    }


def _asset(text: str, suffix: str) -> str:
    return f"asset:{hashlib.sha256(text.encode()).hexdigest()}.{suffix}"


def _result(number: int, job: dict[str, Any]) -> dict[str, Any]:
    suffixes = {"video": "mp4", "thumbnail": "webp", "spritesheet": "jpg"}
    assets = {name: _asset(f"{job['id']} {name}", suffix) for name, suffix in suffixes.items()}
    receipt = {
        "request": job["request"],
        "frames": {"shape": [65, 128, 128, 3], "fps": "16"},
        "notes": "x" * 800,
    }
    return {
        "job": number,
        "token": 1,
        "assets": assets,
        "receipt": receipt,
        "created_at": job["completed_at"],
    }


def _event(number: int, job: dict[str, Any], kind: str) -> dict[str, Any]:
    data = {"progress": 50, "phase": "denoise"} if kind == "progress" else {}
    return {
        "job": number,
        "owner": job["owner"],
        "type": f"video.{kind}",
        "data": data,
        "created_at": job["created_at"],
    }


def _key(number: int, job: dict[str, Any]) -> dict[str, Any]:
    key = {"owner": job["owner"], "key": job["id"], "fingerprint": job["fingerprint"]}
    return {**key, "job": number, "created_at": job["created_at"]}


def _delivery(job: dict[str, Any], owner: str) -> dict[str, Any]:
    event = {
        "endpoint": f"we_{owner}",
        "event": f"evt_{job['id']}",
        "payload": {"data": {"id": job["id"]}},
    }
    return {
        **event,
        "attempts": 1,
        "next_at": None,
        "status_code": 200,
        "created_at": job["completed_at"],
    }


def _file(job: dict[str, Any]) -> dict[str, Any]:
    named = {
        "id": f"file-{job['id'][6:30]}",
        "owner": job["owner"],
        "purpose": "vision",
        "name": "a.png",
    }
    return {
        **named,
        "asset": _asset(f"file {job['id']}", "png"),
        "size": 1_000,
        "created_at": job["created_at"],
    }


@dataclass(eq=False)
class Server:
    """A server process without workers, and a keep-alive connection to it."""

    process: "subprocess.Popen[str]"
    connection: http.client.HTTPConnection
    token: str
    ready_seconds: float

    def ask(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, quick: bool = True
    ) -> bytes:
        """Send a request and return the body. `quick`: set TCP_QUICKACK. Raises RuntimeError."""
        headers = {"authorization": f"Bearer {self.token}", "content-type": "application/json"}
        self.connection.request(method, path, None if body is None else json.dumps(body), headers)
        if quick and self.connection.sock is not None:
            self.connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        answer = self.connection.getresponse()
        content = answer.read()
        if answer.status != http.client.OK:
            raise RuntimeError(f"{method} {path}: {answer.status} {content[:200]!r}")
        return content

    def memory(self) -> int:
        """Return the resident memory in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(status.split("VmRSS:")[1].split()[0])


@contextmanager
def serve(settings: Settings) -> Iterator[Server]:
    """Run a server during the block, once /ready succeeds; it adopts its (empty) storage."""
    command = [
        sys.executable,
        "-c",
        _PROGRAM,
        "serve",
        "--adopt-storage",
        "--port",
        "0",
        "--no-worker",
        "--json",
    ]
    environment = {
        **os.environ,
        "SKYLOOM_DATA": str(settings.data),
        "SKYLOOM_DATABASE_URL": settings.database,
    }
    begun = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        ready = json.loads(process.stdout.readline())
        url = make_url(ready["url"])
        server = Server(
            process, http.client.HTTPConnection(str(url.host), url.port or 80), ready["token"], 0.0
        )
        server.ask("GET", "/ready")
        server.ready_seconds = time.perf_counter() - begun
        yield server
        server.connection.close()
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def calls(server: Server, leases: Leases, some_id: str) -> dict[str, Callable[[], object]]:
    """Return the measured calls of a server by name."""

    def create() -> None:
        made.append(
            json.loads(
                server.ask("POST", "/v1/videos", {"prompt": "a cat on the beach", "seconds": "4"})
            )["id"]
        )

    made: list[str] = []
    return {
        "create": create,
        "delete": lambda: server.ask("DELETE", f"/v1/videos/{made.pop()}"),
        "get": lambda: server.ask("GET", f"/v1/videos/{some_id}"),
        "list": lambda: server.ask("GET", "/v1/videos?limit=20"),
        "ready": lambda: server.ask("GET", "/ready"),
        "metrics": lambda: server.ask("GET", "/metrics"),
        "batches": lambda: server.ask("GET", "/v1/batches"),
        "worker_poll": lambda: leases.lease("bench"),
        "worker_beat": leases.expire,
        "kept_alive": lambda: server.ask("GET", f"/v1/videos/{some_id}", quick=False),
    }


def measure(two: list[Settings], rounds: int) -> tuple[dict[str, list[float]], list[list[float]]]:
    """Measure both servers in turns: median milliseconds per call; startup seconds and memory."""
    with ExitStack() as stack:
        databases = [Database(settings.database) for settings in two]
        servers = [stack.enter_context(serve(settings)) for settings in two]
        tables = []
        for settings, database, server in zip(two, databases, servers, strict=True):
            newest = json.loads(server.ask("GET", "/v1/videos?limit=1"))["data"][0]["id"]
            tables.append(calls(server, Leases(database, settings), newest))
        time.sleep(_SETTLE_SECONDS)
        memory = [float(server.memory()) for server in servers]
        took: dict[str, list[list[float]]] = {name: [[], []] for name in tables[0]}
        for turn in range(rounds):
            for name in took:
                for which in (0, 1) if turn % 2 else (1, 0):
                    begun = time.perf_counter()
                    tables[which][name]()
                    took[name][which].append(1e3 * (time.perf_counter() - begun))
        for database in databases:
            database.close()
    middle = {
        name: [statistics.median(one[rounds // 10 :]) for one in both]
        for name, both in took.items()
    }
    return middle, [[server.ready_seconds for server in servers], memory]


def run(two: list[Settings], rounds: int, starts: int) -> dict[str, Any]:
    """Measure all calls and `starts` startups; return medians and ratios."""
    middle, first = measure(two, rounds)
    ready, memory = [first[0]], [first[1]]
    for turn in range(starts - 1):
        pair = {which: [0.0, 0.0] for which in (0, 1)}
        for which in (0, 1) if turn % 2 else (1, 0):
            with serve(two[which]) as server:
                time.sleep(_SETTLE_SECONDS)
                pair[which] = [server.ready_seconds, float(server.memory())]
        ready.append([pair[0][0], pair[1][0]])
        memory.append([pair[0][1], pair[1][1]])
    middle["start"] = [1e3 * statistics.median(one[which] for one in ready) for which in (0, 1)]
    middle["memory_mib"] = [
        statistics.median(one[which] for one in memory) / 2**20 for which in (0, 1)
    ]
    ratios = {name: round(many / few, 3) for name, (few, many) in middle.items()}
    return {
        "ratios": ratios,
        "middle": {name: [round(one, 2) for one in both] for name, both in middle.items()},
    }


@contextmanager
def empty_database(url: str | None, folder: Path, count: int) -> Iterator[Settings]:
    """Create an empty database (file in `folder`, or on the server of `url`); yield settings."""
    data = folder / str(count)
    if url is None:
        yield Settings(data=data)
        return
    import psycopg

    name = f"skyloom_history_{count}_{os.getpid()}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"'.encode())
        try:
            made = make_url(url).set(database=name).render_as_string(hide_password=False)
            yield Settings(data=data, database_url=made)
        finally:
            connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)'.encode())


def main() -> None:
    """Run the command line."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--fast", action="store_true", help="fewer rounds and starts")
    options.add_argument(
        "--database", default=None, help="a Postgres (default: SQLite in a temporary folder)"
    )
    options.add_argument(
        "--jobs", type=int, nargs=2, default=[1_000, 100_000], metavar=("FEW", "MANY")
    )
    arguments = options.parse_args()
    rounds, starts = (100, 3) if arguments.fast else (400, 7)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        two = [
            stack.enter_context(empty_database(arguments.database, Path(name), count))
            for count in arguments.jobs
        ]
        for settings, count in zip(two, arguments.jobs, strict=True):
            database = Database(settings.database)
            seed(database, count)
            database.close()
        results = run(two, rounds, starts)
    kind = "postgres" if arguments.database else "sqlite"
    print(json.dumps({"jobs": arguments.jobs, "database": kind, **results}))


if __name__ == "__main__":
    main()
