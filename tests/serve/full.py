"""A disk that is full at 200 places of a job's life: its database, its storage and its state lie on
a small tmpfs.

For each place another amount of room is left. A client submits, a worker renders with the fake
renderer, and after a moment the room comes back. A client that received an id gets its video, or
the error `disk_full`; no file is there in part, no job is lost, and the queue goes on by itself.
Prints one line of JSON; exits with 1 when that is not so.

    python tests/serve/full.py --places 200       # needs the right to mount (root)
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import swarm
from sqlalchemy.exc import SQLAlchemyError

from skyloom.core.errors import SkyloomError
from skyloom.serve.queue.database import Database
from skyloom.serve.queue.jobs import JobStore
from skyloom.serve.queue.leases import Leases
from skyloom.serve.settings import Settings
from skyloom.serve.storage import FolderStorage
from skyloom.serve.workers import worker

ROOM = 8 * 2**20  # bytes of the disk
NEED = 256 * 1024  # a job, its row, its state and its result take less than this
FULL_SECONDS, LONG_SECONDS = 0.4, 4.0  # until there is room again; the long ones outlast all tries
PAGE = 4_096


class Ear(logging.Handler):
    """Counts what workers complain of."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        """One line of the log."""
        self.heard[record.msg] += record.levelno >= logging.WARNING


class Clock:
    """Time as it is, and what was added to it: a job that found no disk waits for a minute."""

    def __init__(self) -> None:
        self.added = 0.0

    def __call__(self) -> float:
        return time.time() + self.added


@contextmanager
def small_disk() -> Iterator[Path]:
    """A tmpfs while the block runs."""
    with tempfile.TemporaryDirectory(prefix="skyloom-full-") as name:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "none", name], check=True)
        try:
            yield Path(name)
        finally:
            subprocess.run(["umount", name], check=True)


def fill(disk: Path, room: int) -> Path:
    """Take all of the disk but so many bytes."""
    stuff, space = disk / "stuff", os.statvfs(disk)
    with stuff.open("wb") as file:
        for _ in range(max(0, space.f_bavail * space.f_frsize - room) // PAGE):
            file.write(b"x" * PAGE)
    return stuff


def one_place(disk: Path, database: Database, clock: Clock, number: int, room: int) -> str:
    """A job whose disk is full for a moment; what came of it. Raises AssertionError for a broken
    promise."""
    settings = Settings(
        data=disk, heartbeat_seconds=0.05, lease_seconds=5.0, disk_reserve=0, max_attempts=5
    )
    store, leases, storage = (
        JobStore(database, settings),
        Leases(database, settings),
        FolderStorage(disk / "assets"),
    )
    settings.runs.mkdir(parents=True, exist_ok=True)
    hand = worker.Worker(leases, storage, swarm.fake_render, settings, name="hand", device="none")
    prompt, stuff = f"place {number}", fill(disk, room)
    back = threading.Timer(LONG_SECONDS if number % 10 == 0 else FULL_SECONDS, stuff.unlink)
    back.start()
    submitted, met = None, set[str]()
    while submitted is None:  # as a client does: again with the same key
        try:
            submitted = store.submit(
                {"prompt": prompt}, owner="ada", key=prompt, fingerprint=prompt
            )
        except (SQLAlchemyError, SkyloomError) as error:
            met.add(type(error).__name__)
            time.sleep(0.05)
    for _ in range(20):
        hand.run(until_empty=True)
        whole(disk)
        if store.get(submitted.id).done:
            break
        clock.added += 61.0  # until the next try
    back.join()
    job = store.get(submitted.id)
    attempts = [event.type for event in store.events(job=submitted.id)].count("video.queued") - 1
    assert job.done, f"{job.status} for ever"
    if job.status == "completed":
        assert job.result is not None
        asset = swarm.Asset.parse(job.result.assets["video"])
        assert b"".join(storage.read(asset)) == swarm.frames_of(prompt), "other frames"
    else:
        assert job.error is not None
        assert job.error.code == "disk_full", job.error
        store.retry(submitted.id)
        hand.run(until_empty=True)
        assert store.get(submitted.id).status == "completed", "no retry"
    return (
        "submitted again"
        if met
        else f"{job.status} after {attempts} more tries"
        if attempts
        else job.status
    )


def whole(disk: Path) -> None:
    """Whatever has a name in the storage is what its name says."""
    for path in (disk / "assets").glob("??/*"):
        assert sha256(path.read_bytes()).hexdigest() == path.stem, "a file in part"


def main() -> None:
    """All places, from no room at all to enough."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--places", type=int, default=200)
    options, begun, ends, clock = parser.parse_args(), time.monotonic(), Counter[str](), Clock()
    worker.RETRY_SECONDS, ear = 0.05, Ear()
    worker.log.addHandler(ear)
    worker.log.propagate = False
    with small_disk() as disk:
        (disk / "assets").mkdir()
        database = Database(f"sqlite:///{disk / 'jobs.db'}", clock)
        for number in range(options.places):
            ends[one_place(disk, database, clock, number, NEED * number // options.places)] += 1
            store = JobStore(database, Settings(data=disk))
            for job in store.page(limit=10)[0]:
                store.delete(job.id)
            storage = FolderStorage(disk / "assets")
            for stored, _ in list(storage.assets()):
                storage.remove(stored.key)
            with database.engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
            left = [*(disk / "runs").glob("*/*"), *(disk / "assets/.parts").iterdir()]
            assert not left, left
        damage = len(database.check())
        database.close()
    summary = {
        "places": options.places,
        **ends,
        "complaints": ear.heard,
        "damage": damage,
        "seconds": round(time.monotonic() - begun, 1),
    }
    sys.stdout.write(json.dumps(summary) + "\n")
    sys.exit(1 if damage else 0)


if __name__ == "__main__":
    main()
