"""`skyloom show` and `skyloom replay`, on files that the tiny model made."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

import skyloom as package
from skyloom.generate.receipt import FramesHash, make_receipt, read_receipt
from skyloom.generate.request import Request
from skyloom.media.source import open_source
from skyloom.media.write import write_sidecar, write_video
from skyloom.models.checkpoint import write_manifest

ASK = Request("a red cat", seed=7, seconds=0.5, negative_prompt="a dog", num_steps=1)


@pytest.fixture(scope="module")
def made(tiny_model):
    """Frames of the tiny model, and their receipt."""
    pipeline = package.load(str(tiny_model), device="cpu", dtype="float32")
    video, taken = pipeline.generate(ASK), FramesHash(pipeline.plan(ASK).fps)
    taken.add(video.frames)
    dtype = torch.float32
    return video, make_receipt(
        pipeline.plan(ASK), pipeline.info, pipeline.device, dtype, taken.digest()
    )


@pytest.fixture
def file(made, tmp_path):
    """The video, in a file with its receipt."""
    video, receipt = made
    return write_video(video.frames, video.fps, tmp_path / "a.mp4", receipt.to_dict())


def test_a_receipt_is_shown_to_people_and_to_programs(skyloom, file, made):
    lines = dict(line.split(maxsplit=1) for line in skyloom("show", file).out.splitlines())
    receipt = made[1]
    assert (lines["prompt"], lines["seed"], lines["size"], lines["seconds"]) == (
        "a red cat",
        "7",
        "32x32",
        "0.5",
    )
    assert (lines["negative"], lines["steps"], lines["model"]) == ("a dog", "1", "tiny")
    assert (lines["weights"], lines["device"]) == (receipt.weights, "cpu float32")
    assert lines["frames"] == f"9, sha256 {receipt.frames.sha256}"
    assert json.loads(skyloom("show", file, "--json").out) == receipt.to_dict()


def test_a_foreign_receipt_cannot_steer_the_terminal(skyloom, file, made):
    hostile = replace(made[1], request=replace(ASK, prompt="a\x1b[2Jcat\nseed 9"))
    sidecar = write_sidecar(file, hostile.to_dict())
    assert skyloom("show", sidecar).out.splitlines()[0] == "prompt     a\\x1b[2Jcat\\nseed 9"


def test_the_cards_of_a_storyboard_are_shown(skyloom, file, made):
    cards = (
        {"at": "0", "prompt": "a cat", "image": "cat.png", "strength": 0.25},
        {"at": "1/8", "prompt": "a dog"},
        {"at": "0:00.25", "prompt": "a cow", "morph": "1/10", "video": "cow.mp4"},
        {"at": "0.5", "prompt": "a bird", "cut": True},
    )
    board = replace(made[1], request=replace(ASK, prompt="at night", cards=cards))
    lines = skyloom("show", write_sidecar(file, board.to_dict())).out.splitlines()
    assert lines[:5] == [
        "style      at night",
        "card       0 s, image cat.png, strength 0.25: a cat",
        "card       0.125 s, fade 0.5 s: a dog",
        "card       0.25 s, fade 0.1 s, video cow.mp4: a cow",
        "card       0.5 s, cut: a bird",
    ]


@pytest.mark.parametrize(
    ("notes", "lines"),
    [
        (
            {
                "spans": [[0, 4, "kept"], [4, 9, "generated"]],
                "prompts": [[0, 2, "a cat"], [2, 4, ""], [4, 9, "a dog"]],
            },
            [
                "span       0 to 0.125 s, frames 0 to 1, kept: a cat",
                "span       0.125 to 0.25 s, frames 2 to 3, kept",
                "span       0.25 to 0.5625 s, frames 4 to 8, generated: a dog",
            ],
        ),
        (
            {"spans": [[0, 4, "kept"], [4, 9, "made"]]},  # of version 0.1
            [
                "span       0 to 0.25 s, frames 0 to 3, kept",
                "span       0.25 to 0.5625 s, frames 4 to 8, generated",
            ],
        ),
        ({"spans": [[0, 4]]}, ["notes      spans: [[0, 4]]"]),
    ],
)
def test_the_spans_of_an_edit_are_shown_with_their_prompts(skyloom, file, made, notes, lines):
    sidecar = write_sidecar(file, replace(made[1], notes=notes).to_dict())
    assert skyloom("show", sidecar).out.splitlines()[-len(lines) :] == lines


@pytest.mark.parametrize("verb", ["show", "replay"])
def test_what_has_no_receipt_is_an_error(skyloom, file, made, tmp_path, verb):
    (tmp_path / "text.mp4").write_text("hello")
    (tmp_path / "cut.mp4").write_bytes(file.read_bytes()[:600])
    (tmp_path / "bad.mp4.receipt.json").write_text("{")
    write_video(made[0].frames, 8, tmp_path / "foreign.mp4")
    before = sorted(tmp_path.iterdir())
    for name, message in {
        "none.mp4": "does not exist",
        "text.mp4": "cannot be read as a video",
        "cut.mp4": "cannot be read as a video",
        "bad.mp4.receipt.json": "is not a skyloom receipt",
        "foreign.mp4": "holds no receipt",
    }.items():
        ran = skyloom(verb, name)
        assert ran.code == 1
        assert message in ran.err
        assert ran.err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_replay_makes_the_same_frames_and_proves_it(skyloom, file, tiny_model):
    ran = skyloom("replay", file, "--verify", "--model", tiny_model, "--json", "-o", "b.mp4")
    result = json.loads(ran.out)
    assert (ran.code, result["exact"], result["same"], result["file"]) == (0, True, True, "b.mp4")
    assert result["difference"]["mean"] == pytest.approx(result["codec"]["mean"], rel=0.01)
    assert open_source("b.mp4").frames == 9


def test_replay_of_a_model_in_a_folder_asks_for_the_folder(skyloom, file):
    refused = skyloom("replay", file)
    assert refused.code == 2
    assert "The receipt's model 'tiny' is not installed" in refused.err
    assert "--model FOLDER" in refused.err


def test_replay_names_its_file_and_overwrites_none(skyloom, file, tiny_model, tmp_path):
    names = [skyloom("replay", file, "--model", tiny_model).out.splitlines()[0] for _ in range(2)]
    assert names == ["a-again.mp4", "a-again-2.mp4"]
    before = sorted(tmp_path.iterdir())
    assert "exact: all frames" in skyloom("replay", file, "--model", tiny_model, "--verify").out
    assert sorted(tmp_path.iterdir()) == before


def test_a_video_with_anothers_receipt_is_found_out(skyloom, file, made, tiny_model):
    video, receipt = made
    write_video(255 - video.frames, video.fps, file, receipt.to_dict())
    ran = skyloom("replay", file, "--model", tiny_model, "--verify")
    assert ran.code == 1
    assert "exact: all frames" in ran.out
    assert "the file shows something else" in ran.out


def test_a_sidecar_is_as_good(skyloom, file, made, tiny_model):
    video, receipt = made
    sidecar = write_sidecar(write_video(video.frames, video.fps, file), receipt.to_dict())
    for name in (file, sidecar):
        assert json.loads(skyloom("replay", name, "--model", tiny_model, "--verify", "--json").out)[
            "same"
        ]
    assert read_receipt(file) == receipt


def test_other_weights_are_refused_unless_forced(skyloom, file, tiny_model, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(tiny_model, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    vae = folder / "vae.safetensors"
    content = bytearray(vae.read_bytes())
    content[-2] ^= 1
    vae.write_bytes(content)
    del manifest["files"]
    write_manifest(folder, manifest)
    refused = skyloom("replay", file, "--model", folder)
    assert refused.code == 1
    assert "The video was made with weights" in refused.err
    assert "--force" in refused.err
    assert not (tmp_path / "a-again.mp4").exists()
    assert skyloom("replay", file, "--model", folder, "--force").code == 0
    assert (tmp_path / "a-again.mp4").exists()


def test_a_bad_target_is_refused_before_any_work(skyloom, file, tiny_model):
    ran = skyloom("replay", file, "--model", tiny_model, "-o", "nowhere/b.mp4")
    assert ran.code == 1
    assert "does not exist" in ran.err
