"""Worker processes stuck in C calls: they exit and are replaced; the job is retried or fails."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from skyloom.serve.queue.database import Database
from skyloom.serve.queue.jobs import JobStore
from skyloom.serve.queue.leases import Leases
from skyloom.serve.settings import Settings, load_settings
from skyloom.serve.workers.processes import (
    WorkerSupervisor,
    settings_environment,
    worker_environment,
)
from skyloom.serve.workers.ray_backend import WorkerActor, WorkerSpec
from skyloom.serve.workers.watchdog import EXIT_STUCK

from .conftest import HERE

STUCK_WORKER = f"""
import ctypes, importlib.util, os, sys, threading
from pathlib import Path
place = importlib.util.spec_from_file_location("swarm", {str(HERE / "swarm.py")!r})
swarm = importlib.util.module_from_spec(place)
place.loader.exec_module(swarm)
from skyloom.serve.queue.database import Database
from skyloom.serve.queue.leases import Leases
from skyloom.serve.settings import load_settings
from skyloom.serve.storage import FolderStorage
from skyloom.serve.workers import watchdog
from skyloom.serve.workers.worker import Worker
watchdog.HARD_SLACK_SECONDS = 1.0
settings = load_settings()

def render(job, folder, *, output):
    for step in swarm.fake_render(job, folder, output=output):
        yield step
        (ctypes.CDLL if job.request["prompt"] == "sleeps" else ctypes.PyDLL)(None).sleep(600)

settings.runs.mkdir(parents=True, exist_ok=True)
leases = Leases(Database(settings.database), settings)
storage = FolderStorage(Path(settings.storage))
worker = Worker(
    leases, storage, render, settings, name=sys.argv[-1], device="none", exit_process=os._exit
)
threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(0)), daemon=True).start()
worker.run()
"""


def wait_for(condition, seconds: float = 300.0) -> None:
    """Wait until a condition holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "timeout"
        time.sleep(0.02)


def stuck_settings(folder: Path) -> Settings:
    """A short stall limit, and leases that do not expire during the test."""
    return Settings(
        data=folder, max_attempts=2, stall_seconds=0.5, load_seconds=120, disk_reserve=0,
        lease_seconds=3_600, heartbeat_seconds=0.1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "code"), [("sleeps", "stalled"), ("holds the interpreter", "worker_lost")]
)
def test_a_stuck_process_is_replaced_until_the_job_has_failed(tmp_path, monkeypatch, prompt, code):
    command = [sys.executable, "-c", STUCK_WORKER]
    monkeypatch.setattr("skyloom.serve.workers.processes.worker_command", lambda device: command)
    settings = stuck_settings(tmp_path)
    leases = Leases(Database(settings.database), settings)
    store = JobStore(leases.database, settings)
    id = store.submit({"prompt": prompt}, owner="ada").id
    supervisor = WorkerSupervisor(leases, settings, ["cpu"]).start()
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


def test_a_ray_actor_replaces_its_stuck_worker(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "skyloom.serve.workers.ray_backend.worker_command",
        lambda device: [sys.executable, "-c", STUCK_WORKER],
    )
    settings = stuck_settings(tmp_path)
    store = JobStore(Database(settings.database), settings)
    id = store.submit({"prompt": "sleeps"}, owner="ada").id
    actor = WorkerActor(WorkerSpec(1.0, 0.0, settings_environment(settings)))
    try:
        wait_for(lambda: store.get(id).done)
        assert (store.get(id).status, store.get(id).error.code) == ("failed", "stalled")
        wait_for(lambda: actor._process.restarts >= 2)
    finally:
        actor._process.kill()
        actor.stop()
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


def test_an_unsupervised_stuck_worker_exits_with_a_status(tmp_path):
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
    assert [attempt.error.code for attempt in store.attempts(job)] == ["stalled"]
    assert "in hang" in done.stderr  # the log says where
    store.database.close()


def test_the_worker_environment_has_every_time_limit(tmp_path):
    settings = Settings(
        data=tmp_path,
        stall_seconds=1.5,
        load_seconds=2.5,
        cancel_seconds=3.5,
        max_attempt_seconds=4.5,
        max_job_seconds=5.5,
        keep_seconds=6.5,
    )
    loaded = load_settings(environment=settings_environment(settings))
    for name in ("stall", "load", "cancel", "max_attempt", "max_job", "keep"):
        assert getattr(loaded, f"{name}_seconds") == getattr(settings, f"{name}_seconds")
