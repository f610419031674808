"""The table of docs/models.md is what the planner computes."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def script():
    place = importlib.util.spec_from_file_location(
        "write_memory_table", ROOT / "docs/write_memory_table.py"
    )
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    return module


def test_the_page_has_the_computed_table(script):
    page = (ROOT / "docs/models.md").read_text()
    assert script.table() in page, "run `make docs`"
    assert "Computed, not measured" in page


def test_more_memory_is_never_slower(script):
    for name in script.MODELS:
        made = list(script.plans(name, fp8=False).values())
        fitting = [plan for plan in made if plan.fits]
        assert len(fitting) >= 4
        tiles = [plan.rungs["autoencoder"] == "tiled" for plan in fitting]
        assert tiles == sorted(tiles, reverse=True)
        seconds = [plan.seconds for plan in fitting if plan.rungs["autoencoder"] != "tiled"]
        assert seconds == sorted(seconds, reverse=True)
        assert all(made.index(plan) >= len(made) - len(fitting) for plan in fitting)
