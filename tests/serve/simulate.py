"""A deterministic simulation of the queue: a virtual clock, seeded events, and injected faults.

Clients submit, retry, cancel, pause, resume and delete. Two to eight workers, whose clocks differ,
lease, work, stall beyond their leases, crash, hang until their watchdog ends them, find the disk
full and return; the database runs out of disk space. After every event the guarantees of
docs/reliability.md are checked against the simulation's model; at the end every job must end.

    python tests/serve/simulate.py --seeds 10000 [--first 0] [--processes 2] [--database URL]
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import delete, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import Pool

from skyloom.core.errors import CapacityError, SkyloomError
from skyloom.serve.queue.database import Database
from skyloom.serve.queue.jobs import (
    JobConflictError,
    JobFailure,
    JobResult,
    JobStore,
    NotFoundError,
)
from skyloom.serve.queue.leases import Lease, Leases, LostLeaseError
from skyloom.serve.queue.tables import metadata
from skyloom.serve.settings import Settings

SETTINGS = Settings(
    data=Path("/nowhere"),
    max_queued=12,
    max_queued_per_owner=6,
    max_attempts=4,
    max_job_seconds=300,
)
OWNERS = ("ada", "bob", "cleo")
STEPS = 6
MAX_SKEW = 20.0  # seconds by which a worker's clock is wrong, either way
SNAPSHOT = (
    "SELECT id, status, jobs.token, progress, lease_until IS NOT NULL, results.job IS NOT NULL"
    " FROM jobs LEFT JOIN results ON results.job = jobs.number"
)
SEEDS_AT_A_TIME = 50
FAILURES = {"worker_lost", "disk_full", "stalled", "time_limit"}


@dataclass
class SimulatedWorker:
    """A worker: the lease it believes to hold, its progress and the error of its clock."""

    name: str
    skew: float
    lease: Lease | None = None
    steps_done: int = 0
    asleep_until: float = 0.0


@dataclass
class ModelJob:
    """The simulation's model of a job: newest token, accepted requests, last seen progress."""

    owner: str
    token: int = 0
    finished: int = 0
    cancelled: bool = False
    deleted: bool = False
    progress: int = 0


class SkewedClock:
    """The true time plus the error of the current actor's clock."""

    def __init__(self) -> None:
        self.true = 1_000_000.0
        self.skew = 0.0

    def __call__(self) -> float:
        return self.true + self.skew


@dataclass
class World:
    """One run: the database under test, and the model of what must hold."""

    seed: int
    database: Database
    clock: SkewedClock
    model: dict[str, ModelJob] = field(default_factory=dict)
    keys: dict[tuple[str, str], str] = field(default_factory=dict)
    workers: list[SimulatedWorker] = field(default_factory=list)
    events: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.store = JobStore(self.database, SETTINGS)
        self.leases = Leases(self.database, SETTINGS)
        skew = self.random.choice((0.0, MAX_SKEW))
        count = self.random.randint(2, 8)
        self.workers = [
            SimulatedWorker(f"w{index}", self.random.uniform(-skew, skew)) for index in range(count)
        ]


def run(seed: int, database: Database, clock: SkewedClock, events: int = 60) -> World:
    """Run one seed. Raises AssertionError when a guarantee is broken."""
    with database.write() as write:
        for table in reversed(metadata.sorted_tables):
            if table.name != "schema_version":
                write.connection.execute(delete(table))
    world = World(seed, database, clock)
    for _ in range(events):
        clock.true += world.random.expovariate(1 / 4.0)
        clock.skew = 0.0
        one_event(world)
        world.events += 1
        check(world)
    finish_all(world)
    return world


def one_event(world: World) -> None:
    """Let a client, a worker or the server's maintenance act."""
    event = world.random.random()
    if event < 0.2:
        submit(world)
    elif event < 0.32 and world.model:
        change_job(world)
    elif event < 0.36:
        world.leases.expire()
    elif event < 0.38 and not world.database.postgres:
        fill_disk(world)
    else:
        act(world, world.random.choice(world.workers))


def submit(world: World, *, max_prompt: int = 1, disk_full: bool = False) -> None:
    """Submit a job, perhaps with a key that was used before."""
    key = f"k{world.random.randrange(12)}" if world.random.random() < 0.6 else None
    owner = world.random.choice(OWNERS)
    prompt = "x" * world.random.randint(1, max_prompt)
    fingerprint = f"f-{key}" if key else None
    try:
        job = world.store.submit({"prompt": prompt}, owner=owner, key=key, fingerprint=fingerprint)
    except CapacityError as error:
        assert 1 <= (error.retry_after or 0) <= 120
    except OperationalError as error:
        assert disk_full, error
        assert "full" in str(error.orig)
    else:
        if key is not None:
            first = world.keys.setdefault((owner, key), job.id)
            if first != job.id:
                assert world.model[first].deleted, "one key, one job"
                world.keys[owner, key] = job.id
        world.model.setdefault(job.id, ModelJob(owner))


