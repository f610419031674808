"""Real server with a fake renderer for attacks: `start` starts it; this file is its program.

With `held`, plans wait until the file `held` is removed from the data folder, and connection
timeouts are short so that tests run quickly.
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
SHORT_TIMEOUTS = ConnectionTimeouts(head=2.0, body=3.0, rest=2.0, unread=60.0)
PLAN = {"size": "128x128", "fps": 16.0, "steps": 4, "guidance": 1.0, "estimate": {"seconds": 3.0}}


def start(data: Path, *, held: bool = False, **settings: object) -> live.Server:
    """Start a server and wait until it is ready; its log is `data`/log."""
    data.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ME), str(data), *(["--held"] if held else [])]
    variables = {f"SKYLOOM_{name.upper()}": str(value) for name, value in settings.items()}
    paths = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTHONPATH": paths, **variables}
    with (data / "log").open("a") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )
    assert process.stdout
    ready = json.loads(process.stdout.readline())
    return live.Server(process, ready["url"], ready["token"])


def make_key(data: Path, owner: str) -> str:
    """Create an API key for an owner."""
    database = Database(Settings(data=data).database)
    try:
        return KeyStore(database).create(owner)[1]
    finally:
        database.close()


def wait_for(what: str, holds: Callable[[], Any], seconds: float = 120.0) -> Any:
    """Poll `holds` until it is true; return its value. Raises AssertionError after `seconds`."""
    until = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < until, what
        time.sleep(0.05)
    return value


def plan_after_removal(mark: Path, _request: object) -> dict[str, Any]:
    """Return a plan after the file `mark` is removed."""
    while mark.exists():
        time.sleep(0.05)
    return PLAN


def main() -> None:
    """Run the server."""
    options = argparse.ArgumentParser()
    options.add_argument("data", type=Path)
    options.add_argument("--held", action="store_true")
    arguments = options.parse_args()
    set_up_logging(style="human")
    if arguments.held:
        listen.plan_in_subprocess = partial(plan_after_removal, arguments.data / HELD)
        listen.Connections = partial(Connections, timeouts=SHORT_TIMEOUTS)
    live.serve(arguments.data, live.Fake(seconds=0.01))


if __name__ == "__main__":
    main()
