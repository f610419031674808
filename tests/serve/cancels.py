"""Videos cancelled at random times, waiting or being made, at a real server with real workers.

Measured is the time from the answer to a cancel until the job is let go, which is when its worker
has stopped; and what is left behind: files, children, memory. A cancel may take 2 s and one step of
the fake renderer, and 2 s with the model. Prints one line of JSON; exits with 1 when a promise is
broken.

python tests/serve/cancels.py --cancels 500            # fake renders with steps of known length
    python tests/serve/cancels.py --cancels 40 --model     # the bundled model
"""

import argparse
import json
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import live

from skyloom.serve.queue.database import Database
from skyloom.serve.queue.jobs import Job, JobStore
from skyloom.serve.settings import Settings
from skyloom.serve.storage import FolderStorage

SLACK = 2.0  # seconds that a cancel may take beside one step
LOOK = 0.01  # seconds between two looks at a job
FAKE = live.Fake(workers=4, steps=30, seconds=0.1)
REQUEST = {"prompt": "a red ball rolling on the beach", "seconds": 20.0, "quality": "best"}


@dataclass
class Tally:
    """What came of the cancels: seconds of those that ran and of those that waited, and steps of
    jobs that went on."""

    most: int
    ran: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    too_late: int = 0

    @property
    def full(self) -> bool:
        """Whether there were enough."""
        return len(self.ran) + len(self.waited) >= self.most


def cancel_some(store: JobStore, tally: Tally, number: int, longest: float) -> None:
    """Submit and cancel, one after another, until there were enough."""
    dice = random.Random(number)
    while not tally.full:
        job = store.submit(dict(REQUEST), owner=f"owner {number}")
        if dice.random() < 0.75:  # else it is cancelled wherever it is
            while store.get(job.id).status == "queued":
                time.sleep(LOOK)
        time.sleep(dice.uniform(0.0, longest))
        ran = store.get(job.id).status == "in_progress"
        answer, begun = store.cancel(job.id), time.monotonic()
        while not (now := store.get(job.id)).done:
            time.sleep(LOOK)
        note(tally, now, ran or answer.status == "in_progress", time.monotonic() - begun)


def note(tally: Tally, job: Job, ran: bool, seconds: float) -> None:
    """Count a cancel; one that came after the end is none."""
    if job.status == "failed":
        raise SystemExit(f"a job failed: {job.error}")
    if job.status != "cancelled":
        tally.too_late += 1
    else:
        (tally.ran if ran else tally.waited).append(seconds)


def left_behind(data: Path, store: JobStore) -> dict[str, int]:
    """Files that no job names and nobody will: in the making, half stored, temporary."""
    storage = FolderStorage(data / "assets")
    for job in list(store.walk()):
        store.delete(job.id)
    kept = store.referenced_assets()
    for stored, _ in list(storage.assets()):
        if stored.reference not in kept:
            storage.remove(stored.key)
    folders = {"runs": "runs/*", "parts": "assets/.parts", "temporary": "tmp"}
    left = {
        name: len([one for one in data.glob(f"{folder}/*") if not one.name.startswith(live.TORCH)])
        for name, folder in folders.items()
    }
    return {**left, "stored": len(list((data / "assets").glob("??/*")))}


def main() -> None:
    """Cancel, and look what is left."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cancels", type=int, default=500)
    parser.add_argument(
        "--model", action="store_true", help="the bundled model instead of the fake renderer"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="skyloom-cancels-") as name:
        data = Path(name)
        settings, threads = Settings(data=data), 2 if options.model else 6
        with live.serving(data, None if options.model else FAKE) as server:
            store = JobStore(Database(settings.database), settings)
            step = (
                0.0 if options.model else FAKE.seconds
            )  # a step of the model is as long as the machine likes
            live.wait_for(
                "workers", lambda: store.counts().workers >= (1 if options.model else FAKE.workers)
            )
            family = live.children(server.process.pid)
            tally, longest = (
                Tally(options.cancels),
                3.0 if options.model else FAKE.steps * FAKE.seconds,
            )
            with (
                live.Watch([server.process.pid, *family]) as watch,
                ThreadPoolExecutor(threads) as clients,
            ):
                for one in [
                    clients.submit(cancel_some, store, tally, number, longest)
                    for number in range(threads)
                ]:
                    one.result()
            same = live.children(server.process.pid) == family
            left = left_behind(data, store)
            memory = {f"worker_{index}": watch.summary(one) for index, one in enumerate(family)}
            memory["server"] = watch.summary(server.process.pid)
    summary = {
        "cancels": len(tally.ran) + len(tally.waited),
        "running": len(tally.ran),
        "too_late": tally.too_late,
    }
    summary |= {
        "step": round(step, 3),
        "p50": live.percentile(tally.ran, 0.5),
        "p95": live.percentile(tally.ran, 0.95),
    }
    summary |= {
        "slowest": round(max(tally.ran), 3),
        "p95_waiting": live.percentile(tally.waited, 0.95),
    }
    sys.stdout.write(
        json.dumps({**summary, "left": left, "children_same": same, "memory": memory}) + "\n"
    )
    flat = all(one["grew_percent"] <= live.GROWTH for one in memory.values())
    sys.exit(
        0 if summary["p95"] <= step + SLACK and not any(left.values()) and same and flat else 1
    )


if __name__ == "__main__":
    main()
