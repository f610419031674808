"""Frames against the policy: known pictures however they are stored, classifiers that refuse, fail or lie."""

import pytest
import torch
from PIL import Image

from skyloom.core.errors import MediaError, SafetyError, UncheckedError
from skyloom.media.video import Video
from skyloom.safety.frame_moderation import (
    StreamModerator,
    check_files,
    load_frame_moderator,
    moderate_file,
    perceptual_hashes,
)
from skyloom.safety.moderation import load_policy


def blocking(policy, path) -> str:
    """A policy with a rule that knows a file."""
    looks = ", ".join(f'"{look}"' for look in perceptual_hashes(path))
    return policy(f'[[pictures]]\nname = "logo"\nmessage = "Not shown."\nlooks = [{looks}]')


@pytest.fixture
def logo(scene, tmp_path):
    """A picture in a file."""
    path = tmp_path / "logo.png"
    Image.fromarray(scene(5, count=1, side=200)[0].numpy()).save(path)
    return path


def test_a_known_picture_is_known_small_lossy_and_lighter_and_others_pass(
    policy, logo, scene, tmp_path
):
    blocking(policy, logo)
    judge, picture = load_frame_moderator(), Image.open(logo)
    picture.resize((90, 90)).save(tmp_path / "small.jpg", quality=40)
    picture.point(lambda value: min(255, value + 25)).save(tmp_path / "light.webp")
    for path in (logo, tmp_path / "small.jpg", tmp_path / "light.webp"):
        assert moderate_file(judge, path).rule == "logo"
    for seed in range(6, 16):
        assert judge.verdict(scene(seed, count=1)[0], 0).allowed


def test_a_video_is_looked_at_once_a_second_and_the_refusal_says_when(
    policy, logo, scene, tmp_path
):
    blocking(policy, logo)
    other, known = scene(6, count=1, side=200), scene(5, count=1, side=200)
    frames = torch.cat([other.expand(20, -1, -1, -1), known.expand(8, -1, -1, -1)])
    path = Video(frames, 8).save(tmp_path / "own.mp4")
    assert moderate_file(load_frame_moderator(), path).at == 3
    with pytest.raises(SafetyError, match=r"rule logo, for .*own.mp4 at 3 s: Not shown") as caught:
        check_files(load_frame_moderator(), [logo.with_name("own.mp4")])
    assert (caught.value.rule, caught.value.at, caught.value.target) == ("logo", 3, "input")
    watch = StreamModerator(load_frame_moderator(), 8)
    watch.check(frames[:13])
    with pytest.raises(SafetyError, match="the video at 3 s") as caught:
        watch.check(frames[13:])
    assert caught.value.target == "output"


def test_a_flat_picture_cannot_be_blocked(tmp_path):
    Image.new("RGB", (64, 64), "black").save(tmp_path / "black.png")
    with pytest.raises(MediaError, match="nothing that it could be known by"):
        perceptual_hashes(tmp_path / "black.png")


def test_without_rules_nobody_looks():
    assert load_frame_moderator(load_policy(None)) is None


def test_a_classifier_gets_frames_of_its_own_once_a_second(classifier):
    frames = torch.full((33, 8, 8, 3), 7, dtype=torch.uint8)
    classifier.allowed = 2
    watch = StreamModerator(load_frame_moderator(), 16)
    for start in range(0, 32, 5):
        watch.check(frames[start : min(start + 5, 32)])
    classifier.seen[0][:] = 0
    assert int(frames.min()) == 7
    assert [(one.shape, one.dtype) for one in classifier.seen] == [((1, 8, 8, 3), "uint8")] * 2
    with pytest.raises(SafetyError, match="at 2 s"):
        watch.check(frames[32:])


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("raise ValueError('secret')", r"failed \(ValueError\)"),
        ("return 0.1", "gave no scores"),
        ("return {}", "gave no score from 0 to 1 for 'bad'"),
        ("return {'bad': float('nan')}", "gave no score from 0 to 1"),
        ("return {'bad': 7}", "gave no score from 0 to 1"),
        ("return {'bad': 'low'}", "gave no score from 0 to 1"),
    ],
)
def test_a_classifier_that_fails_or_lies_is_a_refusal(classifier, monkeypatch, body, what):
    space: dict = {}
    exec(f"def classify(frames):\n    {body}", space)
    monkeypatch.setattr(classifier, "classify", space["classify"])
    with pytest.raises(UncheckedError, match=f"the classifier own {what}") as caught:
        StreamModerator(load_frame_moderator(), 1).check(torch.zeros(1, 8, 8, 3, dtype=torch.uint8))
    assert "secret" not in str(caught.value)
    assert (caught.value.code, caught.value.rule) == ("unchecked", "own")


@pytest.mark.parametrize(
    "call", ["no_such_package_anywhere:classify", "json:no_such_function", "math:pi"]
)
def test_a_classifier_that_is_not_there_is_a_refusal_before_any_work(policy, call):
    policy(
        f'[[classifiers]]\nname = "own"\ncall = "{call}"\nthresholds = {{ bad = 0.5 }}\nmessage = "x"'
    )
    with pytest.raises(UncheckedError, match="the classifier own"):
        load_frame_moderator()


def test_a_threshold_is_refused_from_there_on(classifier, monkeypatch):
    frame = torch.zeros(8, 8, 3, dtype=torch.uint8)
    for score, allowed in ((0.49, True), (0.5, False), (1, False)):
        monkeypatch.setattr(
            classifier, "classify", lambda _, score=score: {"bad": score, "other": 1.0}
        )
        assert load_frame_moderator().verdict(frame, 0).allowed is allowed
