"""Repository content: licences, file sizes, no pickles, pinned dependencies with a reason each."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE_BYTES, TOTAL_BYTES = 16 * 2**20, 60 * 2**20
PICKLES = {".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin"}
GENERATED = {".mp4", ".webm", ".gif", ".whl", ".pyc"}


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """Files under version control."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).exists()]


def project() -> dict:
    """The project table of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def package(requirement: str) -> str:
    """The normalised name in a requirement."""
    return re.split(r"[<>=!~\[; ]", requirement)[0].lower().replace("_", "-")


def test_licence_and_notice_are_there_and_shipped():
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert project()["license"] == "Apache-2.0"
    assert {"LICENSE", "NOTICE"} <= set(project()["license-files"])
    assert all((ROOT / name).stat().st_size for name in project()["license-files"])


def test_files_are_small(tracked: list[Path]):
    sizes = {path.relative_to(ROOT).as_posix(): path.stat().st_size for path in tracked}
    assert not {name: size for name, size in sizes.items() if size >= FILE_BYTES}
    assert sum(sizes.values()) < TOTAL_BYTES


def test_nothing_executable_or_generated_is_tracked(tracked: list[Path]):
    shown = ROOT / "docs/images/gallery"
    assert not [
        path for path in tracked if path.suffix in PICKLES | GENERATED and path.parent != shown
    ]
    assert {path.suffix for path in tracked if path.parent == shown} <= {".gif"}


def test_package_data_stands_where_the_wheel_takes_it(tracked: list[Path]):
    assert ROOT / "projects/diorama/src/diorama/world/nouns.toml" in tracked
    assert any(
        path.parts[-3:-2] == ("bundled",) and path.suffix == ".safetensors" for path in tracked
    )


def test_runtime_dependencies_have_their_reasons():
    block = (
        (ROOT / "pyproject.toml")
        .read_text(encoding="utf-8")
        .split("dependencies = [")[1]
        .split("\n]")[0]
    )
    lines = [line for line in block.splitlines() if line.strip()]
    assert len(lines) == len(project()["dependencies"])
    assert not [line for line in lines if not re.search(r'",\s+# \w+', line)]


def test_every_dependency_is_pinned():
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert pins == sorted(pins, key=lambda pin: pin.lower().split("=="))
    assert not [pin for pin in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", pin)]
    wanted = project()["dependencies"] + [
        name for extra in project()["optional-dependencies"].values() for name in extra
    ]
    assert not {package(name) for name in wanted} - {package(pin) for pin in pins}
