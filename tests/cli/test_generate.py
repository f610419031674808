"""`skyloom generate`: a file, a seed, a line of JSON; refusals leave nothing behind."""

import errno
import json
from dataclasses import replace
from typing import NamedTuple

import pytest
from PIL import Image
from random_lora import write_lora

from skyloom.cli.generate import free_name
from skyloom.evaluate import window_quality as critic
from skyloom.generate.pipeline import load
from skyloom.media.read import read_image
from skyloom.media.source import open_source


@pytest.fixture
def make(skyloom, tiny_model):
    """`skyloom generate` with the tiny model."""
    return lambda *words: skyloom("generate", *words, "--model", tiny_model)


def test_the_file_is_named_after_the_prompt_and_none_is_overwritten(make, tmp_path):
    names = [make("A cat, on the Beach!", "--seconds", 0.25).out.strip() for _ in range(3)]
    assert names == [
        "a-cat-on-the-beach.mp4",
        "a-cat-on-the-beach-2.mp4",
        "a-cat-on-the-beach-3.mp4",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert open_source(tmp_path / names[0]).receipt["request"]["prompt"] == "A cat, on the Beach!"


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("caf\u00e9 \u00c9t\u00e9", "cafe-ete.mp4"),
        ("\u732b", "video.mp4"),
        ("../../x", "x.mp4"),
        ("a" * 99, "a" * 60 + ".mp4"),
    ],
)
def test_names_are_plain(tmp_path, prompt, name):
    assert free_name(prompt, tmp_path).name == name


def test_a_drawn_seed_is_printed_and_makes_the_same_video_again(make):
    first = make("a cat", "--seconds", 0.25, "-o", "one.gif")
    seed = first.err.split("seed ")[1].split()[0]
    second = make("a cat", "--seconds", 0.25, "-o", "two.gif", "--seed", seed)
    assert "seed" not in second.err
    assert (open_source("one.gif").read() == open_source("two.gif").read()).all()


def test_json_tells_everything_in_one_line(make):
    words = [
        "--seconds",
        0.25,
        "--seed",
        5,
        "--steps",
        1,
        "--guidance",
        1.5,
        "--negative",
        "dog",
        "--fps",
        8,
    ]
    ran = make("a cat", "-o", "x.webm", "--json", "--size", "64x32", *words)
    result = json.loads(ran.out)
    assert ran.out.count("\n") == 1
    assert result["file"] == "x.webm"
    assert result["request"] == {
        "prompt": "a cat",
        "model": "tiny",
        "seconds": 0.25,
        "size": "64x32",
        "fps": 8.0,
        "seed": 5,
        "num_steps": 1,
        "guidance_scale": 1.5,
        "negative_prompt": "dog",
        "quality": "best",
    }
    found = open_source("x.webm")
    assert (found.width, found.height, found.fps) == (64, 32, 8)
    assert "one in 2 is kept" in ran.err
    for phase in ("text", "denoise", "decode"):
        assert phase in ran.err


def test_a_long_video_is_written_as_it_is_made(make, tmp_path):
    assert make("a cat", "--seconds", 3, "-o", "x.mp4").code == 0
    assert open_source(tmp_path / "x.mp4").receipt["request"]["seconds"] == 3
    assert open_source(tmp_path / "x.mp4").frames == 49
    assert [path.name for path in tmp_path.iterdir()] == ["x.mp4"]


