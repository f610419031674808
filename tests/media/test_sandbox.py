"""Sandbox: restrictions of the child, crashes, timeouts, and validation of its replies."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from skyloom.core.errors import MediaError
from skyloom.media import sandbox
from skyloom.media.sandbox import Sandbox, is_picture
from skyloom.media.source import open_source

BENCH = Path(__file__).parents[2] / "bench"
TRY = """
import ctypes, json, os, socket, sys
from skyloom.media.sandbox_limits import confine
outside = socket.socket()
confine(2**26)
def forbidden(act):
    try:
        act()
    except (OSError, MemoryError, RuntimeError):
        return True
    return False
print(json.dumps({
    "read": forbidden(lambda: open("/etc/passwd")),
    "write": forbidden(lambda: open(sys.argv[1], "w")),
    "memory": forbidden(lambda: bytearray(2**28)),
    "network": forbidden(lambda: socket.create_connection(("127.0.0.1", int(sys.argv[2])), 1)),
    "environment": not os.environ.get("SECRET"),
}))
"""


def load(name: str) -> ModuleType:
    """Import a script of bench/."""
    place = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    assert place
    assert place.loader
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    return module


def stopped(child: Sandbox, act) -> str:
    """Return the error message after a child was stopped."""
    with pytest.raises(MediaError) as raised:
        act()
        child.send({"command": "index"})
        child.receive(2**20)
    assert raised.value.hint
    return raised.value.message


@pytest.mark.skipif(sys.platform != "linux", reason="namespaces and Landlock need Linux")
def test_confined_process_is_restricted(tmp_path):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        run = subprocess.run(
            [sys.executable, "-c", TRY, str(tmp_path / "x"), port],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONPATH": os.pathsep.join(sys.path)},
        )
    allowed = [name for name, refused in json.loads(run.stdout).items() if not refused]
    assert set(allowed) <= {"read", "network"}, "only these need a newer kernel"
    assert not (tmp_path / "x").exists() or not (tmp_path / "x").stat().st_size


def test_child_has_no_environment_and_no_torch(tmp_path, film, monkeypatch):
    monkeypatch.setenv("SECRET", "sesame")
    with Sandbox(film(tmp_path / "a.mp4", count=2), "video") as child:
        child.send({"command": "index"})
        assert child.receive(2**20)
        about = Path(f"/proc/{child.pid}")
        assert b"SECRET" not in (about / "environ").read_bytes()
        assert "torch" not in (about / "maps").read_text()
        held = {str(link.readlink()) for link in (about / "fd").iterdir()}
        assert {name for name in held if name.startswith("/")} <= {
            str(tmp_path / "a.mp4"),
            "/dev/null",
        }


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGSEGV, "decoder crashed"),
        (signal.SIGPROF, "10 seconds"),
        (signal.SIGKILL, "decoder crashed"),
    ],
)
def test_a_crashed_child_raises_one_error(tmp_path, film, number, message):
    child = Sandbox(film(tmp_path / "a.mp4", count=2), "video")
    assert message in stopped(child, lambda: (os.kill(child.pid, number), child._process.wait()))


@pytest.mark.parametrize(
    ("work", "end"),
    [
        ("while True: pass", -signal.SIGPROF),
        ("time.sleep(0.5)", 0),
        ("set_cpu_timeout(0)\nsum(range(2**22))", 0),
    ],
)
def test_cpu_timeout_counts_cpu_time_only(work, end):
    code = (
        "import time\nfrom skyloom.media.sandbox_limits import set_cpu_timeout\n"
        f"set_cpu_timeout(0.02)\n{work}"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == end


def test_a_child_that_hangs_is_killed(tmp_path, film, monkeypatch):
    monkeypatch.setattr(sandbox, "REPLY_TIMEOUT", 0.2)
    child = Sandbox(film(tmp_path / "a.mp4", count=2), "video")
    assert "made no progress" in stopped(child, lambda: os.kill(child.pid, signal.SIGSTOP))
    assert child._process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    "answer",
    [
        b"\xff\xff\xff\xff",
        b"\0\0\0\x02{}",
        b"\0\0\0\x02[]",
        b"\0\0\0\x05junk!",
        b'\0\0\0\x12{"bytes": 99999999}',
        b'\0\0\0\x0d{"bytes": -1}',
        b'\0\0\0\x0d{"bytes": 64}short',
    ],
)
def test_invalid_replies_raise_an_error(tmp_path, film, monkeypatch, answer):
    monkeypatch.setattr(sandbox, "_CHILD_CODE", f"import os; os.write(1, {answer!r})")
    with pytest.raises(MediaError, match="decoder crashed"):
        open_source(film(tmp_path / "a.mp4", count=2))


def test_text_of_a_child_does_not_enter_messages(tmp_path):
    path = tmp_path / "a.mp4"
    generic = sandbox.media_error(path, "video", "\x1b[31mpwned", {"seconds": "x"}).message
    assert generic == f"{path} cannot be read as a video."
    assert (
        sandbox.media_error(path, "video", "damaged", {"seconds": "{0.__class__}"}).message
        == generic
    )
    assert (
        sandbox.media_error(path, "video", "damaged", {"seconds": 1.5}).message
        == f"{path} is damaged near 1.50 s."
    )


def test_pipes_and_devices_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    for path in (tmp_path / "pipe.mp4", Path("/dev/zero")):
        with pytest.raises(MediaError, match="cannot be read as a video"):
            open_source(path)


def test_child_is_killed_with_its_source(tmp_path, film):
    source = open_source(film(tmp_path / "a.mp4", count=2))
    process = source._child._process
    del source
    assert process.poll() is not None


def test_is_picture(tmp_path, film):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert is_picture(tmp_path / "a.png")
    assert not is_picture(film(tmp_path / "a.mkv", "ffv1", pixel_format="bgr0", count=1))
    with pytest.raises(MediaError, match="cannot be read"):
        is_picture(tmp_path / "none")


def test_mutants_give_frames_or_one_error(tmp_path):
    mutants = load("media_mutants")
    outcomes = set()
    for number, (suffix, content) in enumerate(mutants.mutants(21, seed=1)):
        path = tmp_path / f"{number}{suffix}"
        path.write_bytes(content)
        outcomes.add(mutants.read(path))
    assert len(outcomes) > 2, "some are read, others fail for several reasons"


def test_bombs_are_refused_in_little_memory():
    run = subprocess.run(
        [sys.executable, BENCH / "media_bombs.py"], capture_output=True, text=True, check=True
    )
    files, wire = map(json.loads, run.stdout.splitlines())
    assert files["bombs"] + wire["bombs"] >= 40
    assert not files["not_refused"] + wire["not_refused"]
    assert max(files["largest_child_mib"], wire["server_mib"]) <= 512
