"""Edit verbs: paths, fields, limits of source videos; storyboards, plans, pause and resume."""

import json

import pytest
from edit_examples import example_fields
from openai import BadRequestError

from skyloom.generate.edit_verbs import EDIT_VERBS as VERBS
from skyloom.generate.edit_verbs import STRENGTHS
from skyloom.serve.api.request_models import EditFields, parse_body
from skyloom.serve.workers.worker import Progress

MP4 = b"\x00\x00\x00\x18ftypisom" + bytes(3_000)


@pytest.fixture
def video(server) -> str:
    """A finished video of four seconds."""
    id = server.http().post("/v1/videos", json={"prompt": "a cat"}).json()["id"]
    server.work()
    return id


def as_text(verb: str, name: str, value: object) -> object:
    """A field as the edit of a request has it: times and rates are exact text."""
    return str(value) if VERBS[verb].field(name).kind in ("time", "rate") else value


@pytest.mark.parametrize(
    "verb",
    [verb.name for verb in VERBS.values() if verb.max_videos == 1 and verb.name != "extend"],
)
def test_a_verb_of_a_video_becomes_the_edit_of_a_request(server, video, verb):
    fields = example_fields(verb) | ({"size": "256x256"} if verb == "upscale" else {})
    body = {"prompt": "a dog", **fields} if "prompt" in VERBS[verb].required else fields
    edit = {name: as_text(verb, name, value) for name, value in fields.items()}
    seed = 7 if VERBS[verb].uses_model else None
    answer = server.http().post(f"/v1/videos/{video}/{verb}", json={**body, "seed": seed}).json()
    job, source = server.services.jobs.get(answer["id"]), server.services.jobs.get(video)
    assert job.request["edit"] == {"verb": verb, "videos": [source.result.assets["video"]], **edit}
    assert (answer["verb"], answer["parents"], answer["seed"]) == (verb, [video], seed)
    assert job.request["prompt"] == body.get("prompt", "a cat")
    assert not {"seconds", "size", "fps", "image", "cards"} & job.request.keys()


def test_a_named_strength_becomes_a_number(server, video):
    body = {"prompt": "a dog", "strength": "mild"}
    answer = server.http().post(f"/v1/videos/{video}/remix", json=body).json()
    assert server.services.jobs.get(answer["id"]).request["edit"]["strength"] == STRENGTHS["mild"]


def test_videos_are_joined_by_their_own_paths(server, video):
    http, two = server.http(), {"videos": [{"id": video}, {"id": video}]}
    for verb, body in (("blend", {"curve": "mix"}), ("stitch", {"morph": 0.5})):
        answer = http.post(f"/v1/videos/{verb}", json={**two, **body}).json()
        assert len(server.services.jobs.get(answer["id"]).request["edit"]["videos"]) == 2
        assert answer["seconds"] == "8"
    assert (
        http.post("/v1/videos/blend", json={"videos": [{"id": video}]}).json()["error"]["param"]
        == "videos"
    )
    three = {"videos": [{"id": video}] * 3}
    assert http.post("/v1/videos/blend", json=three).status_code == 400
    assert http.post("/v1/videos/stitch", json=three).status_code == 200


def test_the_fields_of_an_edit_select_its_verb(server, video):
    http = server.http()
    for body, verb in (
        ({}, "remix"),
        ({"region": "0,0,8,8"}, "inpaint"),
        ({"start": 0, "stop": 1}, "retake"),
    ):
        assert (
            http.post(f"/v1/videos/{video}/edits", json={"prompt": "x", **body}).json()["verb"]
            == verb
        )


SAMPLED = {"seed": 3, "steps": 4, "guidance": 2, "quality": "best", "negative_prompt": "fog"}


@pytest.mark.parametrize("name", SAMPLED)
def test_sampling_fields_are_rejected_where_nothing_is_sampled(server, video, name):
    http, two = server.http(), {"videos": [{"id": video}, {"id": video}]}
    calls = (
        (f"/v1/videos/{video}/upscale", {"size": "256x256"}),
        (f"/v1/videos/{video}/interpolate", {"fps": 32}),
        ("/v1/videos/stitch", {**two, "morph": 0}),
    )
    for path, body in calls:
        answer = http.post(path, json={**body, name: SAMPLED[name]})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (
            400,
            name,
            "unsupported_parameter",
        )
        assert (
            "seed" not in server.services.jobs.get(http.post(path, json=body).json()["id"]).request
        )
    assert (
        http.post("/v1/videos/stitch", json={**two, "morph": 0.5, name: SAMPLED[name]}).status_code
        == 200
    )


