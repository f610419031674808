"""Frame moderation: picture rules survive re-encoding, classifiers block or fail closed."""

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
    """Set a policy with a picture rule for a file."""
    hashes = ", ".join(f'"{one}"' for one in perceptual_hashes(path))
    return policy(f'[[pictures]]\nname = "logo"\nmessage = "Not shown."\nlooks = [{hashes}]')


@pytest.fixture
def logo(scene, tmp_path):
    """A picture in a file."""
    path = tmp_path / "logo.png"
    Image.fromarray(scene(5, count=1, side=200)[0].numpy()).save(path)
    return path


def test_picture_rules_survive_resizing_compression_and_brightness(policy, logo, scene, tmp_path):
    blocking(policy, logo)
    moderator = load_frame_moderator()
    picture = Image.open(logo)
    picture.resize((90, 90)).save(tmp_path / "small.jpg", quality=40)
    picture.point(lambda value: min(255, value + 25)).save(tmp_path / "light.webp")
    for path in (logo, tmp_path / "small.jpg", tmp_path / "light.webp"):
        assert moderate_file(moderator, path).rule == "logo"
    for seed in range(6, 16):
        assert moderator.check(scene(seed, count=1)[0], 0).allowed


def test_videos_are_checked_once_a_second(policy, logo, scene, tmp_path):
    blocking(policy, logo)
    other, known = scene(6, count=1, side=200), scene(5, count=1, side=200)
    frames = torch.cat([other.expand(20, -1, -1, -1), known.expand(8, -1, -1, -1)])
    path = Video(frames, 8).save(tmp_path / "own.mp4")
    assert moderate_file(load_frame_moderator(), path).at == 3
    with pytest.raises(SafetyError, match=r"rule logo, for .*own.mp4 at 3 s: Not shown") as caught:
        check_files(load_frame_moderator(), [logo.with_name("own.mp4")])
    assert (caught.value.rule, caught.value.at, caught.value.target) == ("logo", 3, "input")
    stream = StreamModerator(load_frame_moderator(), 8)
    stream.check(frames[:13])
    with pytest.raises(SafetyError, match="the video at 3 s") as caught:
        stream.check(frames[13:])
    assert caught.value.target == "output"


def test_a_flat_picture_cannot_be_blocked(tmp_path):
    Image.new("RGB", (64, 64), "black").save(tmp_path / "black.png")
    with pytest.raises(MediaError, match="enough contrast"):
        perceptual_hashes(tmp_path / "black.png")


def test_policy_without_frame_rules_has_no_moderator():
    assert load_frame_moderator(load_policy(None)) is None


def test_classifiers_get_a_copy_of_one_frame_a_second(classifier):
    frames = torch.full((33, 8, 8, 3), 7, dtype=torch.uint8)
    classifier.allowed = 2
    stream = StreamModerator(load_frame_moderator(), 16)
    for start in range(0, 32, 5):
        stream.check(frames[start : min(start + 5, 32)])
    classifier.seen[0][:] = 0
    assert int(frames.min()) == 7
    assert [(one.shape, one.dtype) for one in classifier.seen] == [((1, 8, 8, 3), "uint8")] * 2
    with pytest.raises(SafetyError, match="at 2 s"):
        stream.check(frames[32:])


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("raise ValueError('secret')", r"failed \(ValueError\)"),
        ("return 0.1", "returned no scores"),
        ("return {}", "returned no score in \\[0, 1\\] for 'bad'"),
        ("return {'bad': float('nan')}", "returned no score in \\[0, 1\\]"),
        ("return {'bad': 7}", "returned no score in \\[0, 1\\]"),
        ("return {'bad': 'low'}", "returned no score in \\[0, 1\\]"),
    ],
)
def test_failing_classifiers_fail_closed(classifier, monkeypatch, body, what):
    space: dict = {}
    exec(f"def classify(frames):\n    {body}", space)
    monkeypatch.setattr(classifier, "classify", space["classify"])
    with pytest.raises(UncheckedError, match=f"the classifier own {what}") as caught:
        StreamModerator(load_frame_moderator(), 1).check(torch.zeros(1, 8, 8, 3, dtype=torch.uint8))
    assert "secret" not in str(caught.value)
    assert (caught.value.code, caught.value.rule) == ("unchecked", "own")


def test_classifiers_get_large_frames_at_a_bounded_size(classifier):
    moderator = load_frame_moderator()
    frame = torch.zeros(704, 1280, 3, dtype=torch.uint8)
    frame[:, 640:] = 200
    moderator.check(frame, 0)
    assert classifier.seen[-1].shape == (1, 282, 512, 3)
    assert (classifier.seen[-1][0, :, 256:] == 200).all()
    assert (classifier.seen[-1][0, :, :256] == 0).all()


@pytest.mark.parametrize(
    "call", ["no_such_package_anywhere:classify", "json:no_such_function", "math:pi"]
)
def test_missing_classifiers_fail_on_load(policy, call):
    policy(
        f'[[classifiers]]\nname = "own"\ncall = "{call}"\nmessage = "x"\n'
        "thresholds = { bad = 0.5 }"
    )
    with pytest.raises(UncheckedError, match="the classifier own"):
        load_frame_moderator()


def test_thresholds_are_inclusive(classifier, monkeypatch):
    frame = torch.zeros(8, 8, 3, dtype=torch.uint8)
    for score, allowed in ((0.49, True), (0.5, False), (1, False)):
        monkeypatch.setattr(
            classifier, "classify", lambda _, score=score: {"bad": score, "other": 1.0}
        )
        assert load_frame_moderator().check(frame, 0).allowed is allowed
