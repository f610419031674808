"""A deterministic simulation of the queue: a virtual clock, a seeded order of events, and everything that goes wrong.

Clients submit, alone or several in one commit, retry, cancel, pause, resume and delete; two to eight workers, whose
clocks differ, lease, work, stall beyond their leases, crash, hang until their watchdog ends them, find the disk full
and come back; the database itself runs out of room. After every event the promises of docs/reliability.md are checked
against what the simulation knows; in the end all is brought to rest.

    python tests/serve/simulate.py --seeds 10000 [--first 0] [--processes 2] [--database URL]
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import delete, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import Pool

from skyloom.core.errors import CapacityError, QueueError
from skyloom.serve.queue.database import Database
from skyloom.serve.queue.jobs import (
    Job,
    JobConflictError,
    JobFailure,
    JobResult,
    JobStore,
    MissingJobError,
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
MOST_SKEW = 20.0  # seconds that a worker's clock is wrong, either way
SEEN = (
    "SELECT id, status, jobs.token, progress, lease_until IS NOT NULL, results.job IS NOT NULL"
    " FROM jobs LEFT JOIN results ON results.job = jobs.number"
)
SEEDS_AT_A_TIME = 50
FAILURES = {"worker_lost", "disk_full", "stalled", "time_limit"}


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
    if what < 0.16:
        submit(world)
    elif what < 0.2:
        submit_together(world)
    elif what < 0.32 and world.known:
        ask(world)
    elif what < 0.36:
        world.leases.expire()
    elif what < 0.38 and not world.database.postgres:
        run_out_of_room(world)
    else:
        act(world, world.dice.choice(world.hands))


@dataclass(frozen=True)
class Wish:
    """What a client submits; with a key it may be the same call again."""

    owner: str
    key: str | None
    prompt: str


def draw(world: World, longest: int = 1) -> Wish:
    """A new wish, or one that was there before."""
    dice = world.dice
    key = f"k{dice.randrange(12)}" if dice.random() < 0.6 else None
    return Wish(dice.choice(OWNERS), key, "x" * dice.randint(1, longest))


def send(world: World, wish: Wish) -> Job | CapacityError | OperationalError:
    """What a client is told."""
    fingerprint = f"f-{wish.key}" if wish.key else None
    try:
        return world.store.submit(
            {"prompt": wish.prompt}, owner=wish.owner, key=wish.key, fingerprint=fingerprint
        )
    except (CapacityError, OperationalError) as error:
        return error


def note(
    world: World, wish: Wish, told: Job | CapacityError | OperationalError, *, full: bool = False
) -> None:
    """Know what a client was told."""
    if isinstance(told, CapacityError):
        assert 1 <= (told.retry_after or 0) <= 120
    elif isinstance(told, OperationalError):
        assert full, told
        assert "full" in str(told.orig)
    else:
        if wish.key is not None:
            made = world.keys.setdefault((wish.owner, wish.key), told.id)
            if made != told.id:
                assert world.known[made].deleted, "one key, one job"
                world.keys[wish.owner, wish.key] = told.id
        world.known.setdefault(told.id, Known(wish.owner))


def submit(world: World) -> None:
    """One client alone."""
    wish = draw(world)
    note(world, wish, send(world, wish))


def submit_together(world: World, *, longest: int = 1, full: bool = False) -> None:
    """Several clients who wait for the same moment, and share one commit."""
    wishes = [draw(world, longest) for _ in range(world.dice.randint(2, 6))]
    with ThreadPoolExecutor(len(wishes)) as clients:
        sent = []
        with world.database.write():  # until all wait, in this order
            for wish in wishes:
                sent.append(clients.submit(send, world, wish))
                while world.database.waiting < len(sent) and not sent[-1].done():
                    time.sleep(0)
        for wish, answer in zip(wishes, sent, strict=True):
            note(world, wish, answer.result(), full=full)


def ask(world: World) -> None:
    """A client wants something of a job, perhaps of somebody else's."""
    id = world.dice.choice(list(world.known))
    known, verb = (
        world.known[id],
        world.dice.choice(("cancel", "pause", "resume", "resume", "retry", "delete")),
    )
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
    elif what < 0.08:
        hang(world, hand, hand.lease)
    elif what < 0.13:
        hand.asleep_until = world.clock.true + dice.uniform(
            1, 90
        )  # stalled: it will go on, perhaps with a stale lease
    else:
        write(world, hand, hand.lease, what)


def crash(world: World, hand: Hand) -> None:
    """A worker is gone, and sometimes somebody notices; another comes in its place."""
    if world.dice.random() < 0.5:
        world.leases.forget(hand.name)
    fresh = Hand(f"{hand.name}'", hand.skew)
    world.hands[world.hands.index(hand)] = fresh


def hang(world: World, hand: Hand, lease: Lease) -> None:
    """A render is stuck: the watchdog gives the job back with the cause, if it is still its worker's, and ends it."""
    try:
        world.leases.fail(
            lease, JobFailure("stalled", "The render made no progress."), retry_in=0.0
        )
        assert lease.token == world.known[lease.job.id].token, "a stale worker was heard"
    except LostLeaseError:
        pass
    crash(world, hand)


