"""Going on after a stop: the same frames wherever it happened; other requests are refused, damage costs a window."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import skyloom
from skyloom.core.errors import RequestError
from skyloom.generate.request import Request
from skyloom.generate.resume import clear

LONG = Request("a red cat on the beach", seed=7, seconds=2.5)


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    return skyloom.load(str(tiny_model), dtype="bfloat16")


def frames_of(steps):
    return torch.cat([step.frames for step in steps if step.frames is not None])


def test_stopped_after_any_step_it_goes_on_to_the_same_frames(pipeline, tmp_path):
    whole = pipeline.generate(LONG)
    total = len(list(pipeline.stream(LONG)))
    for count in range(1, total + 1):
        folder = tmp_path / str(count)
        stream = pipeline.stream(LONG, resume=folder)
        for _ in range(count):
            next(stream)
        stream.close()
        again = list(pipeline.stream(LONG, resume=folder))
        assert torch.equal(frames_of(again), whole.frames)
        assert again[-1].receipt == whole.receipt
        assert len(again) <= total


def test_finished_windows_are_not_made_again(pipeline, tmp_path):
    list(pipeline.stream(LONG, resume=tmp_path / "a"))
    again = [step for step in pipeline.stream(LONG, resume=tmp_path / "a") if step.phase == "denoise"]
    assert len(again) == len(pipeline.plan(LONG).windows)


def test_another_request_is_refused_and_nothing_is_lost(pipeline, tmp_path):
    list(pipeline.stream(LONG, resume=tmp_path / "a"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    with pytest.raises(RequestError, match="holds another video"):
        pipeline.stream(replace(LONG, prompt="a dog"), resume=tmp_path / "a")
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("keep me")
    with pytest.raises(RequestError, match="holds other files"):
        pipeline.stream(LONG, resume=tmp_path / "b")


def test_a_damaged_window_is_made_again(pipeline, tmp_path):
    list(pipeline.stream(LONG, resume=tmp_path / "a"))
    hurt = sorted((tmp_path / "a").glob("window-*"))[1]
    hurt.write_bytes(hurt.read_bytes()[:-7])
    steps = list(pipeline.stream(LONG, resume=tmp_path / "a"))
    assert torch.equal(frames_of(steps), pipeline.generate(LONG).frames)


def test_clearing_leaves_what_others_put_there(tmp_path, pipeline):
    list(pipeline.stream(LONG, resume=tmp_path / "a"))
    (tmp_path / "a" / "mine.txt").write_text("keep me")
    clear(tmp_path / "a")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine.txt"]


KILLED = """
import os, signal, sys
from pathlib import Path
import skyloom
pipeline = skyloom.load(sys.argv[1], dtype="bfloat16")
stream = pipeline.stream("a red cat on the beach", seed=7, seconds=2.5, resume=Path(sys.argv[2]))
for number, step in enumerate(stream):
    if number == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("number", [0, 3, 6])
def test_killed_for_good_it_goes_on_to_the_same_frames(tiny_model, pipeline, tmp_path, number):
    words = [sys.executable, "-c", KILLED, str(tiny_model), str(tmp_path / "a"), str(number)]
    assert subprocess.run(words, check=False).returncode == -9
    steps = list(pipeline.stream(LONG, resume=tmp_path / "a"))
    assert torch.equal(frames_of(steps), pipeline.generate(LONG).frames)
