"""`skyloom edit`, `styles` and `show --tree`, on files that the tiny model made."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import typer.main

from skyloom.cli.edit import SharedOptions, app
from skyloom.generate import edit_sources
from skyloom.generate.denoiser import Denoiser
from skyloom.generate.edit_verbs import EDIT_VERBS
from skyloom.media.source import open_source
from skyloom.media.write import write_video


@pytest.fixture
def source(tmp_path):
    """A second of frames that all differ."""
    frames = (torch.arange(16).reshape(-1, 1, 1, 1) * 9).expand(16, 32, 32, 3).to(torch.uint8)
    return write_video(frames, 16, tmp_path / "a.mkv")


def test_an_edit_of_an_edit_is_shown_with_its_whole_tree(skyloom, tiny_model, source):
    how = ("--model", tiny_model, "--steps", 1, "--seed", 3, "--json")
    ran = skyloom("edit", "extend", source, "a red cat", "--seconds", "0.25", "-o", "b.mkv", *how)
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["notes"]["spans"] == [[0, 16, "kept"], [16, 20, "generated"]]
    assert torch.equal(open_source("b.mkv").read(0, 16), open_source(source).read())
    cut = (
        "edit",
        "stitch",
        "b.mkv",
        source,
        "--morph",
        "0",
        "-o",
        "c.mkv",
        "--model",
        tiny_model,
        "--json",
    )
    for option in (
        ("--seed", 3),
        ("--steps", 1),
        ("--guidance", 2),
        ("--quality", "best"),
        ("--negative", "fog"),
    ):
        refused = skyloom(*cut, *option)
        assert refused.code == 2
        assert "must be left out for a hard cut" in refused.err
    ran = skyloom(*cut)
    assert (ran.code, "seed" in ran.err) == (0, False), ran.err
    lines = skyloom("show", "--tree", "c.mkv").out.splitlines()
    assert [line.split("  video")[0] for line in lines[1:]] == [
        "├─ b.mkv",
        "│  └─ a.mkv",
        "└─ a.mkv",
    ]
    assert lines[1].endswith(': extend "a red cat"')
    assert "edit       stitch of b.mkv and" in skyloom("show", "c.mkv").out
    source.unlink()
    assert "not found" in skyloom("show", "--tree", "c.mkv").out


def test_a_plan_shows_spans_and_makes_nothing(skyloom, tiny_model, source, tmp_path):
    before = sorted(tmp_path.iterdir())
    result = skyloom(
        "edit",
        "retake",
        source,
        "a cat",
        "--from",
        "0.5",
        "--model",
        tiny_model,
        "--plan",
        "--json",
    )
    spans = json.loads(result.out)["spans"]
    assert [(span["kind"], span["first_frame"], span["frames"]) for span in spans] == [
        ("kept", 0, 8),
        ("generated", 8, 8),
    ]
    assert sorted(tmp_path.iterdir()) == before


def test_styles_are_listed_and_found(skyloom, tmp_path, source):
    (tmp_path / "own.toml").write_text('stormy = "in the rain at night"\n')
    assert "stormy" in skyloom("styles", "--file", "own.toml").out
    assert skyloom("edit", "restyle", source, "--style", "no such style").code == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("remix", "none.mp4", "a cat"), "none.mp4"),
        (("remix", "a.mkv", "a cat", "--strength", "wild"), "got 'wild'"),
        (("retake", "a.mkv", "--from", "3"), "start must be <"),
        (("inpaint", "a.mkv", "a cat"), "region or mask must be given"),
        (("recut", "a.mkv", "--keep", "x-y", "--seconds", "2"), "start must be a time in seconds"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(skyloom, source, words, message):
    ran = skyloom("edit", *words)
    assert ran.code in {1, 2}
    assert message in ran.err
    assert "Traceback" not in ran.err


def test_a_stopped_edit_goes_on_where_it_was_with_its_seed(
    skyloom, tiny_model, source, monkeypatch
):
    """Every verb resumes from a folder, with the seed drawn in the interrupted run."""
    calls, velocity = [], Denoiser.velocity

    def stopping(*given):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(1)
        return velocity(*given)

    monkeypatch.setattr(Denoiser, "velocity", stopping)
    words = (
        "edit",
        "extend",
        source,
        "a red cat",
        "--seconds",
        "0.25",
        "--model",
        tiny_model,
        "--steps",
        2,
    )
    kept = ("--resume-dir", "kept", "-o", "b.mkv", "--json")
    assert skyloom(*words, *kept).code != 0
    (state,) = Path("kept").glob("span-000/step-*.state")
    monkeypatch.setattr(Denoiser, "velocity", lambda *given: calls.append(1) or velocity(*given))
    ran = skyloom(*words, *kept)
    assert ran.code == 0, ran.err
    assert len(calls) == 2
    assert not state.exists()
    assert not Path("kept").exists()
    result = json.loads(ran.out)
    monkeypatch.setenv("SKYLOOM_CACHE", "off")
    again = skyloom(*words, "--seed", result["request"]["seed"], "-o", "c.mkv", "--json")
    assert json.loads(again.out)["frames"] == result["frames"]


def test_a_source_is_opened_once(skyloom, tiny_model, source, monkeypatch):
    opened = []
    monkeypatch.setattr(
        edit_sources,
        "open_source",
        lambda *given, **how: opened.append(given) or open_source(*given, **how),
    )
    how = ("--model", tiny_model, "--steps", 1, "-o", "b.mkv")
    assert skyloom("edit", "stitch", source, source, "--morph", "0.25", *how).code == 0
    assert len(opened) == 2


def test_every_verb_has_a_command_with_its_fields():
    commands = typer.main.get_command(app).commands
    assert set(commands) == {*EDIT_VERBS, "animate"}
    shared = {field.name for field in fields(SharedOptions)}
    renamed = {"recut": {"keep": ("start", "stop")}}
    extra = {"restyle": {"styles"}}
    for name, verb in EDIT_VERBS.items():
        options = {one.name for one in commands[name].params if one.opts[0].startswith("-")}
        own = options - shared - extra.get(name, set()) - {"prompt"}
        found = [part for one in own for part in renamed.get(name, {}).get(one, (one,))]
        assert sorted(found) == sorted(verb.field_names), name
