"""The documented transitions of a job are exactly those that the code allows."""

import re
from collections.abc import Callable

import pytest

from skyloom.core.errors import QueueError
from skyloom.serve.queue import job as job_module
from skyloom.serve.queue.database import Database
from skyloom.serve.queue.errors import NotFoundError
from skyloom.serve.queue.jobs import JobFailure, JobResult, JobStore
from skyloom.serve.queue.leases import Lease, Leases
from skyloom.serve.queue.tables import jobs
from skyloom.serve.settings import Settings

ROW = re.compile(
    r"^    (?P<verb>[a-z ]*?) *\| (?P<sources>[a-z_+, ()]+?) *\| (?P<target>\S+)$", re.M
)
FAILURE = JobFailure("x", "x")
RESULT = JobResult({"video": "asset:v"}, {})
KEEP_SECONDS = 1_000.0


def documented() -> set[tuple[str, str, str]]:
    """The table in job.py: (verb, status before, status after)."""
    found = set()
    verb = ""
    for row in ROW.finditer(job_module.__doc__ or ""):
        verb = row["verb"] or verb
        found |= {(verb, source, row["target"]) for source in row["sources"].split(", ")}
    return found


class World:
    """A queue with at most one job, and the last lease of it."""

    def __init__(self, clock) -> None:
        self.clock = clock
        self.database = Database("sqlite://", clock)
        settings = Settings(keep_seconds=KEEP_SECONDS)
        self.store = JobStore(self.database, settings)
        self.leases = Leases(self.database, settings)
        self.id = ""
        self.held: Lease | None = None

    def submit(self) -> None:
        self.id = self.store.submit({}, owner="ada", deadline=self.clock.now + 500.0).id

    def lease(self) -> None:
        self.held = self.leases.lease("w") or self.held

    def wait(self, seconds: float) -> None:
        self.clock.turn(seconds)
        self.leases.expire()

    def with_lease(self, call: Callable[[Lease], object]) -> None:
        if self.held is not None:
            call(self.held)

    def status(self) -> str:
        """The status in the words of job.py's table."""
        with self.database.read() as connection:
            row = connection.execute(jobs.select()).one_or_none()
        if row is None:
            return "(deleted)" if self.id else "(new)"
        if row.status != "in_progress":
            assert row.wanted is None
            return row.status
        action = "delete" if row.deleted else row.wanted
        return row.status + (f"+{action}" if action else "")


VERBS: dict[str, Callable[[World], object]] = {
    "submit": lambda world: world.id or world.submit(),
    **{
        verb: lambda world, verb=verb: getattr(world.store, verb)(world.id)
        for verb in ("cancel", "pause", "resume", "retry", "delete")
    },
    "lease": World.lease,
    "finish": lambda world: world.with_lease(lambda held: world.leases.finish(held, RESULT)),
    "fail": lambda world: world.with_lease(lambda held: world.leases.fail(held, FAILURE)),
    "fail and retry later": lambda world: world.with_lease(
        lambda held: world.leases.fail(held, FAILURE, retry_in=0.0)
    ),
    "release": lambda world: world.with_lease(world.leases.release),
    "lease runs out": lambda world: world.wait(100.0),
    "deadline passes": lambda world: world.wait(501.0),
    "result expires": lambda world: world.wait(KEEP_SECONDS + 1.0),
}
# Verbs that reach each status from an empty queue.
PATHS = {
    "(new)": [],
    "queued": ["submit"],
    "paused": ["submit", "pause"],
    "in_progress": ["submit", "lease"],
    "in_progress+cancel": ["submit", "lease", "cancel"],
    "in_progress+pause": ["submit", "lease", "pause"],
    "in_progress+delete": ["submit", "lease", "delete"],
    "completed": ["submit", "lease", "finish"],
    "failed": ["submit", "lease", "fail"],
    "cancelled": ["submit", "cancel"],
    "expired": ["submit", "deadline passes"],
    "(deleted)": ["submit", "delete"],
}
# A wait long enough for a later clock verb also ends a lease or passes a deadline.
LONGER = {
    ("deadline passes", "lease runs out"),
    ("result expires", "lease runs out"),
    ("result expires", "deadline passes"),
}


@pytest.mark.parametrize("source", PATHS)
def test_the_code_allows_exactly_the_documented_transitions(clock, source: str):
    table = documented()
    assert {verb for verb, *_ in table} == set(VERBS)
    for verb, call in VERBS.items():
        world = World(clock)
        for step in PATHS[source]:
            VERBS[step](world)
        assert world.status() == source
        refused = False
        try:
            call(world)
        except (QueueError, NotFoundError):
            refused = True
        target = world.status()
        own = {end for name, start, end in table if (name, start) == (verb, source)}
        implied = {end for name, start, end in table if (verb, name) in LONGER and start == source}
        assert {target} == (own or implied or {source}), (verb, source)
        assert not (refused and target != source), "a refused verb changes nothing"
        world.database.close()


def test_every_status_is_documented():
    statuses = {word.split("+")[0] for _, *ends in documented() for word in ends}
    assert statuses == {*job_module.ACTIVE, "completed", "failed", "cancelled", "expired"} | {
        "(new)",
        "(deleted)",
    }


def test_every_attempt_keeps_its_own_error(store, leases, clock):
    job = store.submit({}, owner="ada")
    leases.fail(leases.lease("a"), JobFailure("disk_full", "The disk is full."), retry_in=0.0)
    leases.release(leases.lease("b"))
    leases.lease("c")
    clock.turn(31)
    leases.expire()
    lease = leases.lease("d")
    store.cancel(job.id)
    leases.fail(lease, JobFailure("stalled", "No progress."), retry_in=0.0)
    attempts = store.attempts(store.get(job.id))
    assert [one.outcome for one in attempts] == ["queued", "queued", "queued", "cancelled"]
    assert [one.error and one.error.code for one in attempts] == [
        "disk_full",
        None,
        "worker_lost",
        "stalled",
    ]
    assert attempts[0].error == JobFailure("disk_full", "The disk is full.")
