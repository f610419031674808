"""`skyloom serve` and `skyloom keys`."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from skyloom.serve.queue.database import Database
from skyloom.serve.queue.jobs import JobStore
from skyloom.serve.settings import Settings
from skyloom.serve.storage.installation import open_installation

MAX_IDLE_KB = 120 * 1024
SERVE = "from skyloom.cli.app import main; main()"


def test_keys_are_made_listed_and_revoked(skyloom, tmp_path):
    where = ["--data", tmp_path]
    made = json.loads(
        skyloom(
            "keys", "create", "alice", "--name", "laptop", "--expires", "90d", "--json", *where
        ).out
    )
    assert made["key"].startswith(f"sk-sky-{made['id']}-")
    plain = skyloom("keys", "create", "bob", "--scope", "read", *where).out.strip()
    assert plain.startswith("sk-sky-")
    listed = [
        json.loads(line) for line in skyloom("keys", "list", "--json", *where).out.splitlines()
    ]
    assert [(key["owner"], key["scopes"]) for key in listed] == [
        ("alice", ["read", "write"]),
        ("bob", ["read"]),
    ]
    assert "key" not in listed[0]
    assert skyloom("keys", "revoke", made["id"], *where).code == 0
    assert "revoked" in skyloom("keys", "list", *where).out.splitlines()[0]
    for words in (
        ["create", "a b"],
        ["create", "alice", "--scope", "root"],
        ["create", "a", "--expires", "soon"],
    ):
        assert skyloom("keys", *words, *where).code == 2


def test_a_public_address_needs_an_api_key(skyloom, tmp_path):
    ran = skyloom("serve", "--host", "0.0.0.0", "--port", "0", "--no-worker", "--data", tmp_path)
    assert ran.code == 2
    assert "skyloom keys create" in ran.err


def test_server_and_worker_refuse_a_foreign_database_or_storage(skyloom, tmp_path):
    """Each command exits with 2 and creates no database."""
    settings = Settings(data=tmp_path / "data")
    database, storage = open_installation(settings)
    storage.put(b"a video", "mp4")
    database.close()
    serve = ["serve", "--port", "0", "--no-worker"]
    typo = ["--data", tmp_path / "data", "--database", f"sqlite:///{tmp_path / 'typo.db'}"]
    for words in (
        serve,
        ["worker", "--device", "cpu"],
        ["keys", "list"],
        ["jobs", "list"],
        ["doctor", "--check-db"],
    ):
        ran = skyloom(*words, *typo)
        assert (ran.code, "missing or empty" in ran.err) == (2, True), words
    assert not (tmp_path / "typo.db").exists()
    away = ["--data", tmp_path / "data", "--storage", tmp_path / "mount"]
    for words in (serve, ["worker", "--device", "cpu"]):
        ran = skyloom(*words, *away)
        assert (ran.code, "mounted" in ran.err) == (2, True), words
    assert not (tmp_path / "mount").exists()
    assert b"".join(storage.read(next(storage.assets())[0])) == b"a video"


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs /proc")
def test_a_server_announces_itself_stays_small_and_exits_on_sigterm(tmp_path):
    """One line of JSON, one socket on the loopback, limited memory, exit status 0."""
    command = [
        sys.executable,
        "-c",
        SERVE,
        "serve",
        "--port",
        "0",
        "--data",
        str(tmp_path),
        "--json",
        "--no-worker",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as server:
        try:
            assert server.stdout
            ready = json.loads(server.stdout.readline())
            assert ready.keys() == {"url", "token"}
            port = int(ready["url"].rsplit(":", 1)[1])
            assert listening(server.pid) == [("127.0.0.1", port)]
            assert idle_kb(server.pid) <= MAX_IDLE_KB
        finally:
            server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=60) == 0


def test_ray_is_imported_by_the_cluster_command_only(tmp_path: Path):
    """Server, worker and --help run beside a fake Ray that records its import."""
    (tmp_path / "ray.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')")
    environment = {**os.environ, "SKYLOOM_DATA": str(tmp_path / "data")}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    command = [sys.executable, "-c", SERVE]
    subprocess.run(
        [*command, "cluster", "up", "--help"], env=environment, check=True, capture_output=True
    )
    serve = [*command, "serve", "--port", "0", "--device", "cpu", "--json"]
    with subprocess.Popen(
        serve, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as server:
        assert server.stdout
        assert server.stdout.readline()
        settings = Settings(data=tmp_path / "data")
        with contextlib.closing(Database(settings.database)) as database:
            store = JobStore(database, settings)
            job = store.submit(
                {"prompt": "a cat", "seconds": 0.3, "num_steps": 1, "seed": 1}, owner="ada"
            )
            while not (job := store.get(job.id)).done:
                time.sleep(0.1)
        server.terminate()
    assert job.status == "completed"
    assert not (tmp_path / "imported").exists()
    subprocess.run([sys.executable, "-c", "import ray"], env=environment, check=True)
    assert (tmp_path / "imported").exists(), "the trap works"


def idle_kb(process: int) -> int:
    """Resident memory."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])


def listening(process: int) -> list[tuple[str, int]]:
    """Addresses on which a process listens."""
    mine = {
        str(link.readlink()) for link in Path(f"/proc/{process}/fd").iterdir() if link.is_symlink()
    }
    found = []
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]:
            words = row.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in mine:
                host, port = words[1].split(":")
                found.append(
                    (".".join(str(byte) for byte in bytes.fromhex(host)[::-1]), int(port, 16))
                )
    return found
