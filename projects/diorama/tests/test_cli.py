"""The command line: the world is rendered, recipes run, and help loads nothing heavy."""

import json
import subprocess
import sys

import pytest

from diorama.world.assets import builtin_atlas
from skyloom.media.read import read_image
from skyloom.media.source import open_source


def test_the_world_is_shown(diorama, monkeypatch, tmp_path):
    monkeypatch.setattr("diorama.world.assets.load_atlas", lambda _: builtin_atlas())
    ran = diorama(
        "world", "render", "--vocabulary", "tiny", "--frames", 5, "--size", "64x64", "-o", "w.gif"
    )
    assert json.loads(ran.out)["captions"]["short"]
    assert (open_source(tmp_path / "w.gif").width, open_source(tmp_path / "w.gif").frames) == (
        64,
        5,
    )
    assert (
        diorama("world", "sheet", "--vocabulary", "tiny", "--count", 2, "-o", "s.png").out
        == "s.png\n"
    )
    assert read_image(tmp_path / "s.png").shape[1] == 128 + 16


def test_the_world_says_what_is_missing(diorama):
    ran = diorama("world", "render")
    assert ran.code == 2
    assert "diorama world assets" in ran.err
    assert diorama("world", "sheet", "-o", "none/s.png").code == 1


def test_clips_are_rendered_and_split_is_checked(diorama, monkeypatch, tmp_path):
    monkeypatch.setattr("diorama.clips.load_atlas", lambda _: builtin_atlas())
    words = ["data", "render", "clips", "--vocabulary", "tiny", "--count", 2, "--frames", 1]
    ran = diorama(*words, "--size", "32x32", "--processes", 1)
    assert "1 of 1 shards rendered" in ran.out
    assert (tmp_path / "clips" / "clips-00000.npy").exists()
    ran = diorama(*words, "--split", "some")
    assert ran.code == 2
    assert "split must be one of train, heldout, all, got 'some'." in ran.err


def test_a_recipe_with_two_setups_is_refused(diorama, tmp_path):
    (tmp_path / "r.toml").write_text("[loop]\n[optimizer]\n[flow]\n[decoder]\n")
    ran = diorama("train", "run", "r.toml", "--run", "run")
    assert ran.code == 2
    assert "must have exactly one of the tables" in ran.err
    assert "got decoder, flow." in ran.err


@pytest.mark.parametrize("verb", ["", "world sheet", "data render", "train run", "evaluate motion"])
def test_help_loads_nothing_heavy(verb: str):
    code = (
        "import sys\nfrom diorama.cli.app import main\n"
        f"try:\n    main({[*verb.split(), '--help']})\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "assert not {'torch', 'numpy', 'av'} & set(sys.modules)"
    )
    path = [path for path in sys.path if path]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\nsys.path[:0] = {path}\n{code}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
