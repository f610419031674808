"""A Ray of our own on this machine, on the loopback and with a token: `skyloom cluster up` starts it, `down` ends it.

Ray's daemons are children of `ray start --block`, which ends them all at SIGTERM; its number and port are written down
in the data folder. So other clusters of the same user are never touched, as `ray stop` would.
"""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from skyloom.core.errors import CapacityError

LOOPBACK = "127."
_START_SECONDS, _STOP_SECONDS, _LOOK_SECONDS = 90.0, 40.0, 0.2
_CONNECT_SECONDS = 5.0
_STORE_BYTES = 80_000_000  # about the least that Ray takes; nothing of ours lies in it


class Head:
    """The record of our cluster in a data folder, and the cluster."""

    def __init__(self, data: Path) -> None:
        self._record, self._log = data / "cluster.json", data / "cluster.log"

    def address(self) -> str | None:
        """Where ours listens; None if none runs."""
        told = self._read()
        return None if told is None else f"127.0.0.1:{told['port']}"

    def start(self) -> str:
        """Start it; gives its address. Raises CapacityError when it does not come up."""
        make_token()
        port = _free_port()
        self._record.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, **self.environment()}
        with self._log.open("wb") as log:
            process = subprocess.Popen(
                _command(port),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._record.write_text(json.dumps({"pid": process.pid, "port": port}))
        until = time.monotonic() + _START_SECONDS
        while b"Ray runtime started" not in self._log.read_bytes():
            if process.poll() is not None or time.monotonic() > until:
                self.stop()
                raise CapacityError("Ray did not start.", hint=f"{self._log} says why.")
            time.sleep(_LOOK_SECONDS)
        return f"127.0.0.1:{port}"

    def stop(self) -> bool:
        """End it, if it runs; whether it did."""
        told = self._read()
        if told is not None:
            os.kill(told["pid"], signal.SIGTERM)
            until = time.monotonic() + _STOP_SECONDS
            while self._read() is not None:
                if time.monotonic() > until:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(told["pid"], signal.SIGKILL)
                time.sleep(_LOOK_SECONDS)
        self._record.unlink(missing_ok=True)
        return told is not None

    @staticmethod
    def environment() -> dict[str, str]:
        """What its processes, and those that connect to it, need: the token, no statistics, and the loopback.

        Ray puts the host's own address in the place of 127.0.0.1, and listens to the world, unless it takes the
        machine for one that cannot be part of a larger cluster: that is what the odd name says. And it would run
        workers at niceness 15, behind everything else on the machine.
        """
        return {
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_worker_niceness": "0",
        }

    def _read(self) -> dict[str, int] | None:
        """What is written down, if that process still runs and is still ours."""
        try:
            told = json.loads(self._record.read_text())
        except (FileNotFoundError, ValueError):
            return None
        asked = ["ps", "-o", "stat=", "-o", "args=", "-p", str(told["pid"])]
        shown = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
        return told if f"--port={told['port']}" in shown and not shown.startswith("Z") else None


def found_here() -> str | None:
    """The cluster that this machine is part of, by RAY_ADDRESS or as Ray has noted it; None if none answers. Raises
    CapacityError for one that RAY_ADDRESS names and that does not."""
    noted = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    address = os.environ.get("RAY_ADDRESS")
    with contextlib.suppress(OSError):
        address = address or noted.read_text().strip()
    if address and answers(address):
        return address
    if os.environ.get("RAY_ADDRESS"):
        raise CapacityError(
            f"Nothing answers at {address}, which RAY_ADDRESS names.", hint="Check it, or unset it."
        )
    return None


def answers(address: str) -> bool:
    """Whether somebody listens at host:port."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, ValueError):
        return False
    return True


def has_token() -> bool:
    """Whether there is a token of Ray's for this user."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return True
    return _token_file().exists()


def make_token() -> None:
    """Make a token for this user, which nobody else can read, if there is none."""
    if not has_token():
        file = _token_file()
        file.parent.mkdir(mode=0o700, exist_ok=True)
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
            opened.write(secrets.token_hex(32))


def _token_file() -> Path:
    return Path.home() / ".ray" / "auth_token"


def _command(port: int) -> list[str]:
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        "--block",
        f"--port={port}",
    ]
    command += ["--node-ip-address=127.0.0.1", "--min-worker-port=0", "--max-worker-port=0"]
    return [
        *command,
        "--include-dashboard=false",
        "--disable-usage-stats",
        f"--object-store-memory={_STORE_BYTES}",
    ]


def _free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return door.getsockname()[1]
