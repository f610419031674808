"""Two hundred clients at one real server for a minute: they make, poll, list, download in part,
delete and listen.

The clients are in this process, the server and its workers (with the fake renderer) in others; all
of it stays on this machine. No answer may be a server error, the queue stays within its bound,
every 429 says when to come again, and the server's memory, files and threads stay as they are.
Prints one line of JSON; exits with 1 when that is not so.

    python tests/serve/crowd.py --clients 200 --seconds 60 [--rate 60]
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import live

from skyloom.serve.queue.api_keys import KeyStore
from skyloom.serve.queue.database import Database
from skyloom.serve.queue.jobs import JobStore
from skyloom.serve.settings import Settings

OWNERS, MOST, MOST_OF_OWNER = 20, 60, 6
FAKE = live.Fake(workers=2, steps=4, seconds=0.02)
SHARES = {"create": 30, "poll": 25, "list": 10, "content": 15, "delete": 12, "events": 8}
ALLOWED = {
    "create": {200, 429},
    "content": {200, 206, 404, 409, 416},
}  # others: 200, or 404 once it is deleted
POOLED = 16  # files of the connections to the database that the server keeps
SLOWEST_STREAM = 5.0  # seconds that a client listens


@dataclass
class Tally:
    """What the clients saw."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    refused: int = 0
    deepest: int = 0

    def note(self, call: str, answer: httpx2.Response, begun: float) -> None:
        """An answer has come."""
        self.seconds[call].append(time.monotonic() - begun)
        self.statuses[answer.status_code] += 1
        if answer.status_code not in ALLOWED.get(call, {200, 404}):
            self.wrong.append(f"{call} {answer.status_code}")
        if answer.status_code == httpx2.codes.TOO_MANY_REQUESTS:
            self.refused += 1
            if not 1 <= int(answer.headers.get("retry-after", "0")) <= 120:
                self.wrong.append(f"retry-after {answer.headers.get('retry-after')}")


class Client:
    """One of them, who knows her own videos."""

    def __init__(self, number: int, http: httpx2.AsyncClient, tally: Tally) -> None:
        self.dice, self.http, self.tally = random.Random(number), http, tally
        self.mine: list[str] = []

    async def live(self, until: float, pace: float) -> None:
        """Call after call, `pace` seconds apart on average."""
        await asyncio.sleep(self.dice.uniform(0.0, pace))
        while time.monotonic() < until:
            call = (
                self.dice.choices(list(SHARES), list(SHARES.values()))[0] if self.mine else "create"
            )
            begun = time.monotonic()
            try:
                await getattr(self, call)(begun)
            except httpx2.HTTPError as error:
                self.tally.wrong.append(f"{call} {type(error).__name__}")
            await asyncio.sleep(min(self.dice.expovariate(1 / pace), 5 * pace))

    async def create(self, begun: float) -> None:
        """A new video."""
        body = {"prompt": f"a ball {self.dice.random()}", "seconds": "4"}
        answer = await self.http.post("/v1/videos", json=body)
        self.tally.note("create", answer, begun)
        if answer.status_code == httpx2.codes.OK:
            self.mine.append(answer.json()["id"])

    async def poll(self, begun: float) -> None:
        """How far it is."""
        self.tally.note("poll", await self.http.get(f"/v1/videos/{self._any()}"), begun)

    async def list(self, begun: float) -> None:
        """The owner's newest."""
        self.tally.note("list", await self.http.get("/v1/videos", params={"limit": 20}), begun)

    async def content(self, begun: float) -> None:
        """A part of the file."""
        start = self.dice.randrange(20_000)
        part = {"range": f"bytes={start}-{start + 4_000}"}
        self.tally.note(
            "content", await self.http.get(f"/v1/videos/{self._any()}/content", headers=part), begun
        )

    async def delete(self, begun: float) -> None:
        """Gone."""
        gone = self.mine.pop(self.dice.randrange(len(self.mine)))
        self.tally.note("delete", await self.http.delete(f"/v1/videos/{gone}"), begun)

    async def events(self, begun: float) -> None:
        """Listen until the video is done, or some seconds; the time is until the first line."""
        async with self.http.stream("GET", f"/v1/videos/{self._any()}/events") as answer:
            first = True
            async for _ in answer.aiter_lines():
                if first:
                    self.tally.note("events", answer, begun)
                first = False
                if time.monotonic() - begun > SLOWEST_STREAM:
                    return

    def _any(self) -> str:
        return self.dice.choice(self.mine[-10:])