def test_a_stopped_video_goes_on_with_its_own_seed(make, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("skyloom.media.write._remux", stop)
        assert make("a cat", "--seconds", 2, "-o", "x.mp4", "--resume-dir", "kept").code != 0
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    again = make("a cat", "--seconds", 2, "-o", "x.mp4", "--resume-dir", "kept")
    assert again.code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["x.mp4"]


def test_the_preview_is_a_picture(make, tmp_path):
    assert make("a cat", "--seconds", 0.25, "--preview", "p.png", "-o", "x.gif").code == 0
    assert read_image(tmp_path / "p.png").shape == (1, 32, 32, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.png", "x.gif"]


def test_a_picture_to_start_from(make):
    Image.new("RGB", (50, 40), "red").save("first.png")
    assert make("a cat", "--seconds", 0.25, "--image", "first.png", "-o", "x.mp4").code == 0
    assert open_source("x.mp4").receipt["request"]["image"] == "first.png"


def test_consent_for_a_picture_is_required_by_policy_and_recorded(make, skyloom, policy):
    make("a", "--seconds", 0.25, "--preview", "first.png", "-o", "a.mp4")
    policy("consent = true")
    words = ("a cat", "--seconds", 0.25, "--image", "first.png", "-o", "x.mp4")
    refused = make(*words)
    assert refused.code == 2
    assert "consent must name who is shown" in refused.err
    assert make(*words, "--consent", "Ada").code == 2
    made = make(*words, "--consent", "who=Ada", "--consent", "expiry=2999-12-31")
    assert made.code == 0
    assert open_source("x.mp4").receipt["request"]["consent"] == {
        "who": "Ada",
        "expiry": "2999-12-31",
    }
    assert "who Ada, expiry 2999-12-31" in skyloom("show", "x.mp4").out


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["  "], 2, "prompt must not be empty."),
        (["x" * 10_000], 2, "prompt must be at most 2,000 characters, got 10,000."),
        (["a", "--size", "33x32"], 2, "The nearest size is 32x32"),
        (["a", "--seconds", 3601], 2, "seconds must be > 0 and <= 3600, got 3601."),
        (["a", "--quality", "fine"], 2, "quality must be one of fast, best for tiny, got 'fine'."),
        (["a", "--play", "x.mp4"], 2, "--play must be -, got x.mp4."),
        (["a", "--fps", 30], 2, "fps must be one of 16, 8, 4, 2, 1 for tiny, got 30."),
        (["a", "--seed", -1], 2, "seed must be from 0 to 2^63 - 1, got -1."),
        (["a", "--device", "abacus"], 2, "must be cpu, cuda, cuda:N or mps"),
        (["a", "-o", "x.avi"], 2, "got 'x.avi'."),
        (["a", "-o", "none/x.mp4"], 1, "The folder none does not exist."),
        (["a", "--preview", "none/x.png"], 1, "The folder none does not exist."),
        (["a", "--preview", "x.jpg"], 2, "must end in .png"),
        (["a", "--image", "none.png"], 1, "The picture none.png does not exist."),
    ],
)
def test_what_cannot_be_made_is_refused_in_a_sentence(make, tmp_path, words, code, said):
    ran = make(*words)
    assert (ran.code, ran.out) == (code, "")
    assert said in ran.err
    assert "Traceback" not in ran.err
    assert ran.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_unknown_models_are_refused(skyloom):
    ran = skyloom("generate", "a cat", "--model", "no-such-model")
    assert ran.code == 2
    assert "Model 'no-such-model' is not installed." in ran.err


def test_damaged_weights_are_named(skyloom, tiny_model, tmp_path):
    for path in tiny_model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "dit.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    ran = skyloom("generate", "a cat", "--model", tmp_path)
    assert ran.code == 1
    assert "dit.safetensors is corrupt" in ran.err
    assert not list(tmp_path.glob("*.mp4"))


