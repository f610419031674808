"""Characters: recognised descriptions replace their names in prompts; consent is enforced."""

import pytest
from openai import BadRequestError, omit
from openai.types import Video

from skyloom.safety.consent import parse_expiry
from skyloom.serve.api.character_prompts import substitute_characters
from skyloom.serve.queue.library import CharacterLikeness

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
MP4 = b"\x00\x00\x00\x18ftypisom" + bytes(range(256)) * 40
MOSSY = CharacterLikeness("cat", "red", "probe", {"noun cat": 0.99})
CAST = {
    "Mossy": MOSSY,
    "Ross": CharacterLikeness("owl"),
    "Zed": CharacterLikeness("scissors", "blue"),
    "Nobody": CharacterLikeness(),
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Mossy walks on the beach", "a red cat walks on the beach"),
        ("Mossy walks, then Mossy sleeps", "a red cat walks, then the red cat sleeps"),
        ("Mossy's ball", "a red cat's ball"),
        ("Mossy\u2019s ball", "a red cat\u2019s ball"),
        ("Ross' ball and Ross's hat", "an owl's ball and the owl's hat"),
        ("a Mossy, the Mossy, my Mossy", "a red cat, the red cat, my red cat"),
        ("A Ross flies", "An owl flies"),
        ("a happy Mossy sits", "a happy red cat sits"),
        ("a dog and Mossy", "a dog and a red cat"),
        ("Zed with my Zed", "a pair of blue scissors with my pair of blue scissors"),
        ("Mossyland, mossy and Nobody", "Mossyland, mossy and Nobody"),
        ("", ""),
    ],
)
def test_names_are_replaced_with_correct_grammar(text, expected):
    assert substitute_characters(text, CAST)[0] == expected


def test_the_longest_name_wins_and_other_scripts_need_no_spaces():
    cast = {
        "Mo": CharacterLikeness("dog"),
        "Mo Mo": CharacterLikeness("owl"),
        "\u5c0f\u660e": CharacterLikeness("cat"),
    }
    assert substitute_characters("Mo Mo meets Mo", cast) == ("an owl meets a dog", {"Mo Mo", "Mo"})
    assert substitute_characters("\u8fd9\u662f\u5c0f\u660e", cast)[0].endswith("a cat")


def character(server, name="Mossy", likeness=MOSSY, **extra):
    """Create a character whose clip is recognised as `likeness`."""
    server.viewer.likeness = likeness
    return server.openai().videos.create_character(name=name, video=MP4, extra_body=extra or None)


def test_a_character_has_the_description_of_its_clip(server):
    made = character(server)
    again = server.openai().videos.get_character(made.id)
    assert made.model_dump() == again.model_dump()
    assert (again.name, again.description, again.source, again.scores) == (
        "Mossy",
        "red cat",
        "probe",
        MOSSY.scores,
    )
    assert server.viewer.asked == [True]


def test_the_model_gets_the_description_and_the_response_the_prompt_of_the_client(server):
    ids = [{"id": character(server).id}]
    video = server.openai().videos.create(
        prompt="Mossy walks on the beach", extra_body={"characters": ids, "style": "at night"}
    )
    job = server.services.jobs.get(video.id)
    assert job.request["prompt"].startswith("a red cat walks on the beach, ")
    assert (video.prompt, job.metadata["described"]) == (
        "Mossy walks on the beach",
        {"Mossy": "red cat"},
    )
    assert 'Mossy is put in as "red cat", by what the probe reads in its clip.' in video.notices
    cards = [{"at": 0, "prompt": "Mossy runs"}, {"at": 2, "prompt": "Mossy's ball"}]
    body = {"prompt": "Mossy", "characters": ids, "storyboard": cards}
    board = server.openai().post("/videos", body=body, cast_to=Video)
    shown = server.services.jobs.get(board.id).request["cards"]
    assert [card["prompt"] for card in shown] == ["a red cat runs", "a red cat's ball"]


def test_edits_replace_the_characters_of_their_source(server):
    client = server.openai()
    video = client.videos.create(
        prompt="Mossy walks", extra_body={"characters": [{"id": character(server).id}]}
    )
    server.work()
    remixed = client.videos.remix(video.id, prompt="Mossy's birthday")
    assert server.services.jobs.get(remixed.id).request["prompt"] == "a red cat's birthday"
    assert (remixed.prompt, remixed.characters) == ("Mossy's birthday", video.characters)
    longer = client.videos.extend(
        prompt="it rains", seconds="4", video=omit, extra_body={"video": {"id": video.id}}
    )
    assert server.services.jobs.get(longer.id).request["prompt"] == "it rains"
    assert not any("Mossy" in notice for notice in longer.notices)


def test_an_unrecognised_character_keeps_its_name_and_gives_a_notice(server):
    made = character(server, likeness=CharacterLikeness(scores={"noun cat": 0.4}))
    assert (made.description, made.source) == (None, None)
    assert made.notices == ["The model does not know who Mossy is: only the name is in the prompt."]
    video = server.openai().videos.create(
        prompt="Mossy walks", extra_body={"characters": [{"id": made.id}]}
    )
    assert server.services.jobs.get(video.id).request["prompt"] == "Mossy walks"
    assert made.notices[0] in video.notices


def test_the_prompt_of_the_client_is_moderated_too(server):
    ids = [{"id": character(server).id}]
    with pytest.raises(BadRequestError) as caught:
        server.openai().videos.create(prompt="Mossy is forbidden", extra_body={"characters": ids})
    assert caught.value.code == "moderation_blocked"


def test_consent_is_stored_returned_and_expires(server):
    consent = {"who": "Ada", "scope": "birthday films", "expiry": "2999-12-31"}
    made = character(server, consent=consent)
    assert made.consent == consent
    assert server.openai().videos.get_character(made.id).consent == consent
    assert character(server).consent is None
    extra = {"characters": [{"id": made.id}]}
    video = server.openai().videos.create(prompt="Mossy walks", extra_body=extra)
    server.work()
    with pytest.raises(BadRequestError, match="ended with 2020-01-31") as caught:
        character(server, name="Pip", consent={"expiry": "2020-01-31"})
    assert (caught.value.code, caught.value.param) == ("consent_expired", "consent.expiry")
    with server.services.database.write() as write:  # valid when the video was made, expired now
        write.connection.exec_driver_sql(
            """UPDATE likenesses SET consent = '{"expiry": "2020-01-31"}'"""
        )
    for use in (
        lambda client: client.videos.create(prompt="Mossy walks", extra_body=extra),
        lambda client: client.videos.remix(video.id, prompt="again"),
    ):
        with pytest.raises(BadRequestError) as caught:
            use(server.openai())
        assert (caught.value.code, caught.value.param) == ("consent_expired", "characters[0]")


@pytest.mark.parametrize("expiry", ["soon", "2027-02-30", "2027-1-31", "", "x" * 50])
def test_an_expiry_must_be_a_date_or_a_time(server, expiry):
    with pytest.raises(BadRequestError) as caught:
        character(server, consent={"expiry": expiry})
    assert caught.value.param == "consent.expiry"


def test_a_date_expires_at_its_end_in_utc():
    assert (
        parse_expiry("1970-01-01")
        == parse_expiry("1970-01-02T00:00:00")
        == parse_expiry("1970-01-02T01:00:00+01:00")
        == 86_400
    )


def test_a_character_of_a_former_version_has_no_description(server):
    made = character(server)
    with server.services.database.write() as write:
        write.connection.exec_driver_sql("DELETE FROM likenesses")
    old = server.openai().videos.get_character(made.id)
    assert (old.name, old.description, old.consent) == ("Mossy", None, None)
