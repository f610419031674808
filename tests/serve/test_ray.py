"""A real Ray cluster and a real Postgres: workers are killed, and no job is lost or done twice.

Slow, and skipped where Ray is not installed (pip install 'skyloom[ray]').
"""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from sqlalchemy import func, select

from skyloom.serve.queue.database import Database
from skyloom.serve.queue.jobs import JobStore
from skyloom.serve.queue.leases import Leases
from skyloom.serve.queue.tables import events, results
from skyloom.serve.settings import Settings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(0),
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed"),
    pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc"),
]
JOBS = 6
SECRET = "Not-To-Be-Seen"
MAIN = "from skyloom.cli.app import main; main()"
STORE_BYTES = 80_000_000


class Operator:
    """Runs `ray` and `skyloom cluster` with a home, a data folder and a queue of their own."""

    def __init__(self, folder: Path, url: str) -> None:
        self.settings = Settings(data=folder / "data", database_url=url)
        self.ray_folder = folder / "ray"
        self.ray_folder.mkdir()
        self.environment = {
            **os.environ,
            "HOME": str(folder),
            "SKYLOOM_DATA": str(self.settings.data),
            "SKYLOOM_DATABASE_URL": url,
            "PGPASSWORD": SECRET,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "RAY_TMPDIR": str(self.ray_folder),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
        }
        self.environment.pop("RAY_ADDRESS", None)
        self.environment.pop("RAY_AUTH_MODE", None)

    def ray(self, *words: str, **environment: str) -> None:
        """Run Ray's command line, without the database password."""
        variables = {**self.environment, **environment}
        del variables["PGPASSWORD"], variables["SKYLOOM_DATABASE_URL"]
        command = [str(Path(sys.executable).with_name("ray")), *words]
        subprocess.run(command, env=variables, check=True, capture_output=True)

    def start_ray(self, **environment: str) -> None:
        """Start a head node."""
        memory = f"--object-store-memory={STORE_BYTES}"
        words = ["start", "--head", "--port=0", "--include-dashboard=false", memory]
        self.ray(*words, **environment)

    def run(self, *words: str) -> "subprocess.CompletedProcess[str]":
        """Run a verb of `skyloom cluster`."""
        command = [sys.executable, "-c", MAIN, "cluster", *words]
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False
        )

    def __call__(self, *words: str) -> dict:
        """JSON output of a verb that succeeds."""
        ran = self.run(*words, "--json")
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout)


@pytest.fixture
def operator(postgres_url, tmp_path_factory):
    """An operator; Ray is stopped after the test."""
    operator = Operator(tmp_path_factory.mktemp("r"), postgres_url)
    yield operator
    operator.ray("stop", "--force")


def processes(word: str) -> list[int]:
    """Processes whose arguments contain a word."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = entry.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if word in text:
            found.append(int(entry.parent.name))
    return found


def test_a_cluster_without_a_token_or_that_does_not_run_is_refused(operator):
    ran = operator.run("up")
    assert (ran.returncode, "ray start --head" in ran.stderr) == (1, True), ran.stderr
    ran = operator.run("status", "--address", "127.0.0.1:1")
    assert (ran.returncode, "cannot be used" in ran.stderr) == (1, True), ran.stderr
    operator.start_ray(RAY_AUTH_MODE="disabled")
    ran = operator.run("up", "--workers", "1")
    assert (ran.returncode, "RAY_AUTH_MODE=token" in ran.stderr) == (2, True), ran.stderr


def test_killed_workers_of_a_cluster_lose_no_job_and_repeat_none(operator):
    store = JobStore(Database(operator.settings.database), operator.settings)
    ids = [
        store.submit({"prompt": f"a red ball, number {n}", "seconds": 1.0}, owner="ada").id
        for n in range(JOBS)
    ]
    operator.ray("get-auth-token", "--generate")
    operator.start_ray(RAY_AUTH_MODE="token")
    started = time.monotonic()
    status = operator("up", "--workers", "2", "--cpus", "0.5", "--wait", "300")
    seconds = time.monotonic() - started
    assert (len(status["nodes"]), len(status["workers"])) == (1, 2)
    leases = Leases(store.database, operator.settings)
    killed: set[str] = set()
    while len(killed) < 2:  # each time one with a job
        busy = [name for name, worker in leases.list_workers().items() if worker.job]
        for name in set(busy[: 2 - len(killed)]) - killed:
            os.kill(processes(name)[0], signal.SIGKILL)
            killed.add(name)
        assert any(not store.get(id).done for id in ids), "all done before two were killed"
    while not all(store.get(id).done for id in ids):
        time.sleep(0.2)
    worker_processes = processes("--attached")
    worker_memory = sum(map(proportional, worker_processes))
    ray_memory = sum(map(proportional, processes(str(operator.ray_folder)) + processes("ray::")))
    assert [store.get(id).status for id in ids] == ["completed"] * JOBS
    with store.database.read() as connection:
        made = connection.execute(select(func.count()).select_from(results)).scalar_one()
        completed = select(func.count()).where(events.c.type == "video.completed")
        ends = connection.execute(completed).scalar_one()
    assert (made, ends) == (JOBS, JOBS)
    assert sum(worker["restarts"] for worker in operator("status")["workers"]) == 2
    assert processes(SECRET) == []
    files = [path for path in operator.ray_folder.rglob("*") if path.is_file()]
    assert files
    leaks = [path for path in files if SECRET.encode() in path.read_bytes()]
    assert not leaks, "Ray's logs contain the password"
    assert operator("down") == {"workers": 2}
    assert operator("status")["workers"] == []
    assert not set(worker_processes) & set(processes("--attached"))
    measured = {
        "ready_s": round(seconds, 1),
        "ray_mib": ray_memory // 1024,
        "two_workers_mib": worker_memory // 1024,
    }
    sys.stderr.write(json.dumps(measured) + "\n")
    store.database.close()


def proportional(process: int) -> int:
    """Proportional set size (PSS) of a process in KiB."""
    try:
        rows = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(row.split()[1]) for row in rows if row.startswith("Pss:")), 0)
