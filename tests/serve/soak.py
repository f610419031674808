"""A real server with its worker and the bundled model, for as long as is wanted: small videos
without an end.

Four clients with four keys make, look at, download and delete. Read are memory, open files,
threads, temporary files and what is stored; none may grow. Prints one line of JSON; exits with 1
when something does.

    python tests/serve/soak.py --minutes 10
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx2
import live

from skyloom.serve.queue.api_keys import KeyStore
from skyloom.serve.queue.database import Database
from skyloom.serve.queue.jobs import JobStore
from skyloom.serve.settings import Settings

CLIENTS = ("ada", "bob", "cleo", "dan")
KEPT = 3  # videos that a client keeps before she deletes the oldest
MORE_FILES = 6  # open files that come and go


def client(url: str, key: str, until: float, wrong: list[str]) -> None:
    """Make a video, wait for it, download it, delete the oldest; again."""
    number, kept = 0, list[str]()
    with httpx2.Client(
        base_url=url, headers={"authorization": f"Bearer {key}"}, verify=False, timeout=60
    ) as http:
        while time.monotonic() < until:
            body = {
                "prompt": "a red ball on the beach",
                "seconds": "1",
                "model": "diorama",
                "seed": number,
            }
            video = http.post("/v1/videos", json=body).json()
            while video["status"] in ("queued", "in_progress"):
                time.sleep(0.5)
                video = http.get(f"/v1/videos/{video['id']}").json()
            content = http.get(f"/v1/videos/{video['id']}/content")
            if content.status_code != httpx2.codes.OK or content.content[4:8] != b"ftyp":
                wrong.append(f"{video['status']} {content.status_code}")
            kept.append(video["id"])
            number += 1
            if len(kept) > KEPT:
                http.delete(f"/v1/videos/{kept.pop(0)}").raise_for_status()


def main() -> None:
    """So many minutes of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10.0)
    options, wrong = parser.parse_args(), list[str]()
    with tempfile.TemporaryDirectory(prefix="skyloom-soak-") as name:
        data = Path(name)
        settings = Settings(data=data)
        database = Database(settings.database)
        store, keys = (
            JobStore(database, settings),
            [KeyStore(database).create(owner)[1] for owner in CLIENTS],
        )
        with live.serving(data) as server:
            live.wait_for("a worker", lambda: store.counts().workers, 120.0)
            family, until = (
                live.children(server.process.pid),
                time.monotonic() + 60 * options.minutes,
            )
            threads = [
                threading.Thread(target=client, args=(server.url, key, until, wrong))
                for key in keys
            ]
            with live.Watch([server.process.pid, *family]) as watch:
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            same = live.children(server.process.pid) == family
            memory = {
                "server": watch.summary(server.process.pid),
                "worker": watch.summary(family[0]),
            }
            left = {
                folder: len(list(data.glob(f"{folder}/*")))
                for folder in ("runs/*", "assets/.parts")
            }
            left["tmp"] = len(
                [path for path in (data / "tmp").iterdir() if not path.name.startswith(live.TORCH)]
            )
        rows = store.page(limit=100)[0]
        stored = len(list((data / "assets").glob("??/*")))
        made = max((job.number for job in rows), default=0)
    answer = {
        "minutes": options.minutes,
        "videos": made,
        "wrong": wrong[:5],
        "children_same": same,
        **memory,
    }
    sys.stdout.write(
        json.dumps({**answer, "left": left, "rows": len(rows), "stored": stored}) + "\n"
    )
    flat = all(
        one["grew_percent"] <= live.GROWTH and one[name][1] <= one[name][0] + MORE_FILES
        for one in memory.values()
        for name in ("fds", "threads")
    )
    sys.exit(0 if not wrong and same and flat and not any(left.values()) else 1)


if __name__ == "__main__":
    main()
