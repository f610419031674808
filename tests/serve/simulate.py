"""A deterministic simulation of the queue: a virtual clock, a seeded order of events, and everything that goes wrong.

Clients submit, retry, cancel, pause, resume and delete; two to eight workers, whose clocks differ, lease, work, stall
beyond their leases, crash, find the disk full and come back; the database itself runs out of room. After every event
the promises of docs/reliability.md are checked against what the simulation knows; in the end all is brought to rest.

    python tests/serve/simulate.py --seeds 10000 [--first 0] [--database URL]
"""

import argparse
import json
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import delete, select
from sqlalchemy.exc import OperationalError

from skyloom.core.errors import CapacityError, JobError
from skyloom.serve.database import Database
from skyloom.serve.jobs import JobConflictError, JobFailure, JobResult, JobStore, MissingJobError
from skyloom.serve.leases import Lease, Leases, LostLeaseError
from skyloom.serve.settings import Settings
from skyloom.serve.tables import jobs, metadata, results

SETTINGS = Settings(data=Path("/nowhere"), max_queued=12, max_queued_per_owner=6, max_attempts=4)
OWNERS = ("ada", "bob", "cleo")
STEPS = 6
MOST_SKEW = 20.0  # seconds that a worker's clock is wrong, either way
SEEN = select(jobs.c.number, jobs.c.id, jobs.c.status, jobs.c.token, jobs.c.progress, jobs.c.lease_until)
MADE = select(results.c.job)
FAILURES = {"worker_lost", "disk_full"}


@dataclass
class Hand:
    """A worker: what it believes to hold, how far it is, and how wrong its clock is."""

    name: str
    skew: float
    lease: Lease | None = None
    done: int = 0
    asleep_until: float = 0.0


@dataclass
class Known:
    """What the simulation knows of a job: the newest token, what its client was promised, how far it was seen."""

    owner: str
    token: int = 0
    finished: int = 0
    cancelled: bool = False
    deleted: bool = False
    progress: int = 0


@dataclass
class World:
    """One run. `where` skews the clock of whoever acts."""

    seed: int
    database: Database
    clock: "SkewedClock"
    known: dict[str, Known] = field(default_factory=dict)
    keys: dict[tuple[str, str], str] = field(default_factory=dict)
    hands: list[Hand] = field(default_factory=list)
    events: int = 0

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)
        self.store, self.leases = JobStore(self.database, SETTINGS), Leases(self.database, SETTINGS)
        skew = self.dice.choice((0.0, MOST_SKEW))
        count = self.dice.randint(2, 8)
        self.hands = [Hand(f"w{index}", self.dice.uniform(-skew, skew)) for index in range(count)]


class SkewedClock:
    """The true time, and how wrong the clock of the one who acts is."""

    def __init__(self) -> None:
        self.true, self.skew = 1_000_000.0, 0.0

    def __call__(self) -> float:
        return self.true + self.skew


def run(seed: int, database: Database, clock: SkewedClock, events: int = 60) -> World:
    """Play one seed. Raises AssertionError when a promise is broken."""
    with database.write() as write:
        for table in reversed(metadata.sorted_tables):
            if table.name != "schema_version":
                write.connection.execute(delete(table))
    world = World(seed, database, clock)
    for _ in range(events):
        clock.true += world.dice.expovariate(1 / 4.0)
        clock.skew = 0.0
        one_event(world)
        world.events += 1
        check(world)
    bring_to_rest(world)
    return world


def one_event(world: World) -> None:
    """Somebody does something: a client, a worker, or the server's upkeep."""
    what = world.dice.random()
    if what < 0.2:
        submit(world)
    elif what < 0.32 and world.known:
        ask(world)
    elif what < 0.36:
        world.leases.expire()
    elif what < 0.38 and not world.database.postgres:
        run_out_of_room(world)
    else:
        act(world, world.dice.choice(world.hands))


def submit(world: World) -> None:
    """A new wish, or the same call again."""
    dice = world.dice
    owner = dice.choice(OWNERS)
    key = f"k{dice.randrange(12)}" if dice.random() < 0.6 else None
    fingerprint = f"f-{key}" if key else None
    try:
        job = world.store.submit({"prompt": "x"}, owner=owner, key=key, fingerprint=fingerprint)
    except CapacityError as full:
        assert 1 <= (full.retry_after or 0) <= 120
        return
    if key is not None:
        made = world.keys.setdefault((owner, key), job.id)
        if made != job.id:
            assert world.known[made].deleted, "one key, one job"
            world.keys[owner, key] = job.id
    world.known.setdefault(job.id, Known(owner))


def ask(world: World) -> None:
    """A client wants something of a job, perhaps of somebody else's."""
    id = world.dice.choice(list(world.known))
    known, verb = world.known[id], world.dice.choice(("cancel", "pause", "resume", "resume", "retry", "delete"))
    owner = world.dice.choice(OWNERS)
    try:
        got = getattr(world.store, verb)(id, owner)
    except MissingJobError:
        assert owner != known.owner or known.deleted, "an owner finds her job"
        return
    except (JobConflictError, CapacityError):
        return
    assert owner == known.owner, "nobody else's job"
    assert not known.deleted, "what was deleted is gone"
    if verb == "delete":
        known.deleted = True
    elif verb == "cancel":
        known.cancelled = known.cancelled or (got.status != "completed" and not known.finished)
    elif verb == "retry":
        known.cancelled, known.progress = False, 0


