"""Supervised worker processes and maintenance tasks: what fails is restarted."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from skyloom.core.errors import CapacityError
from skyloom.serve.maintenance import MaintenanceThreads
from skyloom.serve.queue.capabilities import Capabilities
from skyloom.serve.queue.database import Database
from skyloom.serve.queue.jobs import JobStore
from skyloom.serve.queue.leases import Leases
from skyloom.serve.settings import Settings
from skyloom.serve.workers.processes import (
    WorkerSupervisor,
    worker_command,
    worker_environment,
)

SLEEPER = [sys.executable, "-c", "import sys; sys.stdin.buffer.read()"]


@pytest.fixture
def queue(tmp_path) -> Leases:
    """An empty queue."""
    settings = Settings(data=tmp_path)
    return Leases(Database(settings.database), settings)


def wait_for(condition, seconds: float = 120.0) -> None:
    """Wait until a condition holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "timeout"
        time.sleep(0.02)


def test_a_job_of_a_killed_worker_waits_for_one_that_has_its_model(queue, monkeypatch):
    monkeypatch.setattr("skyloom.serve.workers.processes.worker_command", lambda device: SLEEPER)
    supervisor = WorkerSupervisor(queue, queue.settings, ["cpu"]).start()
    worker = supervisor._processes[0]
    wait_for(lambda: worker.alive)
    (name,) = supervisor.health().names
    queue.register_worker(name, "cpu", Capabilities({"wan": 0}))
    store = JobStore(queue.database, queue.settings)
    job = store.submit({"prompt": "x", "model": "wan"}, owner="ada")
    queue.heartbeat(queue.lease(name), checkpoint={"state": "asset:1"})
    os.kill(worker.pid, signal.SIGKILL)
    wait_for(lambda: store.get(job.id).status == "queued")
    queue.register_worker("a", "cpu", Capabilities({"diorama": 0}))
    assert queue.lease("a") is None
    queue.register_worker("b", "cpu", Capabilities({"wan": 0}))
    resumed = queue.lease("b").job
    assert (resumed.id, resumed.checkpoint) == (job.id, {"state": "asset:1"})
    supervisor.stop()


def test_a_killed_worker_is_restarted_and_its_job_requeued(queue, monkeypatch):
    monkeypatch.setattr("skyloom.serve.workers.processes.worker_command", lambda device: SLEEPER)
    supervisor = WorkerSupervisor(queue, queue.settings, ["cpu"]).start()
    worker = supervisor._processes[0]
    wait_for(lambda: worker.alive)
    name, first = worker._process.args[-1], worker._process.pid
    job = JobStore(queue.database, queue.settings).submit({"prompt": "x"}, owner="ada")
    queue.lease(name)
    os.kill(first, signal.SIGKILL)
    wait_for(
        lambda: (
            queue.database is not None
            and queue.unfinished([job.id])
            and queue.lease("other") is not None
        )
    )
    wait_for(lambda: worker.alive and worker._process.pid != first)
    assert supervisor.health().restarts == 1
    supervisor.stop()
    assert supervisor.health().alive == 0
    queue.database.close()


IGNORES_SIGTERM = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGTERM, signal.SIG_IGN)
Path(sys.argv[1]).touch()
while True:
    signal.pause()
"""


def test_a_worker_that_ignores_sigterm_is_killed(queue, monkeypatch, tmp_path):
    ready = tmp_path / "ready"
    command = [sys.executable, "-c", IGNORES_SIGTERM, str(ready)]
    monkeypatch.setattr("skyloom.serve.workers.processes.worker_command", lambda device: command)
    monkeypatch.setattr("skyloom.serve.workers.processes.STOP_SECONDS", 0.5)
    supervisor = WorkerSupervisor(queue, queue.settings, ["cpu"]).start()
    wait_for(ready.exists, 120)
    supervisor.stop()
    assert supervisor.health().alive == 0
    assert supervisor._processes[0]._process.returncode == -signal.SIGKILL
    queue.database.close()


def test_urls_and_passwords_are_not_on_the_command_line():
    settings = Settings(
        database_url="postgresql://ada:secret@host/jobs", storage_url="s3://bucket/x"
    )
    assert "secret" not in " ".join(worker_command("cpu"))
    environment = worker_environment(settings)
    assert environment["SKYLOOM_DATABASE_URL"].endswith("secret@host/jobs")
    assert environment["SKYLOOM_STORAGE_URL"] == "s3://bucket/x"


def test_a_worker_exits_when_its_standard_input_closes(tmp_path):
    settings = Settings(data=tmp_path)
    process = subprocess.Popen(
        [*worker_command("cpu"), "--name", "w"],
        env=worker_environment(settings), stdin=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    store = JobStore(Database(settings.database), settings)
    wait_for(lambda: store.counts().workers == 1)
    process.stdin.close()
    assert process.wait(timeout=120) == 0
    store.database.close()


def test_maintenance_tasks_run_at_their_intervals_despite_errors():
    done = {"quick": 0, "once": 0, "bad": 0}

    def count(name: str) -> None:
        done[name] += 1
        if name == "bad":
            raise CapacityError("The disk is full.")

    upkeep = MaintenanceThreads(
        [(0.01, lambda: count("quick")), (60, lambda: count("once")), (0.01, lambda: count("bad"))]
    )
    upkeep.start()
    wait_for(lambda: done["quick"] > 3 and done["bad"] > 3)
    upkeep.stop()
    assert done["once"] == 1
    seen = done["quick"]
    time.sleep(0.05)
    assert done["quick"] == seen


def test_a_stuck_maintenance_task_delays_no_other_and_no_stop():
    over, done = threading.Event(), []
    upkeep = MaintenanceThreads([(0.01, lambda: over.wait(60)), (0.01, lambda: done.append(1))])
    upkeep.start()
    wait_for(lambda: len(done) > 3)
    stopping = threading.Thread(target=upkeep.stop, daemon=True)
    stopping.start()
    stopping.join(30)
    assert not stopping.is_alive()
    over.set()