def fill_disk(world: World) -> None:
    """Let the database's disk be full for several submits: each has all of its effect or none."""
    with limited(world.database, world.random.randint(0, 6)):
        for _ in range(world.random.randint(2, 6)):
            submit(world, max_prompt=400, disk_full=True)


def change_job(world: World) -> None:
    """Let a client change a job, perhaps one of another owner."""
    id = world.random.choice(list(world.model))
    model = world.model[id]
    verb = world.random.choice(("cancel", "pause", "resume", "resume", "retry", "delete"))
    owner = world.random.choice(OWNERS)
    try:
        job = getattr(world.store, verb)(id, owner)
    except NotFoundError:
        assert owner != model.owner or model.deleted, "an owner finds her job"
        return
    except (JobConflictError, CapacityError):
        return
    assert owner == model.owner, "jobs of other owners are hidden"
    assert not model.deleted, "a deleted job is hidden"
    if verb == "delete":
        model.deleted = True
    elif verb == "cancel":
        model.cancelled = model.cancelled or (job.status != "completed" and not model.finished)
    elif verb == "retry":
        model.cancelled = False
        model.progress = 0


def act(world: World, worker: SimulatedWorker) -> None:
    """Let a worker lease a job, work on it, stall, hang or crash."""
    world.clock.skew = worker.skew
    if worker.asleep_until > world.clock.true:
        return
    if worker.lease is None:
        worker.lease = world.leases.lease(worker.name)
        worker.steps_done = 0
        if worker.lease is not None:
            model = world.model[worker.lease.job.id]
            assert worker.lease.token > model.token, "every lease has a newer token"
            assert not model.deleted
            model.token = worker.lease.token
        return
    event = world.random.random()
    if event < 0.05:
        crash(world, worker)
    elif event < 0.08:
        hang(world, worker, worker.lease)
    elif event < 0.13:  # stall; it continues later, perhaps with a stale lease
        worker.asleep_until = world.clock.true + world.random.uniform(1, 90)
    else:
        work(world, worker, worker.lease, event)


def crash(world: World, worker: SimulatedWorker) -> None:
    """Replace a worker by a new one; sometimes the server notices the crash."""
    if world.random.random() < 0.5:
        world.leases.requeue_worker_jobs(worker.name)
    replacement = SimulatedWorker(f"{worker.name}'", worker.skew)
    world.workers[world.workers.index(worker)] = replacement


def hang(world: World, worker: SimulatedWorker, lease: Lease) -> None:
    """Let the watchdog of a stuck render fail the attempt and end the worker."""
    stalled = JobFailure("stalled", "The render made no progress.")
    try:
        world.leases.fail(lease, stalled, retry_in=0.0)
        assert lease.token == world.model[lease.job.id].token, "a stale lease was accepted"
    except LostLeaseError:
        pass
    crash(world, worker)


def work(world: World, worker: SimulatedWorker, lease: Lease, event: float) -> None:
    """Let a worker write to the queue; a stale lease must be rejected."""
    model = world.model[lease.job.id]
    try:
        if event < 0.17:
            failure = JobFailure("disk_full", "The disk is full.")
            world.leases.fail(lease, failure, retry_in=world.random.uniform(0, 30))
            worker.lease = None
        elif event < 0.2:
            world.leases.release(lease)
            worker.lease = None
        elif worker.steps_done < STEPS:
            step(world, worker, lease)
        else:
            job = world.leases.finish(lease, JobResult({"video": f"asset:{lease.job.id}"}, {}))
            worker.lease = None
            if job is not None and job.status == "completed":
                assert not model.cancelled, "an accepted cancel is final"
                assert not model.deleted
                model.finished += 1
        assert lease.token == model.token, "a stale lease was accepted"
    except LostLeaseError:
        worker.lease = None


def step(world: World, worker: SimulatedWorker, lease: Lease) -> None:
    """Render one step, sometimes with a checkpoint; release the job if its client asks for it."""
    worker.steps_done += 1
    checkpoint = None
    if world.random.random() < 0.3:
        checkpoint = {"state": f"asset:{worker.steps_done}"}
    progress = worker.steps_done * 15
    requested = world.leases.heartbeat(
        lease, progress=progress, phase="denoise", checkpoint=checkpoint
    )
    if requested is not None:
        world.leases.release(lease)
        worker.lease = None


@contextmanager
def limited(database: Database, pages: int) -> Iterator[None]:
    """Limit an SQLite database to so many more pages, free pages within the file included."""
    with database.engine.connect() as connection:
        connection.exec_driver_sql("VACUUM")
        used = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count={used + pages}")
    try:
        yield
    finally:
        with database.engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA max_page_count=1073741823")


