"""Real processes that hang in C: they end, whoever supervises them starts another, and the job goes on or fails."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from skyloom.serve.queue.database import Database
from skyloom.serve.queue.jobs import JobStore
from skyloom.serve.queue.leases import Leases
from skyloom.serve.queue.watchdog import EXIT_STUCK
from skyloom.serve.settings import Settings, load_settings
from skyloom.serve.workers.cluster import Orders
from skyloom.serve.workers.processes import Supervisor, settings_environment, worker_environment
from skyloom.serve.workers.ray_backend import KeptWorker

from .conftest import HERE

STUCK_WORKER = f"""
import ctypes, importlib.util, os, sys, threading
from pathlib import Path
place = importlib.util.spec_from_file_location("swarm", {str(HERE / "swarm.py")!r})
swarm = importlib.util.module_from_spec(place)
place.loader.exec_module(swarm)
from skyloom.serve.queue import watchdog
from skyloom.serve.queue.database import Database
from skyloom.serve.queue.leases import Leases
from skyloom.serve.settings import load_settings
from skyloom.serve.storage import FolderStorage
from skyloom.serve.workers.worker import Worker
watchdog.HARD_SLACK_SECONDS = 1.0
settings = load_settings()

def render(job, folder, *, output):
    for told in swarm.fake_render(job, folder, output=output):
        yield told
        (ctypes.CDLL if job.request["prompt"] == "sleeps" else ctypes.PyDLL)(None).sleep(600)

settings.runs.mkdir(parents=True, exist_ok=True)
leases, storage = Leases(Database(settings.database), settings), FolderStorage(Path(settings.storage))
hand = Worker(leases, storage, render, settings, name=sys.argv[-1], device="none", end=os._exit)
threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(0)), daemon=True).start()
hand.run()
"""


def wait_for(condition, seconds: float = 300.0) -> None:
    """Until something holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it does not come to that"
        time.sleep(0.02)


def stuck_settings(folder: Path) -> Settings:
    """Little patience, and leases that do not run out by themselves."""
    return Settings(
        data=folder, max_attempts=2, stall_seconds=0.5, load_seconds=120, disk_reserve=0,
        lease_seconds=3_600, heartbeat_seconds=0.1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "code"), [("sleeps", "stalled"), ("holds the interpreter", "worker_lost")]
)
def test_a_supervised_process_that_hangs_in_c_is_replaced_until_the_job_has_failed(
    tmp_path, monkeypatch, prompt, code
):
    command = [sys.executable, "-c", STUCK_WORKER]
    monkeypatch.setattr("skyloom.serve.workers.processes.worker_command", lambda device: command)
    settings = stuck_settings(tmp_path)
    leases = Leases(Database(settings.database), settings)
    store = JobStore(leases.database, settings)
    id = store.submit({"prompt": prompt}, owner="ada").id
    supervisor = Supervisor(leases, settings, ["cpu"]).start()
    try:
        wait_for(lambda: store.get(id).done)
        assert (store.get(id).status, store.get(id).error.code) == ("failed", code)
        wait_for(lambda: supervisor.health().restarts >= 2 and supervisor.health().alive == 1)
        other = store.submit(
            {"prompt": prompt}, owner="ada"
        ).id  # the worker that came after takes work
        wait_for(lambda: store.get(other).status == "in_progress")
    finally:
        supervisor.kill()
        supervisor.stop()
    leases.database.close()


def test_a_keeper_of_a_cluster_replaces_its_stuck_worker_too(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "skyloom.serve.workers.ray_backend.worker_command",
        lambda device: [sys.executable, "-c", STUCK_WORKER],
    )
    settings = stuck_settings(tmp_path)
    store = JobStore(Database(settings.database), settings)
    id = store.submit({"prompt": "sleeps"}, owner="ada").id
    keeper = KeptWorker(Orders(cpus=1.0, gpus=0.0, environment=settings_environment(settings)))
    try:
        wait_for(lambda: store.get(id).done)
        assert (store.get(id).status, store.get(id).error.code) == ("failed", "stalled")
        wait_for(lambda: keeper._child.restarts >= 2)
    finally:
        keeper._child.kill()
        keeper.stop()
    store.database.close()


REMOTE_WORKER = """
import time
from skyloom.serve.workers.render import PipelineRenderer

def hang(self, job, folder, *, output):
    time.sleep(600)
    yield

PipelineRenderer.__call__ = hang
from skyloom.cli.app import main
main()
"""


def test_a_worker_on_its_own_ends_with_a_status_that_its_process_manager_sees(tmp_path):
    settings = Settings(data=tmp_path, load_seconds=0.5, max_attempts=2, disk_reserve=0)
    store = JobStore(Database(settings.database), settings)
    id = store.submit({"prompt": "a cat"}, owner="ada").id
    command = [sys.executable, "-c", REMOTE_WORKER, "worker", "--device", "cpu", "--log", "json"]
    done = subprocess.run(
        command,
        env=worker_environment(settings),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == EXIT_STUCK, done.stderr
    job = store.get(id)
    assert (job.status, job.attempts) == ("queued", 1)
    assert [attempt.error["code"] for attempt in store.attempts(job)] == ["stalled"]
    assert "in hang" in done.stderr  # the log says where
    store.database.close()


def test_supervised_workers_get_every_limit(tmp_path):
    asked = Settings(
        data=tmp_path, stall_seconds=1.5, load_seconds=2.5, cancel_seconds=3.5, max_attempt_seconds=4.5,
        max_job_seconds=5.5, keep_seconds=6.5,
    )  # fmt: skip
    told = load_settings(environment=settings_environment(asked))
    for name in ("stall", "load", "cancel", "max_attempt", "max_job", "keep"):
        assert getattr(told, f"{name}_seconds") == getattr(asked, f"{name}_seconds")
