"""Four clients with four keys wait for one worker with the bundled model: whose videos are made
when.

The first puts all hers in before the others come. Told are the order of the ends, how long each
waited on average, and how far apart the clients ever were in finished videos while all of them
still waited. Prints one line of JSON; exits with 1 when somebody was ahead by more than one.

    python tests/serve/fair.py --videos 5 [--seconds 2]
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import httpx2
import live

from skyloom.serve.queue.api_keys import KeyStore
from skyloom.serve.queue.database import Database
from skyloom.serve.queue.jobs import Job, JobStore
from skyloom.serve.settings import Settings

CLIENTS = ("ada", "bob", "cleo", "dan")


def make_all(url: str, keys: dict[str, str], videos: int, seconds: str) -> None:
    """Every client's wishes: all of the first one's, then one of each of the others in turn."""
    wishes = [CLIENTS[0]] * videos + [client for _ in range(videos) for client in CLIENTS[1:]]
    for number, client in enumerate(wishes):
        body = {
            "prompt": f"a {('red', 'blue', 'green')[number % 3]} ball on the beach",
            "seconds": seconds,
            "seed": number,
        }
        answer = httpx2.post(
            f"{url}/v1/videos", json=body, headers={"authorization": f"Bearer {keys[client]}"}
        )
        answer.raise_for_status()


def most_ahead(ends: list[Job]) -> int:
    """How many finished videos the first was ever ahead of the last, until somebody had all."""
    counts, most = dict.fromkeys(CLIENTS, 0), 0
    for job in ends:
        counts[job.owner] += 1
        if max(counts.values()) == len(ends) // len(CLIENTS):
            break
        most = max(most, max(counts.values()) - min(counts.values()))
    return most


def main() -> None:
    """Wish, wait, and look at the order."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--videos", type=int, default=5, help="of each client")
    parser.add_argument("--seconds", default="2", help="of each video")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="skyloom-fair-") as name:
        settings = Settings(data=Path(name))
        database = Database(settings.database)
        store, keys = JobStore(database, settings), {}
        for client in CLIENTS:
            keys[client] = KeyStore(database).create(client)[1]
        with live.serving(Path(name)) as server:
            make_all(server.url, keys, options.videos, options.seconds)
            live.wait_for("all videos", lambda: all(job.done for job in store.walk()), 1_800.0, 1.0)
        ends = sorted(store.walk(), key=lambda job: job.completed_at or 0.0)
    waits = {
        client: [(job.started_at or 0.0) - job.created_at for job in ends if job.owner == client]
        for client in CLIENTS
    }
    summary = {
        "videos": len(ends),
        "completed": sum(job.status == "completed" for job in ends),
        "most_ahead": most_ahead(ends),
    }
    summary |= {"order": "".join(job.owner[0] for job in ends)}
    summary |= {
        "wait_seconds": {client: round(sum(some) / len(some), 1) for client, some in waits.items()}
    }
    summary |= {"longest_wait": {client: round(max(some), 1) for client, some in waits.items()}}
    sys.stdout.write(json.dumps(summary) + "\n")
    sys.exit(0 if summary["most_ahead"] <= 1 and summary["completed"] == len(ends) else 1)


if __name__ == "__main__":
    main()
