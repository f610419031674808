"""A real Ray on this machine and a real Postgres: workers are killed, and no job is lost or made
twice.

Slow, and skipped where Ray is not installed (pip install 'skyloom[ray]') or cannot start.
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
from skyloom.serve.queue.tables import events, results
from skyloom.serve.settings import Settings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(0),
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed"),
    pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc"),
]
JOBS, SECRET = 6, "Not-To-Be-Seen"
MAIN = "from skyloom.cli.app import main; main()"


class Desk:
    """`skyloom cluster` as somebody types it, with a home, a data folder and a queue of its own."""

    def __init__(self, folder: Path, url: str) -> None:
        self.settings = Settings(data=folder / "data", database_url=url)
        self.environment = {
            **os.environ,
            "HOME": str(folder),
            "SKYLOOM_DATA": str(self.settings.data),
        }
        self.environment |= {"SKYLOOM_DATABASE_URL": url, "PGPASSWORD": SECRET}
        self.environment |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        (folder / "ray").mkdir()
        self.environment["RAY_TMPDIR"] = str(folder / "ray")

    def __call__(self, *words: str) -> dict:
        """What a verb answers."""
        command = [sys.executable, "-c", MAIN, "cluster", *words, "--json"]
        ran = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout)


@pytest.fixture
def desk(postgres_url, tmp_path_factory):
    """A cluster's user; what is left of the cluster ends with the test."""
    desk = Desk(tmp_path_factory.mktemp("r"), postgres_url)
    yield desk
    record = desk.settings.data / "cluster.json"
    if record.exists():
        os.killpg(json.loads(record.read_text())["pid"], signal.SIGKILL)


def processes(word: str) -> list[int]:
    """Whose arguments contain a word."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += (
                [int(entry.parent.name)]
                if word in entry.read_bytes().decode(errors="replace")
                else []
            )
        except OSError:
            continue
    return found


def listening(processes: set[int]) -> list[str]:
    """Addresses, in hexadecimal, at which processes listen."""
    sockets = set()
    for process in processes:
        for link in Path(f"/proc/{process}/fd").glob("*"):
            try:
                sockets.add(str(link.readlink()))
            except OSError:
                continue
    rows = [
        row.split()
        for table in ("tcp", "tcp6")
        for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    return [
        row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets
    ]


def test_killed_workers_of_a_cluster_lose_nothing_and_double_nothing(desk):
    store = JobStore(Database(desk.settings.database), desk.settings)
    ids = [
        store.submit({"prompt": f"a red ball, number {n}", "seconds": 1.0}, owner="ada").id
        for n in range(JOBS)
    ]
    begun = time.monotonic()
    told = desk("up", "--address", "local", "--workers", "2", "--cpus", "0.5", "--wait", "300")
    ready = time.monotonic() - begun
    assert (told["ours"], len(told["nodes"]), len(told["workers"])) == (True, 1, 2)
    leader = json.loads((desk.settings.data / "cluster.json").read_text())["pid"]
    assert {address[-8:] for address in listening(group_of(leader))} == {"0100007F"}, (
        "this machine only"
    )
    killed: list[int] = []
    while len(killed) < 2:  # each time one that has a job in hand
        busy = [
            worker["pid"] for worker in desk("status")["workers"] if worker["state"] == "working"
        ]
        if fresh := [pid for pid in busy if pid not in killed]:
            os.kill(fresh[0], signal.SIGKILL)
            killed.append(fresh[0])
        assert any(not store.get(id).done for id in ids), "all was done before two were killed"
    while not all(store.get(id).done for id in ids):
        time.sleep(0.2)
    whole = group_of(leader)
    workers = sum(proportional(process) for process in whole & set(processes("--attached")))
    memory = {
        "ray_mib": (sum(map(proportional, whole)) - workers) // 1024,
        "two_workers_mib": workers // 1024,
    }
    assert [store.get(id).status for id in ids] == ["completed"] * JOBS
    with store.database.read() as connection:
        made = connection.execute(select(func.count()).select_from(results)).scalar_one()
        ends = connection.execute(
            select(func.count()).where(events.c.type == "video.completed")
        ).scalar_one()
    assert (made, ends) == (JOBS, JOBS)
    assert sum(worker["restarts"] for worker in desk("status")["workers"]) == 2
    assert processes(SECRET) == []
    seen = [path for path in Path(desk.environment["RAY_TMPDIR"]).rglob("*") if path.is_file()]
    assert seen
    assert not [path for path in seen if SECRET.encode() in path.read_bytes()], (
        "no log of Ray's knows the password"
    )
    assert desk("down") == {"workers": 2, "ray_stopped": True}
    assert processes(str(desk.settings.data)) == processes(desk.environment["RAY_TMPDIR"]) == []
    sys.stderr.write(json.dumps({"ready_s": round(ready, 1), **memory}) + "\n")
    store.database.close()


def group_of(leader: int) -> set[int]:
    """All processes of a session."""
    shown = subprocess.run(
        ["ps", "-o", "pid=", "--sid", str(leader)], capture_output=True, text=True, check=True
    )
    return {int(number) for number in shown.stdout.split()}


def proportional(process: int) -> int:
    """Memory in KiB, shared pages by their share."""
    try:
        rows = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(row.split()[1]) for row in rows if row.startswith("Pss:")), 0)
