"""How fast the queue is, and what it costs a video.

python bench/jobs.py [--rounds 5] [--database URL] [--videos 0]

A round puts 900 jobs of nine owners into an empty queue, by one thread and then by four; takes and finishes 200 of
them; and commits 900 single rows by the bare driver to the same disk, which is the most that any queue on it can do.
With --videos N, N videos of the bundled model are made by a worker and N by the pipeline into a file, signed and
registered as `skyloom generate` does, in turns; --seconds says how long they are. Prints one JSON line: the middle of
the rounds; "cpu" is milliseconds of processor time per job, which other programs on the machine change less than the
rate.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from skyloom.serve.queue.database import Database, choose_sqlite
from skyloom.serve.queue.jobs import JobResult, JobStore
from skyloom.serve.queue.leases import Leases
from skyloom.serve.settings import Settings

JOBS, TAKEN, OWNERS = 900, 200, 9


def submit_all(store: JobStore, threads: int) -> tuple[float, float]:
    """Jobs a second, and milliseconds of processor time for each."""

    def submit(number: int) -> None:
        owner = f"owner {number % OWNERS}"
        store.submit(
            {"prompt": "a cat on the beach", "seconds": 4.0},
            owner=owner,
            fingerprint=f"{number:064x}",
        )

    begun, worked = time.perf_counter(), time.process_time()
    if threads == 1:
        for number in range(JOBS):
            submit(number)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(submit, range(JOBS)))
    return JOBS / (time.perf_counter() - begun), 1e3 * (time.process_time() - worked) / JOBS


def finish_some(leases: Leases) -> float:
    """Jobs a second that are taken, get one heartbeat and are finished."""
    begun = time.perf_counter()
    for _ in range(TAKEN):
        lease = leases.lease("bench")
        assert lease is not None
        leases.heartbeat(lease, progress=50, phase="denoise")
        leases.finish(lease, JobResult({"video": "asset:x"}, {}))
    return TAKEN / (time.perf_counter() - begun)


def bare_commits(folder: Path) -> float:
    """Rows a second by the driver alone, each on disk before the next."""
    connection = choose_sqlite().connect(folder / "bare.db", isolation_level=None)
    for pragma in ("journal_mode=WAL", "synchronous=FULL"):
        connection.execute(f"PRAGMA {pragma}").fetchall()
    connection.execute("CREATE TABLE rows (content TEXT)")
    begun = time.perf_counter()
    for _ in range(JOBS):
        connection.execute("INSERT INTO rows VALUES (?)", ("x" * 400,))
    rate = JOBS / (time.perf_counter() - begun)
    connection.close()
    return rate


def one_round(url: str | None) -> dict[str, float]:
    """All of it once, on an empty database."""
    told: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for threads in (1, 4):
            settings = Settings(data=folder / str(threads), database_url=url)
            database = Database(settings.database)
            store = JobStore(database, settings)
            rate, cpu = submit_all(store, threads)
            told |= {f"enqueued_{threads}": rate, f"enqueue_cpu_{threads}": cpu}
            if threads == 1:
                told["finished"] = finish_some(Leases(database, settings))
            for job in list(store.walk()):
                store.delete(job.id)
            database.close()
        told["bare_commits"] = bare_commits(folder)
    return told


def videos(count: int, seconds: float) -> dict[str, float]:
    """Seconds of a video by a worker and by the pipeline alone."""
    from skyloom.generate.export import sign_and_register
    from skyloom.generate.pipeline import load
    from skyloom.generate.request import Request
    from skyloom.media.write import open_video
    from skyloom.safety.provenance import FrameHasher
    from skyloom.serve.storage import open_storage
    from skyloom.serve.workers.render import PipelineRenderer
    from skyloom.serve.workers.worker import Worker

    served, alone = [], []
    with tempfile.TemporaryDirectory() as name:
        settings = Settings(data=Path(name))
        database, storage = Database(settings.database), open_storage(settings.storage)
        store, render = JobStore(database, settings), PipelineRenderer(storage, "cpu")
        hand = Worker(
            Leases(database, settings), storage, render, settings, name="bench", device="cpu"
        )
        settings.runs.mkdir(parents=True)
        os.chdir(settings.runs)
        pipeline = load("diorama", device="cpu")
        for number in range(count + 1):
            request = Request(
                "a dog running to the right on the beach", seconds=seconds, seed=number
            )
            begun = time.perf_counter()
            store.submit(request.to_dict(), owner="bench")
            hand.run(until_empty=True)
            served.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            glimpses, receipt = FrameHasher(pipeline.info.fps), None
            with open_video(Path("alone.mp4"), pipeline.info.fps) as writer:
                for step in pipeline.stream(request, collect=False):
                    if step.frames is not None and len(step.frames):
                        writer.append(step.frames)
                        glimpses.append(step.frames)
                    writer.receipt = receipt = step.receipt or receipt
            assert receipt is not None
            sign_and_register(Path("alone.mp4"), receipt, perceptual_hashes=glimpses.hashes)
            alone.append(time.perf_counter() - begun)
        os.chdir("/")
        database.close()
    pairs = [
        mine / theirs for mine, theirs in zip(served[1:], alone[1:], strict=True)
    ]  # the first one loads
    return {
        "served_seconds": statistics.median(served[1:]),
        "alone_seconds": statistics.median(alone[1:]),
        "served_to_alone": statistics.median(pairs),
    }


def main() -> None:
    """Rounds, and then the videos."""
    options = argparse.ArgumentParser()
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument(
        "--database", default=None, help="an empty Postgres (default: SQLite in a temporary folder)"
    )
    options.add_argument("--videos", type=int, default=0)
    options.add_argument("--seconds", type=float, default=4.0, help="of a video")
    asked = options.parse_args()
    rounds = [one_round(asked.database) for _ in range(asked.rounds)]
    told = (
        {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
        if rounds
        else {}
    )
    told |= videos(asked.videos, asked.seconds) if asked.videos else {}
    print(json.dumps({name: round(value, 3) for name, value in told.items()}))


if __name__ == "__main__":
    main()