def snapshot(database: Database) -> list[tuple[str, str, int, int, bool, bool]]:
    """Read every job through the driver, which is fast enough to do after every event."""
    with closing(database.engine.raw_connection()) as connection:
        cursor = connection.cursor()
        cursor.execute(SNAPSHOT)
        return cursor.fetchall()


def check_attempts(world: World) -> None:
    """Check that every attempt has ended, with an error if it failed, and a token of a lease."""
    for id, model in world.model.items():
        if model.deleted:
            continue
        attempts = world.store.attempts(world.store.get(id))
        assert all(
            one.ended_at is not None and one.outcome not in (None, "in_progress")
            for one in attempts
        )
        assert all(one.error is not None for one in attempts if one.outcome == "failed")
        assert all(one.token <= model.token for one in attempts)


def check(world: World) -> None:
    """Check what holds at every moment."""
    rows = {id: rest for id, *rest in snapshot(world.database)}
    active = [status for status, *_ in rows.values()]
    active = [status for status in active if status in ("queued", "in_progress", "paused")]
    assert len(active) <= SETTINGS.max_queued, "the queue is bounded"
    assert rows.keys() <= world.model.keys(), "a rejected submit leaves no job"
    for id, model in world.model.items():
        if id not in rows:
            assert model.deleted, "no job is lost"
            continue
        status, token, progress, leased, has_result = rows[id]
        assert token == model.token, "every token was returned by lease"
        assert progress >= model.progress, "progress never decreases"
        model.progress = progress
        assert (status == "completed") == bool(has_result), "only a completed job has a result"
        assert model.finished <= 1, "one result"
        assert (status == "in_progress") == bool(leased), "only a running job has a lease"


def finish_all(world: World) -> None:
    """Run without faults until every job has ended, and check the ends."""
    world.clock.skew = 0.0
    world.clock.true += 200
    for _ in range(200):
        world.clock.true += 40
        world.leases.expire()
        for job in world.store.page(status="paused", limit=100)[0]:
            world.store.resume(job.id)
        while (lease := world.leases.lease("healthy")) is not None:
            world.model[lease.job.id].token = lease.token
            world.model[lease.job.id].finished += 1
            world.leases.finish(lease, JobResult({"video": f"asset:{lease.job.id}"}, {}))
        if not {"queued", "in_progress"} & set(world.store.counts().by_status):
            break
    check(world)
    for id, model in world.model.items():
        if model.deleted:
            continue
        job = world.store.get(id)
        assert job.done, f"{job.status} for ever"
        assert job.status != "failed" or (job.error is not None and job.error.code in FAILURES)
        assert job.status != "cancelled" or model.cancelled, "no client cancelled it"
        assert job.status != "completed" or (
            job.result is not None and job.result.assets["video"] == f"asset:{id}"
        )
    check_attempts(world)
    assert world.database.check() == []


def open_small(url: str, clock: SkewedClock) -> Database:
    """Open a database; in memory with small pages, so that nearly every row needs a new one."""
    if not url.startswith("sqlite"):
        return Database(url, clock)
    event.listen(Pool, "connect", _set_page_size)
    try:
        return Database(url, clock)
    finally:
        event.remove(Pool, "connect", _set_page_size)


def _set_page_size(connection: DBAPIConnection, _record: object) -> None:
    connection.cursor().execute("PRAGMA page_size=512")


def run_seeds(first: int, seeds: int, url: str) -> tuple[int, int]:
    """Run some seeds; return the numbers of events and jobs."""
    clock = SkewedClock()
    events = 0
    jobs = 0
    with closing(open_small(url, clock)) as database:
        for seed in range(first, first + seeds):
            try:
                world = run(seed, database, clock)
            except (AssertionError, SkyloomError):
                sys.stderr.write(f"seed {seed}\n")
                raise
            events += world.events
            jobs += len(world.model)
    return events, jobs


def main() -> None:
    """Run many seeds; print one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--database", help="an empty Postgres, used by one process (default: SQLite in memory)"
    )
    options = parser.parse_args()
    started = time.monotonic()
    stop = options.first + options.seeds
    firsts = range(options.first, stop, SEEDS_AT_A_TIME)
    counts = [min(SEEDS_AT_A_TIME, stop - first) for first in firsts]
    urls = [options.database or "sqlite://"] * len(counts)
    with ProcessPoolExecutor(1 if options.database else options.processes) as processes:
        totals = list(processes.map(run_seeds, firsts, counts, urls))
    summary = {
        "seeds": options.seeds,
        "events": sum(events for events, _ in totals),
        "jobs": sum(jobs for _, jobs in totals),
        "broken": 0,
        "seconds": round(time.monotonic() - started, 1),
    }
    sys.stdout.write(json.dumps(summary) + "\n")


if __name__ == "__main__":
    main()