def write(world: World, hand: Hand, lease: Lease, what: float) -> None:
    """A worker tells the queue something; with a stale lease it must not be heard."""
    known = world.known[lease.job.id]
    try:
        if what < 0.17:
            world.leases.fail(
                lease,
                JobFailure("disk_full", "The disk is full."),
                retry_in=world.dice.uniform(0, 30),
            )
            hand.lease = None
        elif what < 0.2:
            world.leases.release(lease)
            hand.lease = None
        elif hand.done < STEPS:
            hand.done += 1
            mark = {"state": f"asset:{hand.done}"} if world.dice.random() < 0.3 else None
            wanted = world.leases.heartbeat(
                lease, progress=hand.done * 15, phase="denoise", checkpoint=mark
            )
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
    """The database's disk is full for one commit of several: each of them is whole or not there."""
    with limited(world.database, world.dice.randint(0, 6)):
        submit_together(world, longest=400, full=True)


@contextmanager
def limited(database: Database, pages: int) -> Iterator[None]:
    """Room for so many pages more, free ones within the file counted."""
    with database.engine.connect() as connection:
        connection.exec_driver_sql("VACUUM")
        used = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count={used + pages}")
    try:
        yield
    finally:
        with database.engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA max_page_count=1073741823")


def look(database: Database) -> list[tuple[str, str, int, int, bool, bool]]:
    """Every job, asked of the driver itself: it is looked at after every event."""
    with closing(database.engine.raw_connection()) as connection:
        cursor = connection.cursor()
        cursor.execute(SEEN)
        return cursor.fetchall()


def check_attempts(world: World) -> None:
    """Every attempt has ended, with a cause if it went wrong; none has a token that was not handed out."""
    for id, known in world.known.items():
        if known.deleted:
            continue
        tried = world.store.attempts(world.store.get(id))
        assert all(
            one.ended_at is not None and one.outcome not in (None, "in_progress") for one in tried
        )
        assert all(one.error is not None for one in tried if one.outcome == "failed")
        assert all(one.token <= known.token for one in tried)


def check(world: World) -> None:
    """What holds at every moment."""
    there = {id: rest for id, *rest in look(world.database)}
    waiting = [
        status for status, *_ in there.values() if status in ("queued", "in_progress", "paused")
    ]
    assert len(waiting) <= SETTINGS.max_queued, "the queue is bounded"
    assert there.keys() <= world.known.keys(), "whoever was refused has no job"
    for id, known in world.known.items():
        if id not in there:
            assert known.deleted, "nothing is lost"
            continue
        status, token, progress, leased, made = there[id]
        assert token == known.token, "tokens are handed out, not made up"
        assert progress >= known.progress, "progress never goes back"
        known.progress = progress
        assert (status == "completed") == bool(made), "a result is there once, when it is done"
        assert known.finished <= 1, "one result"
        assert (status == "in_progress") == bool(leased), "who works has a lease"


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
        assert job.status != "completed" or (
            job.result is not None and job.result.assets["video"] == f"asset:{id}"
        )
    check_attempts(world)
    assert world.database.check() == []


def open_small(url: str, clock: SkewedClock) -> Database:
    """A database; one in memory has pages so small that nearly every row takes a new one, and may find no room."""
    if not url.startswith("sqlite"):
        return Database(url, clock)
    event.listen(Pool, "connect", _make_small)
    try:
        return Database(url, clock)
    finally:
        event.remove(Pool, "connect", _make_small)


def _make_small(connection: DBAPIConnection, _record: object) -> None:
    connection.cursor().execute("PRAGMA page_size=512")


def play(first: int, seeds: int, url: str) -> tuple[int, int]:
    """Play some seeds; how many events and jobs that were."""
    clock, events, made = SkewedClock(), 0, 0
    with closing(open_small(url, clock)) as database:
        for seed in range(first, first + seeds):
            try:
                world = run(seed, database, clock)
            except (AssertionError, QueueError):
                sys.stderr.write(f"seed {seed}\n")
                raise
            events, made = events + world.events, made + len(world.known)
    return events, made


def main() -> None:
    """Play many seeds; one line of JSON in the end."""
    options = argparse.ArgumentParser()
    options.add_argument("--seeds", type=int, default=10_000)
    options.add_argument("--first", type=int, default=0)
    options.add_argument("--processes", type=int, default=2)
    options.add_argument(
        "--database", help="an empty Postgres, by one process (default: SQLite in memory)"
    )
    asked, begun = options.parse_args(), time.monotonic()
    stop = asked.first + asked.seeds
    firsts = range(asked.first, stop, SEEDS_AT_A_TIME)
    counts = [min(SEEDS_AT_A_TIME, stop - first) for first in firsts]
    with ProcessPoolExecutor(1 if asked.database else asked.processes) as players:
        played = list(
            players.map(play, firsts, counts, [asked.database or "sqlite://"] * len(counts))
        )
    told = {
        "seeds": asked.seeds,
        "events": sum(one[0] for one in played),
        "jobs": sum(one[1] for one in played),
    }
    sys.stdout.write(
        json.dumps({**told, "broken": 0, "seconds": round(time.monotonic() - begun, 1)}) + "\n"
    )


if __name__ == "__main__":
    main()