def test_the_api_has_every_verb_with_its_fields(server):
    paths = " ".join(server.app.openapi()["paths"])
    for verb in VERBS.values():
        assert verb.name == "extend" or f"/{verb.name}" in paths
        assert set(verb.field_names) <= set(EditFields.model_fields)


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_a_field_without_effect_is_rejected(verb):
    """For every verb, every field that some other verb accepts."""
    from skyloom.serve.api.edit_fields import check_fields

    values = {
        "size": "256x256",
        "fps": 32,
        "strength": 0.5,
        "style": "x",
        "start": 0,
        "stop": 1,
        "seconds": 4,
        "region": "0,0,1,1",
        "feather": 2,
    }
    values |= {
        "backward": True,
        "overlap": 1,
        "bridge": 1,
        "morph": 1,
        "curve": "x",
        "mask": {"file_id": "file-1"},
    }
    needed = {name: values.get(name, "a cat") for name in VERBS[verb].required}
    needed |= {"region": "0,0,1,1"} if verb == "inpaint" else {}
    ends = {"start": 0, "stop": 1} if verb in ("retake", "recut") else {}
    needed |= ends
    check_fields(verb, parse_body(EditFields, needed))
    for name in values.keys() - set(VERBS[verb].field_names):
        with pytest.raises(Exception, match="must be left out for") as caught:
            check_fields(verb, parse_body(EditFields, {**needed, name: values[name]}))
        assert caught.value.param == name
    for name in (*VERBS[verb].required, *ends):
        with pytest.raises(Exception, match="Missing required") as caught:
            check_fields(
                verb,
                parse_body(
                    EditFields, {key: value for key, value in needed.items() if key != name}
                ),
            )
        assert caught.value.param == name


