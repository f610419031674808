"""The queue in a world where everything goes wrong: many seeded runs, and a machine that hypothesis drives."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from skyloom.core.errors import CapacityError
from skyloom.serve.queue.database import Database
from skyloom.serve.queue.job import ACTIVE
from skyloom.serve.queue.jobs import (
    JobConflictError,
    JobFailure,
    JobResult,
    JobStore,
    NotFoundError,
)
from skyloom.serve.queue.leases import Leases, LostLeaseError
from skyloom.serve.settings import Settings

from .conftest import Clock, load_beside

HERE = Path(__file__).parent


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_promises_hold_in_every_order_of_events(first: int):
    simulate = load_beside("simulate")
    clock = simulate.SkewedClock()
    database = simulate.open_small("sqlite://", clock)
    worlds = [simulate.run(seed, database, clock, events=40) for seed in range(first, first + 50)]
    assert sum(len(world.known) for world in worlds) > 150
    assert any(known.finished for world in worlds for known in world.known.values())
    database.close()


def test_promises_hold_on_postgres(postgres_url: str):
    simulate = load_beside("simulate")
    clock = simulate.SkewedClock()
    database = Database(postgres_url, clock)
    for seed in range(4):
        simulate.run(seed, database, clock, events=40)
    database.close()


def test_the_same_seed_is_the_same_run():
    simulate = load_beside("simulate")

    def told() -> list[tuple[str, int]]:
        clock = simulate.SkewedClock()
        world = simulate.run(7, simulate.open_small("sqlite://", clock), clock)
        return [(event.type, event.number) for event in world.store.events(limit=1_000)]

    assert told() == told()


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_killed_processes_lose_and_double_nothing(kind: str):
    if kind == "postgres" and (reason := load_beside("postgres").why_not()):
        pytest.skip(reason)
    command = [sys.executable, str(HERE / "swarm.py"), "--kills", "30", "--workers", "3"]
    done = subprocess.run(
        [*command, *(["--postgres"] if kind == "postgres" else [])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2_000:] + done.stdout
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["jobs"] > 0
    assert told["kills"] == 30


@pytest.mark.skipif(sys.platform != "linux", reason="needs ptrace")
def test_a_create_that_is_killed_between_any_two_system_calls_is_there_or_not():
    command = [sys.executable, str(HERE / "torn.py"), "--every", "7"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2_000:] + done.stdout
    assert json.loads(done.stdout)["kills"] > 10


class Queue(RuleBasedStateMachine):
    """Any calls in any order; the model is one line a job: its state, and the token that may write."""

    made = Bundle("made")
    held = Bundle("held")

    @initialize()
    def begin(self) -> None:
        """An empty queue."""
        self.clock = Clock()
        self.database = Database("sqlite://", self.clock)
        bounds = Settings(data=HERE, max_queued=6, max_queued_per_owner=6, max_attempts=3)
        self.store, self.leases = JobStore(self.database, bounds), Leases(self.database, bounds)
        self.state: dict[str, str] = {}
        self.token: dict[str, int] = {}

    def teardown(self) -> None:
        """No damage."""
        if hasattr(self, "database"):
            assert self.database.check() == []
            self.database.close()

    @rule(target=made, priority=st.integers(-2, 2))
    def submit(self, priority: int):
        """A job comes, or the queue is full."""
        full = (
            sum(state in ("queued", "in_progress", "paused") for state in self.state.values()) >= 6
        )
        try:
            job = self.store.submit({"prompt": "x"}, owner="ada", priority=priority)
        except CapacityError:
            assert full
            return multiple()
        assert not full
        self.state[job.id], self.token[job.id] = "queued", 0
        return job.id

    @rule(id=made, verb=st.sampled_from(["cancel", "pause", "resume", "retry", "delete"]))
    def ask(self, id: str, verb: str) -> None:
        """A client wants something."""
        try:
            got = getattr(self.store, verb)(id, "ada")
        except NotFoundError:
            assert self.state[id] == "deleted"
        except CapacityError:
            assert verb == "retry"
        except JobConflictError:
            done = ("completed", "failed", "cancelled")
            refused = {
                "pause": done,
                "resume": (*done, "in_progress"),
                "retry": (*ACTIVE, "completed"),
            }
            assert self.state[id] in refused[verb]
        else:
            self.state[id] = "deleted" if got is None else got.status

    @rule(target=held)
    def lease(self):
        """A worker takes the next job: one that waited, and with a newer token than any before."""
        lease = self.leases.lease("w")
        if lease is None:
            return multiple()
        assert self.state[lease.job.id] == "queued"
        assert lease.token == self.token[lease.job.id] + 1
        self.state[lease.job.id], self.token[lease.job.id] = "in_progress", lease.token
        return lease

    @rule(lease=consumes(held), end=st.sampled_from(["finish", "fail", "retry", "release"]))
    def end(self, lease, end: str) -> None:
        """A worker lets go; if the lease is not the newest, or the job is elsewhere, nobody listens."""
        id = lease.job.id
        calls = {
            "finish": lambda: self.leases.finish(lease, JobResult({"video": "asset:v"}, {})),
            "fail": lambda: self.leases.fail(lease, JobFailure("x", "x")),
            "retry": lambda: self.leases.fail(lease, JobFailure("x", "x"), retry_in=1.0),
            "release": lambda: self.leases.release(lease),
        }
        try:
            got = calls[end]()
        except LostLeaseError:
            assert self.state[id] != "in_progress" or self.token[id] != lease.token
            return
        assert self.token[id] == lease.token
        if self.state[id] != "deleted":
            assert got is not None
            assert self.state[id] == "in_progress"
            self.state[id] = got.status

    @rule(seconds=st.sampled_from([1.0, 29.0, 31.0]))
    def wait(self, seconds: float) -> None:
        """Time passes, and leases with it."""
        self.clock.turn(seconds)
        self.leases.expire()
        for job in list(self.store.walk()):
            if self.state[job.id] == "in_progress":
                self.state[job.id] = job.status

    @invariant()
    def the_model_is_right(self) -> None:
        """Every job that was not deleted is there, in the state that the model has."""
        if hasattr(self, "store"):
            there = {job.id: job for job in list(self.store.walk())}
            assert {id: job.status for id, job in there.items()} == {
                id: state for id, state in self.state.items() if state != "deleted"
            }
            assert all(
                (job.result is not None) == (job.status == "completed") for job in there.values()
            )


TestQueue = Queue.TestCase
TestQueue.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