def act(world: World, hand: Hand) -> None:
    """A worker's next move."""
    dice = world.dice
    world.clock.skew = hand.skew
    if hand.asleep_until > world.clock.true:
        return
    if hand.lease is None:
        hand.lease, hand.done = world.leases.lease(hand.name), 0
        if hand.lease is not None:
            known = world.known[hand.lease.job.id]
            assert hand.lease.token > known.token, "every lease has a newer token"
            assert not known.deleted
            known.token = hand.lease.token
        return
    what = dice.random()
    if what < 0.05:
        crash(world, hand)
    elif what < 0.12:
        hand.asleep_until = world.clock.true + dice.uniform(1, 90)  # stalled: it will go on, perhaps with a stale lease
    else:
        write(world, hand, hand.lease, what)


def crash(world: World, hand: Hand) -> None:
    """A worker is gone, and sometimes somebody notices; another comes in its place."""
    if world.dice.random() < 0.5:
        world.leases.forget(hand.name)
    fresh = Hand(f"{hand.name}'", hand.skew)
    world.hands[world.hands.index(hand)] = fresh


def write(world: World, hand: Hand, lease: Lease, what: float) -> None:
    """A worker tells the queue something; with a stale lease it must not be heard."""
    known = world.known[lease.job.id]
    try:
        if what < 0.17:
            world.leases.fail(lease, JobFailure("disk_full", "The disk is full."), retry_in=world.dice.uniform(0, 30))
            hand.lease = None
        elif what < 0.2:
            world.leases.release(lease)
            hand.lease = None
        elif hand.done < STEPS:
            hand.done += 1
            mark = {"state": f"asset:{hand.done}"} if world.dice.random() < 0.3 else None
            wanted = world.leases.heartbeat(lease, progress=hand.done * 15, phase="denoise", checkpoint=mark)
            if wanted is not None:
                world.leases.release(lease)
                hand.lease = None
        else:
            made = world.leases.finish(lease, JobResult({"video": f"asset:{lease.job.id}"}, {}))
            hand.lease = None
            if made is not None and made.status == "completed":
                assert not known.cancelled, "a cancel that was accepted is final"
                assert not known.deleted
                known.finished += 1
        assert lease.token == known.token, "a stale worker was heard"
    except LostLeaseError:
        hand.lease = None


def run_out_of_room(world: World) -> None:
    """The database's disk is full for one call: it fails whole, and nothing has changed."""
    before = world.store.counts().by_status
    with world.database.engine.connect().execution_options(skyloom_plain=True) as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
    try:
        job = world.store.submit({"prompt": "x" * 300_000}, owner="ada")
        world.known[job.id] = Known("ada")  # there was room on free pages
    except CapacityError:
        pass
    except OperationalError as error:
        assert "full" in str(error.orig)
        assert world.store.counts().by_status == before, "half a write"
    finally:
        with world.database.engine.connect().execution_options(skyloom_plain=True) as connection:
            connection.exec_driver_sql("PRAGMA max_page_count=1073741823")


def check(world: World) -> None:
    """What holds at every moment."""
    with world.database.read() as connection:
        rows = connection.execute(SEEN).all()
        made = {row.job for row in connection.execute(MADE)}
    there = {row.id: row for row in rows}
    waiting = [row for row in rows if row.status in ("queued", "in_progress", "paused")]
    assert len(waiting) <= SETTINGS.max_queued, "the queue is bounded"
    for id, known in world.known.items():
        row = there.get(id)
        if row is None:
            assert known.deleted, "nothing is lost"
            continue
        assert row.token == known.token, "tokens are handed out, not made up"
        assert row.progress >= known.progress, "progress never goes back"
        known.progress = row.progress
        assert (row.status == "completed") == (row.number in made), "a result is there once, when it is done"
        assert known.finished <= 1, "one result"
        assert (row.status == "in_progress") == (row.lease_until is not None), "who works has a lease"


def bring_to_rest(world: World) -> None:
    """Nothing goes wrong any more: everything that may end must end, and be right."""
    world.clock.skew = 0.0
    world.clock.true += 200
    for _ in range(200):
        world.clock.true += 40
        world.leases.expire()
        for job in world.store.page(status="paused", limit=100)[0]:
            world.store.resume(job.id)
        while (lease := world.leases.lease("healthy")) is not None:
            world.known[lease.job.id].token = lease.token
            world.known[lease.job.id].finished += 1
            world.leases.finish(lease, JobResult({"video": f"asset:{lease.job.id}"}, {}))
        if not {"queued", "in_progress"} & set(world.store.counts().by_status):
            break
    check(world)
    for id, known in world.known.items():
        if known.deleted:
            continue
        job = world.store.get(id)
        assert job.done, f"{job.status} for ever"
        assert job.status != "failed" or (job.error is not None and job.error.code in FAILURES)
        assert job.status != "cancelled" or known.cancelled, "nobody cancelled it"
        assert job.status != "completed" or (job.result is not None and job.result.assets["video"] == f"asset:{id}")
    assert world.database.check() == []


def main() -> None:
    """Play many seeds; one line of JSON in the end."""
    options = argparse.ArgumentParser()
    options.add_argument("--seeds", type=int, default=10_000)
    options.add_argument("--first", type=int, default=0)
    options.add_argument("--database", default="sqlite://")
    asked = options.parse_args()
    clock, begun, events, made = SkewedClock(), time.monotonic(), 0, 0
    database = Database(asked.database, clock)
    for seed in range(asked.first, asked.first + asked.seeds):
        try:
            world = run(seed, database, clock)
        except (AssertionError, JobError):
            sys.stderr.write(f"seed {seed}\n")
            raise
        events, made = events + world.events, made + len(world.known)
    told = {"seeds": asked.seeds, "events": events, "jobs": made, "broken": 0}
    sys.stdout.write(json.dumps({**told, "seconds": round(time.monotonic() - begun, 1)}) + "\n")


if __name__ == "__main__":
    main()
