"""The examples run as they stand, with the model in miniature."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("first_video", ["rocket.mp4"]),
        ("from_a_picture", ["penguin.mp4", "penguin.png"]),
        ("watch_and_stop", ["balloon.gif", "preview.png"]),
    ],
)
def test_an_example_leaves_its_files(name, files, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, str(tiny_model)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert sorted(path.name for path in tmp_path.iterdir()) == files