def test_only_completed_videos_can_be_edited(server, video):
    http = server.http()
    waiting = http.post("/v1/videos", json={"prompt": "a cat"}).json()["id"]
    answer = http.post(f"/v1/videos/{waiting}/remix", json={"prompt": "x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "video_not_ready")
    picture = {"prompt": (None, "x"), "video": ("a.png", b"\x89PNG\r\n\x1a\n" + bytes(50))}
    assert http.post("/v1/videos/edits", files=picture).json()["error"]["param"] == "video"
    assert http.post("/v1/videos/edits", json={"prompt": "x"}).json()["error"]["param"] == "video"
    assert (
        http.post(f"/v1/videos/{video}/retake", json={"start": 2, "stop": 1}).json()["error"][
            "param"
        ]
        == "stop"
    )


def test_an_edit_of_an_uploaded_video_has_the_length_of_its_result(server):
    """Before it is made, only the added length is known."""
    form = {"prompt": (None, "on"), "seconds": (None, "2"), "video": ("v.mp4", MP4)}
    created = server.http().post("/v1/videos/extensions", files=form).json()
    assert created["seconds"] == "2"

    def paint(job, output):
        (output / "video.mp4").write_bytes(MP4)
        receipt = {"frames": {"shape": [161, 64, 96, 3], "fps": "16"}}
        yield Progress(99, "decode", {"video": output / "video.mp4"}, receipt)

    server.work(paint)
    made = server.http().get(f"/v1/videos/{created['id']}").json()
    assert (made["seconds"], made["size"]) == ("10", "96x64")
    longer = {"prompt": "on", "seconds": "4", "video": {"id": created["id"]}}
    assert server.http().post("/v1/videos/extensions", json=longer).json()["seconds"] == "14"


def test_a_storyboard_has_its_own_path_and_is_a_field(server):
    http = server.http()
    cards = [{"at": 0, "prompt": "a cat"}, {"at": 2, "prompt": "a dog", "cut": True}]
    by_path = http.post(
        "/v1/videos/storyboard", json={"cards": cards, "model": "diorama", "seconds": "4"}
    ).json()
    by_field = http.post("/v1/videos", json={"prompt": "at night", "storyboard": cards}).json()
    first, second = (
        server.services.jobs.get(answer["id"]).request for answer in (by_path, by_field)
    )
    assert first["cards"] == second["cards"]
    assert (first["prompt"], second["prompt"], by_path["verb"]) == ("", "at night", "storyboard")
    wrong = http.post("/v1/videos/storyboard", json={"cards": [{"at": 0}]})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "storyboard")
    picture = http.post(
        "/v1/files", files={"file": ("a.png", b"\x89PNG\r\n\x1a\n" + bytes(9))}
    ).json()["id"]
    pinned = http.post(
        "/v1/videos/storyboard", json={"cards": [{**cards[0], "image": {"file_id": picture}}]}
    ).json()
    assert server.services.jobs.get(pinned["id"]).request["cards"][0]["image"].startswith("asset:")


def test_the_openai_client_sends_whole_storyboards(server):
    cards = [{"at": 0, "prompt": "a cat"}, {"at": 2, "prompt": "a dog"}]
    uneven = [cards[0], {**cards[1], "cut": True}]
    client = server.openai(max_retries=0)
    made = client.videos.create(prompt="at night", seconds="4", extra_body={"storyboard": cards})
    as_json = client.videos.create(
        prompt="at night", seconds="4", extra_body={"storyboard": json.dumps(uneven)}
    )
    first, second = (server.services.jobs.get(one.id).request["cards"] for one in (made, as_json))
    assert (
        [card["prompt"] for card in first]
        == [card["prompt"] for card in second]
        == ["a cat", "a dog"]
    )
    assert second[1]["cut"] is True
    with pytest.raises(BadRequestError, match="send them as JSON") as caught:
        client.videos.create(prompt="at night", seconds="4", extra_body={"storyboard": uneven})
    assert caught.value.param == "storyboard"


def test_jobs_are_paused_and_resumed(server):
    http = server.http()
    id = http.post("/v1/videos", json={"prompt": "a cat"}).json()["id"]
    held = http.post(f"/v1/videos/{id}/pause").json()
    assert (held["status"], held["paused"]) == ("queued", True)
    server.work()
    assert http.post(f"/v1/videos/{id}/resume").json()["paused"] is False
    server.work()
    assert http.get(f"/v1/videos/{id}").json()["status"] == "completed"
    assert http.post(f"/v1/videos/{id}/pause").status_code == 409
    other = http.post("/v1/videos", json={"prompt": "a cat"}).json()["id"]
    assert http.post(f"/v1/videos/{other}/cancel").json()["status"] == "cancelled"
    assert server.openai().videos.poll(other).status == "cancelled"


def test_a_plan_submits_no_job(server):
    answer = server.http().post("/v1/videos/plan", json={"prompt": "a cat", "seconds": "60"}).json()
    assert (answer["object"], answer["seconds"]) == ("video.plan", "60")
    assert server.services.jobs.page() == ([], False)


@pytest.mark.parametrize(
    ("verb", "body", "param"),
    [
        ("upscale", {"size": "64x64"}, "size"),
        ("upscale", {"size": "128x128"}, "size"),
        ("interpolate", {"fps": 16}, "fps"),
        ("retake", {"start": 3, "stop": 99}, "stop"),
        ("recut", {"start": 98, "stop": 99, "seconds": 5}, "start"),
    ],
)
def test_fields_are_checked_against_the_source_video(server, video, verb, body, param):
    answer = server.http().post(f"/v1/videos/{video}/{verb}", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_a_storyboard_with_a_character_of_expired_consent_is_rejected(server, monkeypatch):
    http = server.http()
    clip = {"video": ("c.mp4", MP4)}
    fields = {"name": "Mossy", "consent": json.dumps({"who": "ada", "expiry": "2030-01-01"})}
    character = http.post("/v1/videos/characters", data=fields, files=clip).json()["id"]
    shown = http.post(
        "/v1/videos", json={"prompt": "Mossy", "characters": [{"id": character}]}
    ).json()["id"]
    server.work()
    cards = [{"at": 0, "prompt": "a cat", "video": {"id": shown}}]
    assert http.post("/v1/videos/storyboard", json={"cards": cards}).status_code == 200
    monkeypatch.setattr(server.services.database, "now", lambda: 2e9)
    late = http.post("/v1/videos/storyboard", json={"cards": cards})
    assert (late.status_code, late.json()["error"]["code"]) == (400, "consent_expired")


def test_the_fps_of_a_completed_video_is_that_of_its_receipt(server):
    """The frame rate of an uploaded source is unknown before."""

    def slow(job, output):
        path = output / "video.mp4"
        path.write_bytes(MP4)
        yield Progress(
            99, "decode", {"video": path}, {"frames": {"shape": [13, 128, 128, 3], "fps": "12"}}
        )

    http = server.http()
    made = http.post(
        "/v1/videos/edits", data={"prompt": "a cat"}, files={"video": ("a.mp4", MP4)}
    ).json()
    server.work(slow)
    assert http.get(f"/v1/videos/{made['id']}").json()["fps"] == 12
    assert http.post(f"/v1/videos/{made['id']}/interpolate", json={"fps": 16}).status_code == 200
    assert http.post(f"/v1/videos/{made['id']}/interpolate", json={"fps": 12}).status_code == 400
