"""Refusals of the policy: prompts, pictures, characters and failed jobs."""

import base64

import pytest
from openai import BadRequestError, InternalServerError
from openai.types import Video

from skyloom.core.errors import SafetyError, UncheckedError
from skyloom.safety.moderation import ModerationResult
from skyloom.serve.workers.worker import Progress

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
MP4 = b"\x00\x00\x00\x18ftypisom" + bytes(range(256)) * 40
PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)
DATA = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
BLOCKED = ModerationResult(False, "logo", None, "Not shown.", 3.0)


def failed(server, error):
    """A video whose job went wrong."""
    video = server.openai().videos.create(prompt="a cat")

    def fail(job, output):
        yield Progress(10, "denoise")
        raise error

    server.work(fail)
    return server.openai().videos.poll(video.id)


@pytest.mark.parametrize(("target", "steer"), [("output", "Ask for"), ("input", "Start from")])
def test_blocked_job_is_200_with_misalignment(server, target, steer):
    video = failed(
        server,
        SafetyError("Refused by the rule logo, for it at 3 s.", rule="logo", at=3, target=target),
    )
    assert (video.status, video.error.code) == ("failed", "moderation_blocked")
    assert video.error.message == video.error.misalignment.detailed_explanation
    assert (video.error.misalignment.error_type, video.error.misalignment.review_target) == (
        "other",
        None,
    )
    assert video.error.misalignment.steer.message.startswith(steer)
    assert server.openai().videos.list().data[0].error.misalignment is not None


def test_unchecked_job_fails_with_moderation_failed(server):
    video = failed(
        server, UncheckedError("The classifier own failed.", rule="own", target="output")
    )
    assert (video.error.code, video.error.misalignment) == ("moderation_failed", None)


def test_refusals_are_counted_by_rule_without_their_text(server):
    for _ in range(2):
        with pytest.raises(BadRequestError):
            server.openai().videos.create(prompt="a forbidden wombat")
    failed(server, SafetyError("no wombats", rule="logo", target="output"))
    numbers = server.http(server.key("root", "admin")).get("/metrics").text
    prompt, output = (
        'code="moderation_blocked",rule="sexual",target="prompt"',
        'rule="logo",target="output"',
    )
    assert f"skyloom_refusals_total{{{prompt}}} 2.0" in numbers
    assert f'skyloom_refusals_total{{code="moderation_blocked",{output}}} 1.0' in numbers
    assert "wombat" not in numbers


def test_parts_of_a_moderation_have_one_result(server):
    client = server.openai()
    parts = [{"type": "text", "text": "a cat"}, {"type": "image_url", "image_url": {"url": DATA}}]
    (clean,) = client.moderations.create(input=parts).results
    assert (clean.flagged, clean.category_applied_input_types.sexual) == (False, ["image", "text"])
    server.viewer.verdict = BLOCKED
    (told,) = client.moderations.create(input=parts).results
    assert (told.flagged, told.rule, told.at, told.span) == (True, "logo", 3.0, None)
    (told,) = client.moderations.create(
        input=[{"type": "text", "text": "forbidden"}, parts[1]]
    ).results
    assert (told.rule, told.categories.sexual) == ("sexual", True)
    assert server.viewer.asked == [False] * 3, "who is shown is asked of characters only"
    results = client.moderations.create(input=["forbidden", "a cat"]).results
    assert [one.flagged for one in results] == [True, False]
    assert client.moderations.create(input="a cat").results[0].flagged is False


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
        {"type": "image_url", "image_url": {"url": "data:text/html;base64,PHN2Zz4="}},
        {"type": "image_url"},
        {"type": "image_url", "image_url": 7},
        {"type": "audio", "text": "a cat"},
        {"type": "text"},
        7,
    ],
)
def test_unsupported_moderation_part_is_named(server, part):
    with pytest.raises(BadRequestError) as caught:
        server.openai().moderations.create(input=[part])
    assert caught.value.param == "input[0]"


def test_characters_are_moderated_by_name_and_clip(server):
    client = server.openai()
    with pytest.raises(BadRequestError) as caught:
        client.videos.create_character(name="forbidden", video=MP4)
    assert (caught.value.code, caught.value.param) == ("moderation_blocked", "name")
    server.viewer.verdict = BLOCKED
    with pytest.raises(BadRequestError, match="rule logo, for video at 3 s: Not shown") as caught:
        client.videos.create_character(name="Momo", video=MP4)
    assert (caught.value.code, caught.value.param) == ("moderation_blocked", "video")
    assert server.services.jobs.refusals()["logo", "input", "moderation_blocked"] == 1


def test_failing_classifier_refuses(server, monkeypatch):
    def fail(asset, recognise):
        raise UncheckedError("The classifier own failed.", rule="own")

    monkeypatch.setattr(
        type(server.viewer), "__call__", lambda _, asset, recognise: fail(asset, recognise)
    )
    with pytest.raises(InternalServerError) as caught:
        server.openai(max_retries=0).videos.create_character(name="Momo", video=MP4)
    assert (caught.value.status_code, caught.value.code) == (503, "moderation_failed")


def test_consent_belongs_to_media_and_can_be_required(server, policy):
    client, consent = server.openai(), {"who": "Ada", "scope": "this film", "expiry": "2999-12-31"}
    picture = ("a.png", PNG, "image/png")
    video = client.videos.create(
        prompt="a cat", input_reference=picture, extra_body={"consent": consent}
    )
    assert client.videos.retrieve(video.id).consent == consent
    assert server.services.jobs.get(video.id).request["consent"] == consent
    assert client.videos.create(prompt="a cat", input_reference=picture).consent is None
    calls = {
        "consent": lambda: client.videos.create(prompt="a cat", extra_body={"consent": consent}),
        "consent.expiry": lambda: client.videos.edit(
            prompt="a cat", video=MP4, extra_body={"consent": {"expiry": "2020-01-31"}}
        ),
    }
    for param, call in calls.items():
        with pytest.raises(BadRequestError) as caught:
            call()
        assert caught.value.param == param
    server.work()
    policy("consent = true")
    card = {"at": 0, "prompt": "a cat", "image": DATA}
    wanting = (
        lambda: client.videos.create(prompt="a cat", input_reference=picture),
        lambda: client.videos.edit(prompt="a cat", video=MP4),
        lambda: client.videos.create_character(name="Momo", video=MP4),
        lambda: client.post("/videos/storyboard", body={"cards": [card]}, cast_to=Video),
    )
    for call in wanting:
        with pytest.raises(BadRequestError) as caught:
            call()
        assert (caught.value.code, caught.value.param) == ("consent_required", "consent")
    assert (
        client.videos.edit(prompt="a cat", video=MP4, extra_body={"consent": consent}).consent
        == consent
    )
    assert client.videos.remix(video.id, prompt="a dog").status == "queued", "ours already"
    assert client.videos.create(prompt="a cat").status == "queued"
