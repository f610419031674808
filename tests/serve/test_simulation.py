"""The queue under faults: many seeded simulations, killed processes, and a hypothesis machine."""

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
from sqlalchemy import select

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
from skyloom.serve.queue.tables import jobs
from skyloom.serve.settings import Settings

from .conftest import Clock, load_beside

HERE = Path(__file__).parent


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_guarantees_hold_in_every_order_of_events(first: int):
    simulate = load_beside("simulate")
    clock = simulate.SkewedClock()
    database = simulate.open_small("sqlite://", clock)
    worlds = [simulate.run(seed, database, clock, events=40) for seed in range(first, first + 50)]
    assert sum(len(world.model) for world in worlds) > 150
    assert any(job.finished for world in worlds for job in world.model.values())
    database.close()


def test_guarantees_hold_on_postgres(postgres_url: str):
    simulate = load_beside("simulate")
    clock = simulate.SkewedClock()
    database = Database(postgres_url, clock)
    for seed in range(4):
        simulate.run(seed, database, clock, events=40)
    database.close()


def test_the_same_seed_is_the_same_run():
    simulate = load_beside("simulate")

    def run() -> list[tuple[str, int]]:
        clock = simulate.SkewedClock()
        world = simulate.run(7, simulate.open_small("sqlite://", clock), clock)
        return [(event.type, event.number) for event in world.store.events(limit=1_000)]

    assert run() == run()


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_killed_processes_lose_and_duplicate_no_job(kind: str):
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
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["jobs"] > 0
    assert summary["kills"] == 30


@pytest.mark.skipif(sys.platform != "linux", reason="needs ptrace")
def test_a_submit_killed_between_two_system_calls_is_atomic():
    command = [sys.executable, str(HERE / "torn.py"), "--every", "7"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2_000:] + done.stdout
    assert json.loads(done.stdout)["kills"] > 10


MAX_QUEUED = 6


class Queue(RuleBasedStateMachine):
    """Any calls in any order. The model holds each job's status and the token that may write.

    "deleting" is a job that was deleted while it runs: hidden, and active until it is released.
    """

    jobs = Bundle("jobs")
    leased = Bundle("leased")

    @initialize()
    def begin(self) -> None:
        """Open an empty queue."""
        self.clock = Clock()
        self.database = Database("sqlite://", self.clock)
        settings = Settings(
            data=HERE, max_queued=MAX_QUEUED, max_queued_per_owner=MAX_QUEUED, max_attempts=3
        )
        self.store = JobStore(self.database, settings)
        self.leases = Leases(self.database, settings)
        self.status: dict[str, str] = {}
        self.token: dict[str, int] = {}

    def teardown(self) -> None:
        """Check the database for damage."""
        if hasattr(self, "database"):
            assert self.database.check() == []
            self.database.close()

    def is_full(self) -> bool:
        """Whether the queue holds its maximum of active jobs."""
        active = (*ACTIVE, "deleting")
        return sum(status in active for status in self.status.values()) >= MAX_QUEUED

    @rule(target=jobs, priority=st.integers(-2, 2))
    def submit(self, priority: int = 0):
        """Submit a job; rejected when the queue is full, and only then."""
        full = self.is_full()
        try:
            job = self.store.submit({"prompt": "x"}, owner="ada", priority=priority)
        except CapacityError:
            assert full
            return multiple()
        assert not full
        self.status[job.id] = "queued"
        self.token[job.id] = 0
        return job.id

    @rule(id=jobs, verb=st.sampled_from(["cancel", "pause", "resume", "retry", "delete"]))
    def change(self, id: str, verb: str) -> None:
        """Let the owner change a job."""
        before = self.status[id]
        try:
            job = getattr(self.store, verb)(id, "ada")
        except NotFoundError:
            assert before in ("deleting", "deleted")
        except CapacityError:
            assert verb == "retry"
            assert self.is_full()
        except JobConflictError:
            ended = ("completed", "failed", "cancelled")
            refused = {
                "pause": ended,
                "resume": (*ended, "in_progress"),
                "retry": (*ACTIVE, "completed"),
            }
            assert before in refused[verb]
        else:
            if job is not None:
                self.status[id] = job.status
            else:
                self.status[id] = "deleting" if before == "in_progress" else "deleted"

    @rule(target=leased)
    def lease(self):
        """Lease the next job: one that was queued, with a newer token than any before."""
        lease = self.leases.lease("w")
        if lease is None:
            return multiple()
        assert self.status[lease.job.id] == "queued"
        assert lease.token == self.token[lease.job.id] + 1
        self.status[lease.job.id] = "in_progress"
        self.token[lease.job.id] = lease.token
        return lease

    @rule(lease=consumes(leased), verb=st.sampled_from(["finish", "fail", "retry", "release"]))
    def end(self, lease, verb: str) -> None:
        """Let a worker end its lease; rejected unless it is the newest and the job runs."""
        id = lease.job.id
        calls = {
            "finish": lambda: self.leases.finish(lease, JobResult({"video": "asset:v"}, {})),
            "fail": lambda: self.leases.fail(lease, JobFailure("x", "x")),
            "retry": lambda: self.leases.fail(lease, JobFailure("x", "x"), retry_in=1.0),
            "release": lambda: self.leases.release(lease),
        }
        runs = self.status[id] in ("in_progress", "deleting") and self.token[id] == lease.token
        try:
            job = calls[verb]()
        except LostLeaseError:
            assert not runs
            return
        assert runs
        assert (job is None) == (self.status[id] == "deleting")
        self.status[id] = "deleted" if job is None else job.status

    @rule(seconds=st.sampled_from([1.0, 29.0, 31.0]))
    def wait(self, seconds: float) -> None:
        """Let time pass, and leases with it."""
        self.clock.turn(seconds)
        expired = self.leases.expire()
        rows = {job.id: job for job in self.store.walk()}
        for id, status in self.status.items():
            if status == "in_progress":
                self.status[id] = rows[id].status
            elif status == "deleting" and expired:
                self.status[id] = "deleting" if self.exists(id) else "deleted"

    def exists(self, id: str) -> bool:
        """Whether the database has a row of a job, hidden or not."""
        with self.database.read() as connection:
            return connection.execute(select(jobs.c.id).where(jobs.c.id == id)).first() is not None

    @invariant()
    def model_agrees(self) -> None:
        """The store shows every job that is not deleted, in the model's status."""
        if hasattr(self, "store"):
            rows = {job.id: job for job in self.store.walk()}
            assert {id: job.status for id, job in rows.items()} == {
                id: status
                for id, status in self.status.items()
                if status not in ("deleting", "deleted")
            }
            assert all(
                (job.result is not None) == (job.status == "completed") for job in rows.values()
            )


TestQueue = Queue.TestCase
TestQueue.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("end", ["finish", "fail", "retry", "release", "expire"])
def test_a_deleted_job_is_active_until_its_worker_releases_it(end: str):
    """The sequence that hypothesis found, and then every way of releasing the job."""
    queue = Queue()
    queue.begin()
    for priority in (0, 0, 1):
        queue.submit(priority)
    lease = queue.lease()
    queue.change(lease.job.id, "delete")
    for _ in range(3):
        queue.submit()
    queue.model_agrees()
    assert queue.is_full()
    with pytest.raises(CapacityError):
        queue.store.submit({"prompt": "x"}, owner="ada")
    if end == "expire":
        queue.wait(31.0)
    else:
        queue.end(lease, end)
    queue.submit()
    queue.model_agrees()
    assert queue.store.counts().by_status == {"queued": MAX_QUEUED}
    queue.teardown()
