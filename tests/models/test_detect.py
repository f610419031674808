"""Detection of models by the families' own functions."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from skyloom.core.errors import CheckpointError
from skyloom.models import registry
from skyloom.models.detect import DetectedModel, detect

FILE = Path("x.safetensors")


@pytest.fixture
def families(monkeypatch):
    """Adds families, each with a function that detects, or without one; there are no others."""
    for name in reversed(list(registry.FAMILIES)):  # restored in their order
        monkeypatch.delitem(registry.FAMILIES, name)

    def add(name: str, function=None) -> None:
        package = ModuleType(name)
        module = ModuleType(f"{name}.detect")
        if function is not None:
            module.detect = function
        monkeypatch.setitem(sys.modules, name, package)
        monkeypatch.setitem(sys.modules, f"{name}.detect", module)
        monkeypatch.setitem(registry.FAMILIES, name, name)

    return add


def test_the_first_family_that_knows_the_files_is_taken(families):
    found = DetectedModel("third", "large", {"transformer": (FILE,)}, {"fps": 24})
    families("first")
    families("second", lambda paths: None)
    assert detect([FILE]) is None
    families("third", lambda paths: found if paths == [FILE] else None)
    families("fourth", lambda paths: pytest.fail("asked"))
    assert detect([FILE]) is found


def test_a_family_refuses_a_variant(families):
    def refuse(paths):
        raise CheckpointError("VACE is not supported.")

    families("first", refuse)
    with pytest.raises(CheckpointError, match="VACE"):
        detect([FILE])


def test_a_fault_inside_a_detector_is_not_hidden(families, monkeypatch):
    def broken(family, name):
        raise ModuleNotFoundError("No module named 'gone'", name="gone")

    families("first")
    monkeypatch.setattr("skyloom.models.detect.family_module", broken)
    with pytest.raises(ModuleNotFoundError):
        detect([FILE])
