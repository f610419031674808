"""Measure the throughput of the job queue, and its overhead per video.

python bench/jobs.py [--rounds 5] [--database URL] [--videos 0]

A round submits 900 jobs of nine owners to an empty queue, with one thread and with four; leases and
finishes 200 of them; and commits 900 single rows with the bare driver to the same disk, as an upper
bound. With --videos N, a worker and the pipeline alone generate N videos each in turns, signed and
registered as `skyloom generate` does; --seconds sets their duration. Prints one JSON line of
medians; "cpu" is milliseconds of processor time per job, less sensitive to other load than rates.
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

JOBS = 900
LEASED = 200
OWNERS = 9


def submit_all(store: JobStore, threads: int) -> tuple[float, float]:
    """Submit all jobs; return jobs per second and milliseconds of processor time per job."""

    def submit(number: int) -> None:
        owner = f"owner {number % OWNERS}"
        store.submit(
            {"prompt": "a cat on the beach", "seconds": 4.0},
            owner=owner,
            fingerprint=f"{number:064x}",
        )

    begun = time.perf_counter()
    cpu_begun = time.process_time()
    if threads == 1:
        for number in range(JOBS):
            submit(number)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(submit, range(JOBS)))
    return JOBS / (time.perf_counter() - begun), 1e3 * (time.process_time() - cpu_begun) / JOBS


def finish_some(leases: Leases) -> float:
    """Lease, heartbeat and finish jobs; return jobs per second."""
    begun = time.perf_counter()
    for _ in range(LEASED):
        lease = leases.lease("bench")
        assert lease is not None
        leases.heartbeat(lease, progress=50, phase="denoise")
        leases.finish(lease, JobResult({"video": "asset:x"}, {}))
    return LEASED / (time.perf_counter() - begun)


def bare_commits(folder: Path) -> float:
    """Commit single rows with the bare driver, synchronously; return rows per second."""
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
    """Run one round on an empty database."""
    results: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for threads in (1, 4):
            settings = Settings(data=folder / str(threads), database_url=url)
            database = Database(settings.database)
            store = JobStore(database, settings)
            rate, cpu = submit_all(store, threads)
            results[f"enqueued_{threads}"] = rate
            results[f"enqueue_cpu_{threads}"] = cpu
            if threads == 1:
                results["finished"] = finish_some(Leases(database, settings))
            for job in list(store.walk()):
                store.delete(job.id)
            database.close()
        results["bare_commits"] = bare_commits(folder)
    return results


def videos(count: int, seconds: float) -> dict[str, float]:
    """Measure seconds per video with a worker and with the pipeline alone."""
    from skyloom.generate.export import sign_and_register
    from skyloom.generate.pipeline import load
    from skyloom.generate.request import Request
    from skyloom.media.write import open_video
    from skyloom.safety.provenance import FrameHasher
    from skyloom.serve.storage import open_storage
    from skyloom.serve.workers.render import PipelineRenderer
    from skyloom.serve.workers.worker import Worker

    served: list[float] = []
    alone: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        settings = Settings(data=Path(name))
        database = Database(settings.database)
        storage = open_storage(settings.storage)
        store = JobStore(database, settings)
        render = PipelineRenderer(storage, "cpu")
        worker = Worker(
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
            worker.run(until_empty=True)
            served.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            hasher = FrameHasher(pipeline.info.fps)
            receipt = None
            with open_video(Path("alone.mp4"), pipeline.info.fps) as writer:
                for step in pipeline.stream(request, collect=False):
                    if step.frames is not None and len(step.frames):
                        writer.append(step.frames)
                        hasher.append(step.frames)
                    writer.receipt = receipt = step.receipt or receipt
            assert receipt is not None
            sign_and_register(Path("alone.mp4"), receipt, perceptual_hashes=hasher.hashes)
            alone.append(time.perf_counter() - begun)
        os.chdir("/")
        database.close()
    # The first run of each side loads the model.
    ratios = [mine / theirs for mine, theirs in zip(served[1:], alone[1:], strict=True)]
    return {
        "served_seconds": statistics.median(served[1:]),
        "alone_seconds": statistics.median(alone[1:]),
        "served_to_alone": statistics.median(ratios),
    }


def main() -> None:
    """Run the command line."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument(
        "--database", default=None, help="an empty Postgres (default: SQLite in a temporary folder)"
    )
    options.add_argument("--videos", type=int, default=0)
    options.add_argument("--seconds", type=float, default=4.0, help="of a video")
    arguments = options.parse_args()
    rounds = [one_round(arguments.database) for _ in range(arguments.rounds)]
    results = (
        {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
        if rounds
        else {}
    )
    if arguments.videos:
        results.update(videos(arguments.videos, arguments.seconds))
    print(json.dumps({name: round(value, 3) for name, value in results.items()}))


if __name__ == "__main__":
    main()
