"""Moderation: source media before any work, generated frames as they are decoded."""

import pytest
from edit_examples import example_edit
from PIL import Image

from skyloom.core.errors import RequestError, SafetyError
from skyloom.core.paths import cache_folder
from skyloom.generate.edit_verbs import EDIT_VERBS
from skyloom.generate.pipeline import load
from skyloom.generate.receipt import Receipt
from skyloom.generate.request import Request
from skyloom.safety.consent import MediaConsent

WAYS = {
    "text": {},
    "picture": {"image": "IMAGE"},
    "storyboard": {"prompt": "", "cards": [{"at": "0", "prompt": "a cat", "image": "IMAGE"}]},
    **{verb: {"edit": example_edit(verb, "VIDEO", "VIDEO")} for verb in EDIT_VERBS},
}


@pytest.fixture(scope="module")
def media(tmp_path_factory, tiny_model):
    """A pipeline, and a picture and a video to start from."""
    folder, pipeline = tmp_path_factory.mktemp("media"), load(str(tiny_model), device="cpu")
    Image.new("RGB", (32, 32), "red").save(folder / "image.png")
    pipeline.generate("a cat", seed=1).save(folder / "video.mp4")
    return pipeline, {"IMAGE": str(folder / "image.png"), "VIDEO": str(folder / "video.mp4")}


def fill(value, media):
    """A way with files."""
    if isinstance(value, dict):
        return {key: fill(one, media) for key, one in value.items()}
    if isinstance(value, list):
        return [fill(one, media) for one in value]
    return media.get(value, value)


@pytest.mark.parametrize("way", WAYS)
def test_no_way_of_making_passes_by_the_policy(media, classifier, way):
    pipeline, files = media
    request = Request.from_dict({"prompt": "a cat", **fill(WAYS[way], files)}).with_seed()
    starts = [] if way == "text" else [0]
    classifier.allowed = sum(
        2 if path == files["VIDEO"] else 1 for path in request.media
    )  # a second and a bit
    taken = []
    with pytest.raises(SafetyError, match="rule own, for the video at 0 s") as caught:
        for step in pipeline.stream(request):
            taken += [step.frames] if step.frames is not None else []
    assert (taken, caught.value.target) == ([], "output")
    assert not list((cache_folder() / "spans").glob("*")), "nothing of it is kept"
    if starts:
        classifier.seen.clear()
        classifier.allowed = 0
        with pytest.raises(SafetyError, match="rule own") as caught:
            pipeline.stream(request)  # before the first step
        assert caught.value.target == "input"


def test_a_long_video_stops_in_the_second_that_is_refused_and_leaves_nothing(
    media, classifier, tmp_path
):
    classifier.allowed = 2
    steps, frames = [], 0
    with pytest.raises(SafetyError, match="the video at 2 s"):
        for step in media[0].stream(
            Request("a cat", seed=3, seconds=20), resume=tmp_path / "state"
        ):
            steps.append(step.phase)
            frames += 0 if step.frames is None else len(step.frames)
    assert 16 < frames <= 32
    assert steps.count("denoise") < 20
    assert not (tmp_path / "state").exists()


def test_a_policy_without_eyes_changes_no_frame_and_takes_none(media, classifier, monkeypatch):
    classifier.allowed = 100
    watched = media[0].generate("a cat", seed=4)
    monkeypatch.delenv("SKYLOOM_POLICY")
    assert media[0].generate("a cat", seed=4).receipt == watched.receipt
    assert len(classifier.seen) == 2


@pytest.mark.parametrize("way", [way for way in WAYS if way != "text"])
def test_a_policy_can_require_consent_for_media(media, policy, way):
    pipeline, files = media
    request = Request.from_dict({"prompt": "a cat", **fill(WAYS[way], files)}).with_seed()
    policy("consent = true")
    with pytest.raises(RequestError, match="consent must name who is shown") as caught:
        pipeline.stream(request)
    assert caught.value.field == "consent"
    pipeline.stream(request, check_consent=False).close()
    pipeline.stream(request, consent={"who": "Ada"}).close()


def test_the_receipt_records_the_consent(media, policy):
    pipeline, files = media
    policy("consent = true")
    agreed = {"who": "Ada", "expiry": "2999-12-31"}
    video = pipeline.generate("a cat", seed=1, image=files["IMAGE"], consent=agreed)
    assert Receipt.from_dict(video.receipt).request.consent == MediaConsent(**agreed)
    assert video.receipt["request"]["consent"] == agreed
    assert pipeline.generate("a cat", seed=1).receipt["request"].get("consent") is None
