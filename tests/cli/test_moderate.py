"""`skyloom moderate`; no verb writes a file that the policy blocks."""

import json

import pytest
import torch
from PIL import Image

from skyloom.media.write import write_video


@pytest.fixture
def pictures(tmp_path):
    """Write two pictures, one of them in a folder with a text file."""
    noise = torch.randint(
        0, 255, (2, 8, 8, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )
    (tmp_path / "known").mkdir()
    (tmp_path / "known/note.txt").write_text("no picture")
    for name, picture in zip(("known/logo.png", "other.png"), noise, strict=True):
        Image.fromarray(picture.numpy()).resize((96, 64), Image.Resampling.BICUBIC).save(
            tmp_path / name
        )
    return tmp_path


def test_a_printed_rule_blocks_the_picture_in_any_file_format(skyloom, pictures, policy):
    printed = skyloom("moderate", "known", "--rule", "logo", "--message", 'No "logo".')
    assert printed.code == 0, printed.err
    policy(printed.out)
    Image.open("known/logo.png").save("copy.jpg", quality=60)
    ran = skyloom("moderate", "other.png", "copy.jpg")
    assert (ran.code, ran.out.splitlines()) == (
        1,
        ["allowed  other.png", "refused  copy.jpg: logo at 0 s"],
    )
    result = json.loads(skyloom("moderate", "copy.jpg", "--json").out)
    assert (result["allowed"], result["rule"], result["message"]) == (False, "logo", 'No "logo".')
    assert skyloom("moderate", "other.png").code == 0


def test_policy_without_frame_rules_prints_a_note(skyloom, pictures):
    ran = skyloom("moderate", "other.png")
    assert (ran.code, ran.out) == (0, "allowed  other.png\n")
    assert "nothing is checked" in ran.err
    (pictures / "empty").mkdir()
    assert skyloom("moderate", "empty").code == 2


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "a cat", "--preview", "p.png", "--resume-dir", "state"),
        ("storyboard", "board.toml"),
        ("edit", "extend", "a.mkv", "a cat", "--seconds", "0.5"),
        ("edit", "animate", "picture.png", "a cat"),
    ],
)
def test_no_verb_writes_blocked_video(skyloom, tiny_model, classifier, tmp_path, words):
    frames = (torch.arange(16).reshape(-1, 1, 1, 1) * 9).expand(16, 32, 32, 3).to(torch.uint8)
    write_video(frames, 16, tmp_path / "a.mkv")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "picture.png")
    (tmp_path / "board.toml").write_text('[[card]]\nat = 0\nprompt = "a cat"\n')
    before = sorted(tmp_path.iterdir())
    more = "--seed" if words[0] == "edit" else "--seconds"
    for allowed in (0, 1):  # edits check their sources first
        classifier.seen.clear()
        classifier.allowed = allowed
        ran = skyloom(*words, "-o", "out.mp4", "--model", tiny_model, more, 2)
        assert ran.code == 2, ran.err
        assert "Refused by the rule own" in ran.err
        assert sorted(tmp_path.iterdir()) == before


def test_missing_classifier_generates_nothing(skyloom, tiny_model, policy, tmp_path):
    policy(
        '[[classifiers]]\nname = "own"\ncall = "no_such_thing:x"\nthresholds = { a = 1 }\n'
        'message = "x"'
    )
    ran = skyloom("generate", "a cat", "-o", "out.mp4", "--model", tiny_model)
    assert (ran.code, list(tmp_path.iterdir())) == (2, [])
    assert "the classifier own cannot be loaded" in ran.err


def test_missing_file_is_an_error(skyloom, tmp_path):
    ran = skyloom("moderate", "nope.png")
    assert ran.code != 0
    assert ran.out == ""
    assert "nope.png does not exist" in ran.err
