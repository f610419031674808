"""Workers as children, and the upkeep beside them: whatever dies is started again, and the server lives."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from skyloom.core.errors import CapacityError
from skyloom.serve.queue.database import Database
from skyloom.serve.queue.jobs import JobStore
from skyloom.serve.queue.leases import Leases
from skyloom.serve.queue.maintenance import MaintenanceThreads
from skyloom.serve.settings import Settings
from skyloom.serve.workers.processes import Supervisor, worker_command, worker_environment

SLEEPER = [sys.executable, "-c", "import sys; sys.stdin.buffer.read()"]


@pytest.fixture
def queue(tmp_path) -> Leases:
    """A queue."""
    settings = Settings(data=tmp_path)
    return Leases(Database(settings.database), settings)


def wait_for(condition, seconds: float = 20.0) -> None:
    """Until something holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it does not come to that"
        time.sleep(0.02)


def test_a_child_that_dies_is_started_again_and_its_job_goes_back(queue, monkeypatch):
    monkeypatch.setattr("skyloom.serve.workers.processes.worker_command", lambda device: SLEEPER)
    supervisor = Supervisor(queue, queue.settings, ["cpu"]).start()
    child = supervisor._children[0]
    wait_for(lambda: child.alive)
    name, first = child._process.args[-1], child._process.pid
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
    wait_for(lambda: child.alive and child._process.pid != first)
    assert supervisor.health().restarts == 1
    supervisor.stop()
    assert supervisor.health().alive == 0
    queue.database.close()


def test_stopping_is_quick_also_for_a_child_that_does_not_listen(queue, monkeypatch):
    deaf = "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    monkeypatch.setattr(
        "skyloom.serve.workers.processes.worker_command",
        lambda device: [sys.executable, "-c", deaf],
    )
    monkeypatch.setattr("skyloom.serve.workers.processes.STOP_SECONDS", 0.5)
    supervisor = Supervisor(queue, queue.settings, ["cpu"]).start()
    wait_for(lambda: supervisor.health().alive == 1)
    time.sleep(0.3)
    begun = time.monotonic()
    supervisor.stop()
    assert time.monotonic() - begun < 10
    assert supervisor.health().alive == 0
    queue.database.close()


def test_no_address_and_no_password_is_on_the_command_line():
    settings = Settings(
        database_url="postgresql://ada:secret@host/jobs", storage_url="s3://bucket/x"
    )
    assert "secret" not in " ".join(worker_command("cpu"))
    environment = worker_environment(settings)
    assert environment["SKYLOOM_DATABASE_URL"].endswith("secret@host/jobs")
    assert environment["SKYLOOM_STORAGE_URL"] == "s3://bucket/x"


def test_a_worker_process_drains_when_its_server_is_gone(tmp_path):
    settings = Settings(data=tmp_path)
    process = subprocess.Popen(
        [*worker_command("cpu"), "--name", "w"],
        env=worker_environment(settings), stdin=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    store = JobStore(Database(settings.database), settings)
    wait_for(lambda: store.counts().workers == 1, 60)
    process.stdin.close()
    assert process.wait(timeout=20) == 0
    store.database.close()


def test_upkeep_does_each_task_in_its_time_whatever_goes_wrong():
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


def test_a_task_that_hangs_holds_up_no_other_and_no_stop():
    over, done = threading.Event(), []
    upkeep = MaintenanceThreads([(0.01, lambda: over.wait(60)), (0.01, lambda: done.append(1))])
    upkeep.start()
    wait_for(lambda: len(done) > 3)
    stopping = threading.Thread(target=upkeep.stop, daemon=True)
    stopping.start()
    stopping.join(30)
    assert not stopping.is_alive()
    over.set()
