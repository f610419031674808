"""A real server told to end, again and again, while its workers have jobs in hand; and each time
started again.

It must end within ten seconds, keep every job and lose no step of it; told twice it must end at
once. Clients go on submitting meanwhile, with keys, and come again when nobody answers. The worker
renders with the fake renderer, or with the bundled model. Prints one line of JSON; exits with 1
when a promise is broken.

    python tests/serve/drains.py --drains 100
    python tests/serve/drains.py --drains 10 --model
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import live

from skyloom.serve.queue.database import Database
from skyloom.serve.queue.jobs import JobStore
from skyloom.serve.settings import Settings

FAKE = live.Fake(workers=2, steps=20, seconds=0.1)
MOST_SECONDS, AT_ONCE_SECONDS = 10.0, 2.0
BOUNDS = {"max_queued": 40, "max_queued_per_owner": 40, "disk_reserve": 0}


@dataclass
class Client:
    """One who submits for ever to whatever server there is; the ids that it answered, by key."""

    store: JobStore
    pause: float
    server: live.Server | None = None
    allowed: tuple[int, ...] = (429, 503)
    refused: list[int] = field(default_factory=list)
    ids: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """A wish after another, each until it is taken."""
        number, http = 0, httpx2.Client(verify=False, timeout=10)  # nothing is encrypted here
        while not self.over.wait(self.pause):
            key, server = f"wish-{number}", self.server
            if server is None:
                continue
            headers = {**server.headers, "idempotency-key": key}
            body = {"prompt": f"a ball, number {number}", "seconds": "4"}
            try:
                answer = http.post(f"{server.url}/v1/videos", json=body, headers=headers)
            except httpx2.HTTPError:
                continue
            if answer.status_code == httpx2.codes.OK:
                self.ids[key] = answer.json()["id"]
                number += 1
                continue
            self.refused.append(answer.status_code)
            if answer.status_code not in self.allowed:
                self.wrong.append(f"{answer.status_code} {answer.text[:100]}")


def one_drain(
    data: Path, client: Client, fake: live.Fake | None, dice: random.Random, *, twice: bool
) -> float:
    """Start, wait until a job is being made, tell it to end; the seconds that it took."""
    server = client.server = live.start(data, fake, **BOUNDS)
    live.wait_for("work", lambda: client.store.counts().by_status.get("in_progress"), 120.0, 0.02)
    time.sleep(dice.uniform(0.0, 1.0))
    family = live.children(server.process.pid)
    begun = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    if twice:
        time.sleep(dice.uniform(0.0, 0.2))
        begun = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
    code = server.process.wait(60)
    seconds = time.monotonic() - begun
    client.wrong += [f"exit {code}"] if code else []
    client.wrong += [f"child {child} lives" for child in family if Path(f"/proc/{child}").exists()]
    return seconds


def main() -> None:
    """Drain, start, drain; then let all be made, and judge."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--drains", type=int, default=100)
    parser.add_argument(
        "--model", action="store_true", help="the bundled model instead of the fake renderer"
    )
    options, dice = parser.parse_args(), random.Random(0)
    fake = None if options.model else FAKE
    with tempfile.TemporaryDirectory(prefix="skyloom-drains-") as name:
        data = Path(name)
        settings = Settings(data=data)
        store = JobStore(Database(settings.database), settings)
        client = Client(store, 2.0 if options.model else 0.3)
        thread = threading.Thread(target=client.run, daemon=True)
        thread.start()
        once = [one_drain(data, client, fake, dice, twice=False) for _ in range(options.drains)]
        twice = [
            one_drain(data, client, fake, dice, twice=True)
            for _ in range(max(1, options.drains // 10))
        ]
        client.over.set()
        thread.join()
        with live.serving(data, fake, **BOUNDS):
            live.wait_for(
                "rest",
                lambda: not {"queued", "in_progress"} & set(store.counts().by_status),
                600.0,
                0.5,
            )
        jobs = {job.id: job for job in list(store.walk())}
    lost = [id for id in client.ids.values() if id not in jobs or jobs[id].status != "completed"]
    summary = {
        "drains": len(once),
        "p50": live.percentile(once, 0.5),
        "slowest": round(max(once), 2),
    }
    summary |= {
        "told_twice": len(twice),
        "slowest_at_once": round(max(twice), 2),
        "jobs": len(jobs),
        "lost": len(lost),
    }
    summary |= {
        "doubled": len(jobs) - len(client.ids),
        "attempts": sum(job.attempts for job in jobs.values()),
    }
    sys.stdout.write(json.dumps({**summary, "wrong": client.wrong[:10]}) + "\n")
    good = summary["slowest"] <= MOST_SECONDS and summary["slowest_at_once"] <= AT_ONCE_SECONDS
    good = good and not lost and not client.wrong and summary["doubled"] in (0, 1)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
