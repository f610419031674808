"""The wheel: its files, its sizes, and the commands of an installation outside of the checkout."""

import json
import os
import re
import sqlite3
import subprocess
import sys
import sysconfig
import urllib.request
import zipfile
from contextlib import closing
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_FILE_BYTES = 16 * 2**20
MAX_WHEEL_BYTES = 60 * 2**20
DATA_FILES = {  # everything in the wheel that is not Python code; weights by their folder
    r"skyloom/bundled/[a-z0-9_]+/[\w.-]+\.(safetensors|json|txt)": range(5, 40),
    r"skyloom/(generate|safety)/\w+\.toml": range(1, 12),
    r"skyloom/hub/catalog\.json": range(1, 2),
    r"skyloom/serve/queue/migrations/\w+\.sql": range(2, 3),
    r"skyloom-[\d.]+\.dist-info/"
    r"(METADATA|WHEEL|RECORD|entry_points\.txt|licenses/(LICENSE|NOTICE))": range(6, 7),
}


@pytest.fixture(autouse=True)
def no_network():
    """Allow connections: this module talks to the server that it starts on the loopback."""


def build_wheel(folder: Path, out: Path) -> Path:
    """Build the wheel of a project without network."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout."""
    return build_wheel(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The `skyloom` command of a clean environment: the wheel, and the dependencies of this one."""
    folder = tmp_path_factory.mktemp("environment")
    environment = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    packages = Path(
        subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
    )
    # A path line in a .pth file adds the folder without running its own .pth files,
    # so the editable install of the checkout stays invisible.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps"]
    subprocess.run([*install, "--no-index", "--quiet", wheel], check=True, capture_output=True)
    return environment / "bin" / "skyloom"


@pytest.fixture
def run(installed, tmp_path):
    """Run the installed command in an empty folder, without the checkout's paths."""
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "SKYLOOM"))
    }
    for name in ("data", "state", "cache"):
        environment[f"SKYLOOM_{name.upper()}"] = str(tmp_path / name)

    def command(*words: object, **options) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [installed, *map(str, words)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            **options,
        )

    command.environment = environment
    return command


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    tracked = subprocess.run(
        ["git", "ls-files", "src/skyloom"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    expected = {name.removeprefix("src/") for name in tracked if (ROOT / name).exists()}
    assert {name for name in sizes if name.startswith("skyloom/")} >= expected
    assert {name.split("/")[0].split("-")[0] for name in sizes} == {"skyloom"}, "no diorama"
    others = {name for name in sizes if not name.endswith(".py")}
    for pattern, count in DATA_FILES.items():
        found = {name for name in others if re.fullmatch(pattern, name)}
        assert len(found) in count, (pattern, sorted(found))
        others -= found
    assert not others, "name the new kind of file in DATA_FILES"
    assert max(sizes.values()) <= MAX_FILE_BYTES
    assert wheel.stat().st_size <= MAX_WHEEL_BYTES


def test_the_diorama_is_a_wheel_of_its_own(tmp_path):
    with zipfile.ZipFile(build_wheel(ROOT / "projects" / "diorama", tmp_path)) as archive:
        names = archive.namelist()
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        text = archive.read(entry_points).decode()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"diorama"}
    assert "diorama/world/nouns.toml" in names
    assert "[skyloom.setups]\ndiorama = diorama.train.setups:register" in text


def test_the_wheel_generates_and_edits(run, tmp_path):
    shown = run("--version")
    assert shown.returncode == 0, shown.stderr
    made = run("generate", "a red car on the beach", "--seconds", "0.3", "--seed", 1, "-o", "a.mkv")
    assert made.returncode == 0, made.stderr
    edited = run("edit", "extend", "a.mkv", "--seconds", "0.3", "-o", "b.mp4")
    assert edited.returncode == 0, edited.stderr
    assert (tmp_path / "b.mp4").stat().st_size > 1000
    verdict = run("verify", "b.mp4", "--json")
    assert verdict.returncode == 0, verdict.stderr


def test_the_wheel_serves_and_migrates(run, installed, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    with closing(sqlite3.connect(data / "skyloom.db")) as database:
        database.executescript((ROOT / "tests/fixtures/v4/jobs_sqlite.sql").read_text())
    command = [installed, "serve", "--port", "0", "--no-worker", "--json", "--adopt-storage"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=run.environment, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        try:
            announced = json.loads(server.stdout.readline())
            request = urllib.request.Request(
                f"{announced['url']}/v1/videos",
                headers={"authorization": f"Bearer {announced['token']}"},
            )
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(request) as answer:
                listed = json.load(answer)
        finally:
            server.terminate()
    assert listed["object"] == "list"
    checked = run("doctor", "--check-db")
    assert checked.returncode == 0, checked.stdout + checked.stderr
