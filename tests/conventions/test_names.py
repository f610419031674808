"""What the package shows to the world, and that showing it costs nothing."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import skyloom

ROOT = Path(__file__).parents[2]
PUBLIC = ["Audio", "Pipeline", "Request", "Video", "__version__", "load"]
HEAVY = {
    "torch",
    "numpy",
    "av",
    "PIL",
    "einops",
    "jaxtyping",
    "safetensors",
    "transformers",
    "diffusers",
    "beartype",
}
HEAVY |= {"c2pa", "cryptography"}


def modules_after(statement: str) -> set[str]:
    """Run a statement in a new interpreter and return the names of its top-level modules."""
    probe = (
        f"{statement}\nimport sys\n"
        "sys.stderr.write(' '.join({name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_public_names_are_pinned():
    assert skyloom.__all__ == sorted(skyloom.__all__) == PUBLIC
    assert all(hasattr(skyloom, name) for name in PUBLIC)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = skyloom.no_such_name  # type: ignore[attr-defined]


def test_version_has_one_source_and_a_changelog_entry():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["hatch"]["version"]["path"] == "src/skyloom/core/version.py"
    assert f"## {skyloom.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_import_loads_nothing_heavy():
    assert not modules_after("import skyloom") & (HEAVY | {"typer", "rich"})


@pytest.mark.parametrize(
    "verbs", ["", "generate", "train run", "data encode", "world", "evaluate", "verify"]
)
def test_help_loads_nothing_heavy(verbs: str):
    arguments = ["skyloom", *verbs.split(), "--help"]
    run = "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code"
    assert (
        not modules_after(
            f"import sys\nfrom skyloom.cli.app import main\nsys.argv = {arguments}\n{run}"
        )
        & HEAVY
    )