def test_a_disk_that_fills_up_leaves_no_half_file(make, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("skyloom.media.write._remux", fail)
    ran = make("a cat", "--seconds", 0.25)
    assert ran.code == 1
    assert "is full. Free some space and try again." in ran.err
    assert not list(tmp_path.iterdir())


def test_retakes_are_reported_and_replayed(make, skyloom, tiny_model, tmp_path, monkeypatch):
    """Tighter bounds make sure that some windows of the tiny model are sampled again."""
    strict = critic.Bounds(seam=0.1, identity=0.001)
    words = ["--seconds", 1.5, "--seed", 3, "--json", "--resume-dir", tmp_path / "kept"]
    with monkeypatch.context() as patched:
        patched.setattr(critic, "Bounds", lambda **given: replace(strict, **given))
        ran = make("a cat", "-o", "x.mp4", "--retake", 2, *words)
    result = json.loads(ran.out)
    assert result["request"]["retakes"] == 2
    notes = result["notes"]["critic"]
    assert notes["bounds"]["seam"] == 0.1
    assert [one["window"] for one in notes["windows"]] == [0, 1]
    assert [len(one["takes"]) for one in notes["windows"]] == [1, 3]
    assert not (tmp_path / "kept").exists()
    shown = skyloom("show", "x.mp4").out
    assert "retakes    2" in shown
    assert "2 windows, sampled again: 1" in shown
    again = json.loads(
        skyloom("replay", "x.mp4", "-o", "y.mp4", "--model", tiny_model, "--json").out
    )
    assert again["exact"] is True


def test_loras_are_shown_and_replayed(make, skyloom, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("SKYLOOM_DATA", str(tmp_path / "data"))
    (tmp_path / "data/loras").mkdir(parents=True)
    pipeline = load(str(tiny_model), device="cpu")
    write_lora(tmp_path / "data/loras/felt.safetensors", pipeline)
    write_lora(tmp_path / "ink.safetensors", pipeline)
    words = ["--seconds", 0.25, "--seed", 3]
    loras = ["--lora", "felt:0.5", "--lora", "ink.safetensors"]
    assert make("a cat", "-o", "plain.mkv", *words).code == 0
    ran = make("a cat", "-o", "x.mkv", *words, *loras)
    assert ran.code == 0, ran.err
    assert (open_source("plain.mkv").read() != open_source("x.mkv").read()).any()
    assert "lora       felt, weight 0.5, sha256 " in skyloom("show", "x.mkv").out
    replay = ["replay", "x.mkv", "-o", "y.mkv", "--model", tiny_model, "--json"]
    assert json.loads(skyloom(*replay).out)["exact"] is True
    (tmp_path / "ink.safetensors").unlink()
    missing = skyloom(*replay)
    assert missing.code != 0
    assert "loras must name files that exist, got 'ink.safetensors'" in missing.err


def test_edits_and_storyboards_take_loras(make, skyloom, tiny_model, tmp_path):
    lora = write_lora(tmp_path / "felt.safetensors", load(str(tiny_model), device="cpu"))
    (tmp_path / "cards.toml").write_text('[[cards]]\nat = 0\nprompt = "a cat"\n')
    options = ["--seed", 3, "--lora", f"{lora}:2", "--model", tiny_model, "--json"]
    assert make("a cat", "-o", "a.mkv", "--seconds", 0.5).code == 0
    for words in (
        ["edit", "extend", "a.mkv", "a dog", "--seconds", "0.25", "-o", "b.mkv"],
        ["storyboard", "cards.toml", "--seconds", 0.25, "-o", "c.mkv"],
    ):
        ran = skyloom(*words, *options)
        assert ran.code == 0, ran.err
        result = json.loads(ran.out)
        assert [one["weight"] for one in result["loras"]] == [2.0]
        assert result["request"]["loras"] == [{"name": str(lora), "weight": 2.0}]
    refused = skyloom("edit", "upscale", "a.mkv", "--size", "64x64", *options[2:])
    assert "loras must be left out for upscale, which uses no model." in refused.err


def test_without_retakes_there_is_no_critic(make):
    result = json.loads(make("a cat", "-o", "x.mp4", "--seconds", 1.5, "--seed", 3, "--json").out)
    assert "retakes" not in result["request"]
    assert set(result["notes"]) == {"schedule"}


@pytest.mark.parametrize("number", [0, -1, 21])
def test_retakes_out_of_range_are_refused(make, tmp_path, number):
    ran = make("a cat", "--retake", number)
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert f"retakes must be from 1 to 20, got {number}." in ran.err
    assert not list(tmp_path.iterdir())


def test_a_folder_to_resume_from_must_have_room(make, tmp_path, monkeypatch):
    class Usage(NamedTuple):
        free: int

    room = {tmp_path: 2**40, tmp_path / "small": 1000}
    (tmp_path / "small").mkdir()
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(room[path]))
    ran = make("a cat", "--seconds", 9, "-o", "x.mp4", "--resume-dir", "small/a/b")
    assert (ran.code, ran.err.count("\n")) == (1, 1)
    # 38 latent frames of 4 channels and 2 x 2 cells; the last window has one more
    assert "small/a/b must be at least 2 KiB, got 1 KiB" in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    assert make("a cat", "--seconds", 1, "-o", "x.mp4", "--resume-dir", "small/a/b").code == 0


def test_a_file_is_signed_unless_disabled(make, skyloom, tmp_path):
    assert make("a cat", "-o", "x.mp4").code == 0
    assert "intact, signed by this machine" in skyloom("verify", "x.mp4").out
    assert make("a cat", "--no-credentials", "-o", "y.mp4").code == 0
    result = skyloom("verify", "y.mp4").out
    assert "manifest   not found" in result
    assert "registry   by file: y.mp4" in result


def test_a_refused_prompt_costs_nothing_and_names_its_rule(make, tmp_path):
    ran = make("a naked child", "-o", "x.mp4")
    assert ran.code == 2
    assert "sexual-minors (characters 2 to 13)" in ran.err
    assert not (tmp_path / "x.mp4").exists()
