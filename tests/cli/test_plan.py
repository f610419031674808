"""`skyloom plan`: the cost of `skyloom generate`, without generating."""

import json
from dataclasses import replace

import pytest
import typer.main

from skyloom.cli.commands import app
from skyloom.generate import estimate, plan_summary
from skyloom.generate.estimate import Run, Workload, record_run
from skyloom.models.diorama import load as loader
from skyloom.models.memory import FreeMemory, ModelMemory, PartMemory, Weights


@pytest.fixture
def plan(skyloom, tiny_model, tmp_path, monkeypatch):
    """`skyloom plan` with the tiny model and no history."""
    monkeypatch.setenv("SKYLOOM_STATE", str(tmp_path / "state"))
    return lambda *words: skyloom("plan", *words, "--model", tiny_model, "--device", "cpu")


def test_it_takes_what_generate_takes():
    root = typer.main.get_command(app)
    here, there = (
        {option.name: option.help for option in root.get_command(None, verb).params}
        for verb in ("plan", "generate")
    )
    names = {
        "prompt",
        "seconds",
        "size",
        "fps",
        "seed",
        "steps",
        "guidance",
        "quality",
        "negative",
        "image",
        "model",
    }
    assert names < here.keys()
    assert {name: here[name] for name in names} == {name: there[name] for name in names}


def test_it_tells_people_and_programs_and_makes_nothing(plan, tmp_path):
    ran = plan("a cat", "--seconds", 3, "--steps", 1)
    assert ran.code == 0
    lines = dict(line.split(maxsplit=1) for line in ran.out.splitlines())
    assert lines["video"] == "49 frames of 32x32 at 16 fps, 3 s"
    assert lines["windows"].startswith("4 of 5 tokens")
    assert "a first guess" in lines["time"]
    result = json.loads(plan("a cat", "--seconds", 3, "--fps", 8, "--json").out)
    assert (result["frames"], result["kept_frames"], result["fps"]) == (49, 25, 8.0)
    assert result["estimate"]["first_guess"]
    assert list(tmp_path.iterdir()) == []


def test_it_learns(plan):
    result = json.loads(plan("a cat", "--json").out)["estimate"]
    work = Workload(**result["work"])
    record_run(Run(work, 1.0, 2.0, 3.0, 2**28))
    again = json.loads(plan("a cat", "--json").out)["estimate"]
    assert again["seconds"] == pytest.approx(6.0)
    assert again["runs"] == 1
    record_run(Run(replace(work, kind="other"), 9.0, 9.0, 9.0, 2**28))
    assert json.loads(plan("a cat", "--json").out)["estimate"] == again


def test_what_does_not_fit_is_refused(plan, monkeypatch):
    monkeypatch.setattr(estimate, "free_memory", lambda: 2**20)
    ran = plan("a cat")
    assert ran.code == 1
    assert "got 1 MiB" in ran.err
    assert ran.out.startswith("time")


def test_bad_requests_are_refused_as_by_generate(plan):
    for words, message in {
        ("",): "empty",
        ("a cat", "--size", "31x31"): "32x32",
        ("a cat", "--fps", 7): "got 7",
    }.items():
        ran = plan(*words)
        assert ran.code == 2
        assert message in ran.err


@pytest.mark.parametrize(("free", "code"), [(40, 0), (1, 1)])
def test_the_memory_of_a_large_model_is_shown_and_checked(plan, skyloom, monkeypatch, free, code):
    part = PartMemory(Weights(10**9), Weights(10**8), 5)
    memory = ModelMemory(
        parts={"text_encoder": part, "transformer": part, "autoencoder": part},
        text_bytes=0,
        condition_bytes=0,
        token_bytes=0,
        cached_token_bytes=0,
        decode_bytes=0,
        decoder_cache_bytes=0,
        encode_bytes=0,
        tile_pixels=1,
    )
    read = loader.read_network_cost
    monkeypatch.setattr(
        loader, "read_network_cost", lambda info: replace(read(info), memory=memory)
    )
    monkeypatch.setattr(
        plan_summary, "measure_free_memory", lambda _: FreeMemory(64 * 2**30, free * 2**30)
    )
    ran = plan("a cat")
    assert ran.code == code
    lines = [line for line in ran.out.splitlines() if line.startswith("memory   ")]
    assert lines[1].startswith("memory   text encoder: ")
    assert lines[-2].endswith(f" {free}.0 GiB free")
    assert ("GPU memory must be at least" in ran.err) == bool(code)
    values = json.loads(plan("a cat", "--json").out.splitlines()[0])
    assert values["memory"]["fits"] is not bool(code)
    info = skyloom("models", "info", "diorama")
    assert ("it does not fit" in info.err) == bool(code)
    assert "memory here: GPU" in info.err
    made = skyloom("generate", "a cat", "--plan", "--model", "diorama", "--device", "cpu")
    assert made.code == code
    assert made.out.splitlines()[-1].startswith("memory   host: ")
