"""A real server with a fake renderer, for attacks: `start` starts it, and this file is its program.

With `held`, plans wait until the file `held` is gone from the data folder, and requests must come sooner than usual, so
that tests wait for conditions and not for minutes.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ME = Path(__file__).absolute()
sys.path.insert(0, str(ME.parents[1] / "serve"))

import live  # noqa: E402 - beside tests/serve
from swarm import HANGS  # noqa: E402

from skyloom.core.log import set_up_logging  # noqa: E402
from skyloom.serve import main as listen  # noqa: E402
from skyloom.serve.api.connections import Connections, ConnectionTimeouts  # noqa: E402
from skyloom.serve.queue.api_keys import KeyStore  # noqa: E402
from skyloom.serve.queue.database import Database  # noqa: E402
from skyloom.serve.settings import Settings  # noqa: E402

__all__ = ["HANGS", "HELD", "make_key", "start", "wait_for"]
HELD = "held"
SOON = ConnectionTimeouts(head=2.0, body=3.0, rest=2.0, unread=60.0)
PLAN = {"size": "128x128", "fps": 16.0, "steps": 4, "guidance": 1.0, "estimate": {"seconds": 3.0}}


def start(data: Path, *, held: bool = False, **settings: object) -> live.Server:
    """A server that is ready; its log lies in `data`."""
    data.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ME), str(data), *(["--held"] if held else [])]
    told = {f"SKYLOOM_{name.upper()}": str(value) for name, value in settings.items()}
    paths = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTHONPATH": paths, **told}
    with (data / "log").open("a") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )
    assert process.stdout
    ready = json.loads(process.stdout.readline())
    return live.Server(process, ready["url"], ready["token"])


def make_key(data: Path, owner: str) -> str:
    """A new key of an owner."""
    database = Database(Settings(data=data).database)
    try:
        return KeyStore(database).create(owner)[1]
    finally:
        database.close()


def wait_for(what: str, holds: Callable[[], Any], seconds: float = 120.0) -> Any:
    """What `holds` returns once that is true. Raises AssertionError when it never is."""
    until = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < until, what
        time.sleep(0.05)
    return value


def plan_when_let_go(mark: Path, _request: object) -> dict[str, Any]:
    """A plan, once the mark is gone."""
    while mark.exists():
        time.sleep(0.05)
    return PLAN


def main() -> None:
    """Be the server."""
    options = argparse.ArgumentParser()
    options.add_argument("data", type=Path)
    options.add_argument("--held", action="store_true")
    asked = options.parse_args()
    set_up_logging(style="human")
    if asked.held:
        listen.plan_in_subprocess = partial(plan_when_let_go, asked.data / HELD)
        listen.Connections = partial(Connections, timeouts=SOON)
    live.serve(asked.data, live.Fake(seconds=0.01))


if __name__ == "__main__":
    main()
