"""Real processes on a real queue, killed at random with SIGKILL; then nothing may be lost, doubled
or wrong.

Submitters put jobs in and write down each id once they have it; workers render with a fake renderer
whose frames are a chain of hashes that is resumed from files; a killer kills either and starts
another. The processes are forks of one that has imported everything and opened nothing. Prints one
line of JSON; exits with 1 when a promise is broken.

    python tests/serve/swarm.py --kills 1000 [--database URL] [--workers 4]
"""

import argparse
import hashlib
import importlib.util
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from random import uniform

from sqlalchemy import func, select

from skyloom.core.errors import CapacityError
from skyloom.serve.queue.database import Database
from skyloom.serve.queue.jobs import Job, JobStore
from skyloom.serve.queue.leases import Leases
from skyloom.serve.queue.tables import events, idempotency_keys, results
from skyloom.serve.settings import Settings
from skyloom.serve.storage import Asset, FolderStorage
from skyloom.serve.workers.worker import STATE, Progress, Worker

STEPS = 8
HANGS = "this render hangs"


def settings_of(data: Path, database: str) -> Settings:
    """Short leases, so that a killed worker's job is soon somebody else's; nobody is given up."""
    return Settings(
        data=data,
        database_url=database,
        lease_seconds=1.0,
        heartbeat_seconds=0.3,
        max_attempts=1_000_000,
        max_queued=60,
        max_queued_per_owner=60,
        disk_reserve=0,
    )


def frames_of(prompt: str, steps: int = STEPS) -> bytes:
    """What a job must come to: a chain of hashes."""
    value = hashlib.sha256(prompt.encode()).digest()
    for index in range(steps):
        value = hashlib.sha256(value + bytes([index])).digest()
    return value * 500


