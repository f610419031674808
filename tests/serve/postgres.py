"""A Postgres of the tests' own: the distribution's programs, a folder in /tmp, a Unix socket and no
port.

Postgres refuses to run as root; then it runs as the user `postgres` or `nobody`.
"""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def find_programs() -> Path | None:
    """The folder of `initdb` and `postgres`; None where there is none."""
    places = [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    named = shutil.which("initdb")
    places += [Path(named).resolve().parent] if named else []
    return next(
        (
            place
            for place in places
            if (place / "initdb").exists() and (place / "postgres").exists()
        ),
        None,
    )


def why_not() -> str | None:
    """Why there can be no Postgres here; None if there can."""
    if find_programs() is None:
        return "no Postgres on this machine (Debian: apt-get install postgresql)"
    if os.getuid() == 0 and (_user() is None or shutil.which("setpriv") is None):
        return "Postgres does not run as root, and there is no setpriv or no other user"
    return None


class Cluster:
    """A Postgres in a folder: started, killed with SIGKILL, and started again.

    `durable` waits for the disk at every commit; with an `address` it also listens there, to that
    address's network.
    """

    def __init__(self, folder: Path, *, durable: bool, address: str | None = None) -> None:
        programs = find_programs()
        assert programs is not None, why_not()
        self._programs, self._folder = programs, folder
        self._prefix, self.user = _as_user(folder)
        make = [
            str(programs / "initdb"),
            "-D",
            str(folder / "data"),
            "-U",
            self.user,
            "-A",
            "trust",
            "-E",
            "UTF8",
        ]
        subprocess.run(
            [*self._prefix, *make, "--no-sync"], check=True, cwd=folder, stdout=subprocess.DEVNULL
        )
        if address is not None:
            with (folder / "data/pg_hba.conf").open("a") as rights:
                rights.write(f"host all all {address}/24 trust\n")
        self._flags = [
            "-c",
            f"listen_addresses={address or ''}",
            "-c",
            f"unix_socket_directories={folder}",
        ]
        self._flags += ["-c", "max_connections=200"]
        self._flags += [] if durable else ["-c", "fsync=off", "-c", "synchronous_commit=off"]
        self.url = f"postgresql:///postgres?host={folder}&user={self.user}"
        self._server = self.start()

    def start(self) -> "subprocess.Popen[bytes]":
        """Start, and wait until it answers. After a SIGKILL that takes until the last of its
        processes has noticed."""
        command = [
            *self._prefix,
            str(self._programs / "postgres"),
            "-D",
            str(self._folder / "data"),
            *self._flags,
        ]
        for _ in range(300):
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            self._server = subprocess.Popen(command, cwd=self._folder, **quiet)
            while self._server.poll() is None:
                if self._answers():
                    return self._server
                time.sleep(0.1)
            time.sleep(0.1)
        raise RuntimeError("Postgres does not start")

    def kill(self) -> None:
        """SIGKILL to the first process, which all others depend on."""
        self._server.kill()
        self._server.wait()

    def stop(self) -> None:
        """End now."""
        self._server.send_signal(signal.SIGQUIT)
        self._server.wait()

    def _answers(self) -> bool:
        ask = [str(self._programs / "pg_isready"), "-q", "-h", str(self._folder), "-U", self.user]
        return subprocess.run(ask, check=False).returncode == 0


@contextmanager
def cluster(*, durable: bool = False, address: str | None = None) -> Iterator[Cluster]:
    """A Postgres that runs while the block does."""
    folder = Path(tempfile.mkdtemp(prefix="skyloom-postgres-", dir="/tmp"))
    one = Cluster(folder, durable=durable, address=address)
    try:
        yield one
    finally:
        one.stop()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def running(*, durable: bool = False) -> Iterator[str]:
    """The URL of a Postgres that runs while the block does."""
    with cluster(durable=durable) as one:
        yield one.url


def _user() -> pwd.struct_passwd | None:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    return None


def _as_user(folder: Path) -> tuple[list[str], str]:
    """What to write before a command, and the name of the user that it runs as."""
    if os.getuid() != 0:
        return [], pwd.getpwuid(os.getuid()).pw_name
    user = _user()
    assert user is not None, why_not()
    os.chown(folder, user.pw_uid, user.pw_gid)
    return [
        "setpriv",
        f"--reuid={user.pw_uid}",
        f"--regid={user.pw_gid}",
        "--clear-groups",
    ], user.pw_name
