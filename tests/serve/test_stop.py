"""A server with stuck network calls exits on SIGTERM; undelivered webhooks stay due."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest

from skyloom.serve.queue.database import Database
from skyloom.serve.queue.tables import deliveries
from skyloom.serve.queue.webhooks import EVENT_TYPES, EndpointStore, enqueue_deliveries
from skyloom.serve.settings import Settings

# The socket layer never returns; each call writes a line to the file.
SERVER = """
import sys, threading
from skyloom.serve.queue import http_client as outbound
from skyloom.serve import maintenance as upkeep
calls = open(sys.argv.pop(1), "w")

def hang(*_, **__):
    print("called", file=calls, flush=True)
    threading.Event().wait()

outbound.post_to = outbound.fetch = hang
if sys.argv.pop(1) == "storage":
    upkeep.collect = hang
from skyloom.cli.app import main
main()
"""


@pytest.mark.parametrize("hanging", ["outside", "storage"])
def test_sigterm_ends_a_server_with_stuck_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hanging: str
):
    monkeypatch.undo()  # loopback is meant here
    settings = Settings(data=tmp_path / "data")
    calls = tmp_path / "calls"
    calls.touch()
    with contextlib.closing(Database(settings.database)) as database:
        store = EndpointStore(database)
        local = store.add("local", "a", "https://example.org/", EVENT_TYPES)
        for owner in ("local", "bob", "cy"):
            store.add(owner, "b", "https://example.org/", EVENT_TYPES)
            with database.write() as write:
                enqueue_deliveries(write, owner, "video.completed", "video_1")
        command = [sys.executable, "-c", SERVER, str(calls), hanging]
        command += ["serve", "--port", "0", "--data", str(settings.data), "--json", "--no-worker"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, env=environment, text=True
        ) as server:
            assert server.stdout
            ready = json.loads(server.stdout.readline())
            threading.Thread(
                target=request_test_delivery, args=(ready, local.id), daemon=True
            ).start()
            expected = 4 + 1 + (hanging == "storage")  # deliveries, the test, collecting
            wait_for_lines(calls, expected)
            server.send_signal(signal.SIGTERM)
            try:
                code = server.wait(timeout=60)
            except subprocess.TimeoutExpired:
                server.kill()
                raise
            assert code == 0
        with database.read() as connection:
            rows = connection.execute(deliveries.select()).all()
    assert len(rows) == 4
    assert all(row.next_at is not None and row.attempts == 0 for row in rows), "they are sent again"


def request_test_delivery(ready: dict, endpoint: str) -> None:
    """Send a request that is never answered."""
    url = f"{ready['url']}/v1/webhook_endpoints/{endpoint}/test"
    headers = {"authorization": f"Bearer {ready['token']}", "content-type": "application/json"}
    body = json.dumps({"event_type": "video.completed"}).encode()
    with contextlib.suppress(OSError):
        urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60)


def wait_for_lines(file: Path, count: int) -> None:
    """Wait until a file has `count` lines."""
    over = threading.Event()
    for _ in range(3_000):
        if len(file.read_text().splitlines()) >= count:
            return
        over.wait(0.02)
    raise AssertionError(file.read_text())