def fake_render(
    job: Job,
    folder: Path,
    *,
    output: Path,
    steps: int = STEPS,
    pause: Callable[[], float] = lambda: uniform(0.0, 0.01),
) -> Iterator[Progress]:
    """A renderer that keeps its state after each step and goes on from it; `pause` is how long a
    step takes.

    The prompt HANGS never gets to a second step.
    """
    prompt, state = str(job.request["prompt"]), folder / STATE
    kept = sorted(state.glob("step-*.bin"))
    begun = int(kept[-1].stem.split("-")[1]) if kept else 0
    value = kept[-1].read_bytes() if kept else hashlib.sha256(prompt.encode()).digest()
    for index in range(begun, steps):
        value = hashlib.sha256(value + bytes([index])).digest()
        time.sleep(pause())
        partial = state / f"step-{index + 1:02}.part"
        partial.write_bytes(value)
        partial.replace(state / f"step-{index + 1:02}.bin")
        yield Progress(100 * (index + 1) // steps, "denoise")
        if prompt == HANGS:
            threading.Event().wait()
    made = output / "video.mp4"
    made.write_bytes(value * 500)
    yield Progress(99, "decode", {"video": made}, {"prompt": prompt})


def submitter(settings: Settings, owner: str, written: Path) -> None:
    """Submit for ever, and write down the id of each job once it is sure. A key is used until its
    job is."""
    store = JobStore(Database(settings.database), settings)
    number = len(written.read_bytes().splitlines())
    file = os.open(written, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    while True:
        prompt = f"{owner} {number}"
        try:
            job = store.submit({"prompt": prompt}, owner=owner, key=prompt, fingerprint=prompt)
        except CapacityError:
            time.sleep(0.05)
            continue
        os.write(file, f"{job.id} {prompt}\n".encode())
        number += 1
        time.sleep(uniform(0.0, 0.02))


def hand_of(settings: Settings, database: Database) -> Worker:
    """A worker with the fake renderer."""
    storage, name = FolderStorage(Path(settings.storage)), f"w{os.getpid()}"
    return Worker(
        Leases(database, settings), storage, fake_render, settings, name=name, device="none"
    )


def worker(settings: Settings) -> None:
    """Work for ever."""
    settings.runs.mkdir(parents=True, exist_ok=True)
    hand = hand_of(settings, Database(settings.database))
    signal.signal(signal.SIGTERM, lambda *_: hand.drain())
    hand.run()


def spawn(call: Callable[..., None], *arguments: object) -> int:
    """A fork that does the call."""
    child = os.fork()
    if child == 0:
        try:
            random.seed(os.getpid())
            call(*arguments)
        finally:
            os._exit(1)
    return child


def kill_under_load(
    settings: Settings, kills: int, workers: int, seed: int
) -> tuple[dict[str, Path], int]:
    """Kill `kills` processes at random; returns where each owner's ids are written, and how many
    were workers."""
    dice = random.Random(seed)
    lists = {owner: settings.data / f"{owner}.ids" for owner in ("ada", "bob")}
    makers: dict[int, tuple[Callable[..., None], tuple[object, ...]]] = {}
    for owner, written in lists.items():
        written.touch()
        makers[spawn(submitter, settings, owner, written)] = (submitter, (settings, owner, written))
    for _ in range(workers):
        makers[spawn(worker, settings)] = (worker, (settings,))
    while not all(written.stat().st_size for written in lists.values()):
        time.sleep(0.05)  # there is load from here on
    killed = 0
    for _ in range(kills):
        time.sleep(dice.uniform(0.0, 0.15))
        victim = dice.choice(list(makers))
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
        call, arguments = makers.pop(victim)
        killed += call is worker
        makers[spawn(call, *arguments)] = (call, arguments)
    for child, (call, _) in list(makers.items()):
        if call is submitter:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            del makers[child]
    _wait_for_rest(settings, list(makers))
    for child in makers:
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
    return lists, killed


def _wait_for_rest(settings: Settings, workers: list[int], most_seconds: float = 180.0) -> None:
    """Until nothing waits and nothing runs. A look is a fork too, so that this process opens no
    database."""
    until = time.monotonic() + most_seconds
    while time.monotonic() < until:
        look = os.fork()
        if look == 0:
            counts = JobStore(Database(settings.database), settings).counts().by_status
            os._exit(1 if {"queued", "in_progress"} & set(counts) else 0)
        if os.waitstatus_to_exitcode(os.waitpid(look, 0)[1]) == 0:
            return
        time.sleep(0.3)
    raise SystemExit(f"not at rest after {most_seconds:.0f} s, workers {workers}")


def judge(settings: Settings, lists: dict[str, Path]) -> dict[str, int]:
    """What came of it all."""
    database = Database(settings.database)
    store, storage = JobStore(database, settings), FolderStorage(Path(settings.storage))
    promised = dict(
        line.split(" ", 1) for path in lists.values() for line in path.read_text().splitlines()
    )
    found: dict[str, Job] = {job.id: job for job in store.walk()}
    with database.read() as connection:
        ends = (
            select(events.c.job, func.count())
            .where(events.c.type == "video.completed")
            .group_by(events.c.job)
        )
        doubled = sum(count != 1 for _, count in connection.execute(ends))
        doubled += connection.execute(
            select(func.count()).select_from(results)
        ).scalar_one() != len(found)
        doubled += connection.execute(
            select(func.count()).select_from(idempotency_keys)
        ).scalar_one() != len(found)
        kept = store.referenced_assets()
    wrong = 0
    for job in found.values():
        asset = None if job.result is None else Asset.parse(job.result.assets["video"])
        whole = asset is not None and b"".join(storage.read(asset)) == frames_of(
            str(job.request["prompt"])
        )
        wrong += job.status != "completed" or not whole
    for stored, _ in list(storage.assets()):
        if stored.reference not in kept:
            storage.remove(stored.key)
    hand_of(settings, database).clean_up()  # what a worker does when it starts
    stored = len(list(Path(settings.storage).glob("??/*")))
    return {
        "jobs": len(found),
        "lost": len(set(promised) - set(found))
        + sum(found[id].request["prompt"] != promised[id] for id in promised),
        "doubled": doubled,
        "wrong": wrong,
        "orphans": stored - len(found) + len(list(settings.runs.iterdir())),
        "damage": len(database.check()),
    }


def own_postgres() -> AbstractContextManager[str]:
    """A Postgres of this run's own that waits for the disk at every commit."""
    place = importlib.util.spec_from_file_location(
        "serve_postgres", Path(__file__).with_name("postgres.py")
    )
    assert place
    assert place.loader
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    if reason := module.why_not():
        raise SystemExit(reason)
    return module.running(durable=True)


def main() -> None:
    """Kill, wait, judge; one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=1_000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--database", default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--postgres", action="store_true", help="start one for this run")
    options = parser.parse_args()
    with ExitStack() as stack:
        data = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="skyloom-swarm-")))
        with suppress(ImportError):
            importlib.import_module("psycopg")  # once for all forks
        url = options.database or (
            stack.enter_context(own_postgres()) if options.postgres else None
        )
        settings = settings_of(data, url or f"sqlite:///{data / 'jobs.db'}")
        begun = time.monotonic()
        lists, killed = kill_under_load(settings, options.kills, options.workers, options.seed)
        summary = judge(settings, lists)
    broken = sum(summary[name] for name in ("lost", "doubled", "wrong", "orphans", "damage"))
    kind = settings.database.split(":", maxsplit=1)[0]
    summary = {"database": kind, "kills": options.kills, "workers_killed": killed, **summary}
    sys.stdout.write(json.dumps({**summary, "seconds": round(time.monotonic() - begun, 1)}) + "\n")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