async def look_at_queue(store: JobStore, tally: Tally, until: float) -> None:
    """How many wait or run, twice a second."""
    while time.monotonic() < until:
        by_status = await asyncio.to_thread(lambda: store.counts().by_status)
        tally.deepest = max(
            tally.deepest, sum(by_status.get(one, 0) for one in ("queued", "in_progress", "paused"))
        )
        await asyncio.sleep(0.5)


async def crowd(url: str, keys: list[str], store: JobStore, options: argparse.Namespace) -> Tally:
    """All clients at once, each with a connection of its own."""
    tally, until, pace = Tally(), time.monotonic() + options.seconds, options.clients / options.rate
    https = [
        httpx2.AsyncClient(
            base_url=url,
            headers={"authorization": f"Bearer {keys[number % OWNERS]}"},
            verify=False,
            timeout=30,
        )
        for number in range(options.clients)
    ]
    lives = [Client(number, http, tally).live(until, pace) for number, http in enumerate(https)]
    await asyncio.gather(*lives, look_at_queue(store, tally, until))
    for http in https:
        await http.aclose()
    return tally


def main() -> None:
    """A minute of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=60.0, help="calls a second by all of them")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="skyloom-crowd-") as name:
        settings = Settings(data=Path(name), max_queued=MOST, max_queued_per_owner=MOST_OF_OWNER)
        database = Database(settings.database)
        keys = [KeyStore(database).create(f"owner-{number}")[1] for number in range(OWNERS)]
        bounds = {"max_queued": MOST, "max_queued_per_owner": MOST_OF_OWNER, "disk_reserve": 0}
        with live.serving(Path(name), FAKE, **bounds) as server:
            process, store = server.process.pid, JobStore(database, settings)
            live.wait_for("workers", lambda: store.counts().workers == FAKE.workers)
            before = live.read_process(process)
            with live.Watch([process]) as watch:
                tally = asyncio.run(crowd(server.url, keys, store, options))
            memory = watch.summary(process)
            live.wait_for(
                "connections to close",
                lambda: live.read_process(process)["fds"] <= before["fds"] + POOLED,
                60.0,
            )
            after, exit_seconds = live.read_process(process), server.stop()
            code = server.process.returncode
    calls = {
        call: {"calls": len(some), "p50_ms": _ms(some, 0.5), "p99_ms": _ms(some, 0.99)}
        for call, some in sorted(tally.seconds.items())
    }
    summary = {
        "clients": options.clients,
        "seconds": options.seconds,
        "calls": sum(tally.statuses.values()),
    }
    summary |= {
        "statuses": dict(sorted(tally.statuses.items())),
        "wrong": Counter(tally.wrong),
        "refused": tally.refused,
    }
    summary |= {
        "deepest_queue": tally.deepest,
        "server": memory,
        "fds_idle": [before["fds"], after["fds"]],
        "exit": code,
    }
    sys.stdout.write(
        json.dumps({**summary, "exit_seconds": round(exit_seconds, 1), **calls}) + "\n"
    )
    flat = memory["grew_percent"] <= live.GROWTH
    sys.exit(0 if not tally.wrong and tally.deepest <= MOST and flat and code == 0 else 1)


def _ms(some: list[float], part: float) -> float:
    return round(1_000 * live.percentile(some, part), 1)


if __name__ == "__main__":
    main()
