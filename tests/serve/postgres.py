"""A Postgres of the tests' own: the distribution's programs, a folder in /tmp, a Unix socket and no port.

Postgres refuses to run as root; then it runs as the user `postgres` or `nobody`.
"""

import os
import pwd
import shutil
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
    return next((place for place in places if (place / "initdb").exists() and (place / "postgres").exists()), None)


def why_not() -> str | None:
    """Why there can be no Postgres here; None if there can."""
    if find_programs() is None:
        return "no Postgres on this machine (Debian: apt-get install postgresql)"
    if os.getuid() == 0 and (_user() is None or shutil.which("setpriv") is None):
        return "Postgres does not run as root, and there is no setpriv or no other user"
    return None


@contextmanager
def running(*, durable: bool = False) -> Iterator[str]:
    """The URL of a Postgres that runs while the block does; `durable` waits for the disk at every commit."""
    programs, folder = find_programs(), Path(tempfile.mkdtemp(prefix="skyloom-postgres-", dir="/tmp"))
    assert programs is not None, why_not()
    prefix, user = _as_user(folder)
    data = folder / "data"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    make = [*prefix, str(programs / "initdb"), "-D", str(data), "-U", user, "-A", "trust", "-E", "UTF8", "--no-sync"]
    subprocess.run(make, check=True, cwd=folder, **quiet)
    flags = ["-c", "listen_addresses=", "-c", f"unix_socket_directories={folder}", "-c", "max_connections=200"]
    flags += [] if durable else ["-c", "fsync=off", "-c", "synchronous_commit=off"]
    server = subprocess.Popen([*prefix, str(programs / "postgres"), "-D", str(data), *flags], cwd=folder, **quiet)
    try:
        _wait(programs, folder, user)
        yield f"postgresql:///postgres?host={folder}&user={user}"
    finally:
        server.send_signal(3)  # SIGQUIT: now
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _wait(programs: Path, folder: Path, user: str) -> None:
    for _ in range(300):
        asked = subprocess.run([str(programs / "pg_isready"), "-q", "-h", str(folder), "-U", user], check=False)
        if asked.returncode == 0:
            return
        time.sleep(0.1)
    raise RuntimeError("Postgres did not start within 30 s")


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
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"], user.pw_name
