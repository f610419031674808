"""The contract of the Videos API, point by point, by OpenAI's own client, unchanged."""

import base64
import io
import json
import random
import re
import time

import openai
import pytest
from openai import APIStatusError, BadRequestError, NotFoundError, omit
from openai.types import Video

from skyloom.serve.workers.worker import Progress

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
MP4 = b"\x00\x00\x00\x18ftypisom" + bytes(range(256)) * 40
PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)


def finished(server, prompt="a cat on the beach", **options) -> Video:
    """A video that was made."""
    video = server.openai().videos.create(prompt=prompt, **options)
    server.work()
    return server.openai().videos.retrieve(video.id)


def test_01_every_post_takes_multipart_and_json(server):
    client, made = server.openai(), finished(server)
    by_form = [
        client.videos.create(prompt="a cat", seconds="8"),
        client.videos.remix(made.id, prompt="a dog"),
        client.videos.edit(prompt="a dog", video=MP4),
        client.videos.extend(prompt="it runs", seconds="4", video=MP4),
    ]
    asked = {"create": "/videos", "remix": f"/videos/{made.id}/remix", "edit": "/videos/edits"}
    video = {"video": {"id": made.id}}
    by_json = [
        client.post(asked["create"], body={"prompt": "a cat", "seconds": "8"}, cast_to=Video),
        client.post(asked["remix"], body={"prompt": "a dog"}, cast_to=Video),
        client.post(asked["edit"], body={"prompt": "a dog", **video}, cast_to=Video),
        client.post(
            "/videos/extensions", body={"prompt": "it runs", "seconds": "4", **video}, cast_to=Video
        ),
    ]
    assert [video.status for video in by_form + by_json] == ["queued"] * 8
    assert len({video.id for video in by_form + by_json}) == 8
    form = {"prompt": (None, "a dog")}
    assert (
        server.http()
        .post(f"/v1/videos/{made.id}/remix", files=form)
        .json()["remixed_from_video_id"]
        == made.id
    )
    name = client.videos.create_character(name="Momo", video=MP4)
    again = server.http().post(
        "/v1/videos/characters", json={"name": "Momo", "video": {"id": made.id}}
    )
    assert name.name == again.json()["name"] == "Momo"


def test_02_form_keys_name_a_video(server):
    made, client = finished(server), server.openai()
    longer = client.videos.extend(
        prompt="on", seconds="4", video=omit, extra_body={"video": {"id": made.id}}
    )
    changed = client.videos.edit(prompt="on", video=omit, extra_body={"video": {"id": made.id}})
    assert longer.parents == changed.parents == [made.id]


def test_03_seconds_are_a_string(server):
    assert server.openai().videos.create(prompt="a cat", seconds="12").seconds == "12"
    assert (
        server.http().post("/v1/videos", json={"prompt": "a cat", "seconds": 2}).json()["seconds"]
        == "2"
    )


def test_04_defaults_are_soras_and_the_size_is_honest(server):
    video = server.openai().videos.create(prompt="a cat")
    assert (video.model, video.seconds, video.requested_size) == ("sora-2", "4", "720x1280")
    assert video.size == "128x128"
    assert any("720x1280" in notice for notice in video.notices)


@pytest.mark.parametrize(
    ("status", "call"),
    [
        (404, lambda http: http.get("/v1/nothing")),
        (404, lambda http: http.get("/v1/videos/video_none")),
        (405, lambda http: http.put("/v1/videos")),
        (
            413,
            lambda http: http.post(
                "/v1/videos", headers={"content-length": str(2**40)}, content=b"{}"
            ),
        ),
        (
            415,
            lambda http: http.post(
                "/v1/videos", headers={"content-type": "text/plain"}, content=b"hello"
            ),
        ),
        (400, lambda http: http.post("/v1/videos", json={"prompt": ["a", "list"]})),
    ],
)
def test_05_errors_come_in_openais_envelope(server, status, call):
    answer = call(server.http())
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert all(isinstance(error[name], str) and error[name] for name in ("message", "type", "code"))


def test_05_what_is_unprocessable_is_400_as_openai_has_it(server):
    with pytest.raises(BadRequestError) as caught:
        server.openai().post(
            "/videos", body={"prompt": "a cat", "input_reference": "cat"}, cast_to=Video
        )
    assert (caught.value.code, caught.value.param) == ("invalid_type", "input_reference")
    assert caught.value.message.endswith(
        "Invalid type for 'input_reference': expected an object, but got a string instead."
    ) or "expected an object, but got a string instead" in str(caught.value)


def test_06_a_failed_job_is_an_answer(server):
    video = server.openai().videos.create(prompt="a cat")

    def fail(job, output):
        yield Progress(10, "denoise")
        raise ValueError("a secret of this machine")

    server.work(fail)
    polled = server.openai().videos.poll(video.id)
    assert polled.status == "failed"
    assert polled.error.code == "internal"
    assert "secret" not in polled.error.message


def test_07_lists_go_on_by_cursor(server):
    client = server.openai()
    ids = [client.videos.create(prompt=f"cat {number}").id for number in range(7)]
    page = client.videos.list(limit=3)
    assert (page.has_more, page.last_id, page.first_id) == (True, ids[4], ids[6])
    assert [video.id for video in client.videos.list(limit=3)] == ids[::-1]
    assert [video.id for video in client.videos.list(limit=3, order="asc", after=ids[1])] == ids[2:]
    with pytest.raises(NotFoundError):
        client.videos.list(after="video_none")


def test_08_delete_has_openais_shape_also_while_it_runs(server):
    client = server.openai()
    waiting, running = client.videos.create(prompt="one"), client.videos.create(prompt="two")
    gone = client.videos.delete(waiting.id)
    assert (gone.id, gone.deleted, gone.object) == (waiting.id, True, "video.deleted")

    def delete_meanwhile(job, output):
        yield Progress(10, "denoise")
        assert client.videos.delete(job.id).deleted
        for _ in range(400):
            time.sleep(0.01)
            yield Progress(20, "denoise")
        raise AssertionError("the worker was not stopped")

    server.work(delete_meanwhile)
    for video in (waiting, running):
        with pytest.raises(NotFoundError):
            client.videos.retrieve(video.id)


def test_09_three_variants_with_their_types_and_ranges(server):
    made, client = finished(server), server.openai()
    content = client.videos.download_content(made.id)
    assert content.response.headers["content-type"] == "video/mp4"
    assert content.response.headers["x-content-type-options"] == "nosniff"
    whole = content.read()
    assert whole.startswith(MP4)
    for variant, kind in (("thumbnail", "image/webp"), ("spritesheet", "image/jpeg")):
        assert (
            client.videos.download_content(made.id, variant=variant).response.headers[
                "content-type"
            ]
            == kind
        )
    http, path = server.http(), f"/v1/videos/{made.id}/content"
    part = http.get(path, headers={"range": "bytes=5-9"})
    assert (part.status_code, part.content) == (206, whole[5:10])
    assert part.headers["content-range"] == f"bytes 5-9/{len(whole)}"
    assert http.get(path, headers={"range": f"bytes={len(whole)}-"}).status_code == 416
    assert http.head(path).headers["content-length"] == str(len(whole))
    assert http.get(path, headers={"if-none-match": part.headers["etag"]}).status_code == 304
    with pytest.raises(BadRequestError):
        client.videos.download_content(made.id, variant="poster")


def test_10_an_unfinished_video_has_no_content(server):
    video = server.openai().videos.create(prompt="a cat")
    with pytest.raises(APIStatusError) as caught:
        server.openai().videos.download_content(video.id)
    assert (caught.value.status_code, caught.value.code) == (409, "not_ready")
    assert caught.value.response.headers["x-should-retry"] == "false"


def test_11_progress_only_grows_and_is_100_at_the_end(server):
    video, seen = server.openai().videos.create(prompt="a cat"), []

    def watched(job, output):
        for percent in (5, 50, 30, 99, 100):
            yield Progress(percent, "denoise")
            time.sleep(0.6)
            seen.append(server.openai().videos.retrieve(video.id).progress)
        (output / "video.mp4").write_bytes(MP4)
        yield Progress(99, "decode", {"video": output / "video.mp4"}, {})

    server.work(watched)
    assert seen == sorted(seen)
    assert all(isinstance(progress, int) and 0 <= progress < 100 for progress in seen)
    assert len(set(seen)) > 1
    assert server.openai().videos.retrieve(video.id).progress == 100


def test_12_the_server_says_when_to_ask_again(server):
    raw = server.openai().videos.with_raw_response
    assert int(raw.create(prompt="a cat").headers["openai-poll-after-ms"]) == 500
    video = finished(server)
    assert "openai-poll-after-ms" in raw.retrieve(video.id).headers
    assert server.openai().videos.poll(video.id).status == "completed"


def test_13_a_call_that_comes_again_makes_no_second_video(server):
    http, body = server.http(), {"prompt": "a cat"}
    first = http.post("/v1/videos", json=body).json()["id"]
    again = http.post("/v1/videos", json=body, headers={"x-stainless-retry-count": "1"}).json()[
        "id"
    ]
    other = http.post("/v1/videos", json=body).json()["id"]
    assert first == again != other
    keyed = [
        http.post("/v1/videos", json=body, headers={"idempotency-key": "k"}).json()["id"]
        for _ in range(3)
    ]
    assert len(set(keyed)) == 1
    conflict = http.post("/v1/videos", json={"prompt": "a dog"}, headers={"idempotency-key": "k"})
    assert (conflict.status_code, conflict.headers["x-should-retry"]) == (409, "false")


def test_14_an_extension_is_the_stitched_whole_within_soras_limits(server):
    client, video = server.openai(), finished(server, seconds="20")
    assert (
        client.post(
            "/videos/extensions",
            body={"prompt": "on", "seconds": "8", "video": {"id": video.id}},
            cast_to=Video,
        ).seconds
        == "28"
    )
    for times in range(1, 7):
        longer = client.videos.extend(
            prompt="on", seconds="4", video=omit, extra_body={"video": {"id": video.id}}
        )
        assert longer.seconds == str(20 + 4 * times)
        server.work()
        video = longer
    with pytest.raises(BadRequestError, match="6 times"):
        client.videos.extend(
            prompt="on", seconds="4", video=omit, extra_body={"video": {"id": video.id}}
        )
    fresh = finished(server, seconds="20")
    with pytest.raises(BadRequestError, match="120 s"):
        client.videos.extend(
            prompt="on", seconds="101", video=omit, extra_body={"video": {"id": fresh.id}}
        )


def test_15_characters_are_two_at_most_and_named(server):
    client = server.openai()
    ids = [
        client.videos.create_character(name=name, video=MP4).id for name in ("Momo", "Pip", "Zed")
    ]
    assert client.videos.get_character(ids[0]).name == "Momo"
    both = client.videos.create(
        prompt="Momo meets Pip", extra_body={"characters": [{"id": ids[0]}, {"id": ids[1]}]}
    )
    assert [one["id"] for one in both.characters] == ids[:2]
    with pytest.raises(BadRequestError) as caught:
        client.videos.create(prompt="nobody", extra_body={"characters": [{"id": ids[0]}]})
    assert (caught.value.code, caught.value.param) == ("character_not_named", "characters[0]")
    with pytest.raises(BadRequestError):
        client.videos.create(
            prompt="Momo Pip Zed", extra_body={"characters": [{"id": one} for one in ids]}
        )
    with pytest.raises(NotFoundError):
        client.videos.create(prompt="Momo", extra_body={"characters": [{"id": "char_none"}]})


def test_16_what_has_expired_is_gone(tmp_path, make_server):
    server = make_server(tmp_path, keep_seconds=0.2)
    video = finished(server)
    assert video.expires_at is not None
    time.sleep(0.3)
    with pytest.raises(APIStatusError) as caught:
        server.openai().videos.download_content(video.id)
    assert (caught.value.status_code, caught.value.code) == (410, "video_expired")


def test_17_webhooks_are_signed_as_unwrap_wants_it_through_a_rotation(server):
    client = server.openai()
    made = client.webhooks.create(
        event_types=["video.completed"], name="mine", url="https://example.org/hook"
    )
    video = finished(server)
    server.deliver()
    url, headers, body = server.posts.sent.pop()
    event = client.webhooks.unwrap(body.decode(), headers, secret=made.signing_secret)
    assert (url, event.type, event.data.id) == (
        "https://example.org/hook",
        "video.completed",
        video.id,
    )
    rotated = client.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True)
    assert rotated.signing_secret != made.signing_secret
    finished(server)
    server.deliver()
    _, headers, body = server.posts.sent.pop()
    for secret in (made.signing_secret, rotated.signing_secret):
        client.webhooks.unwrap(body.decode(), headers, secret=secret)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(
            body.decode(), headers, secret="whsec_" + base64.b64encode(b"x" * 32).decode()
        )
    assert "signing_secret" not in client.webhooks.retrieve(made.id).model_dump(exclude_none=True)
    tried = client.webhooks.test(made.id, event_type="video.failed")
    assert (tried.success, tried.status_code) == (True, 200)
    assert [one.id for one in client.webhooks.list()] == [made.id]
    assert client.webhooks.delete(made.id).object == "webhook_endpoint.deleted"


def test_18_unknown_fields_are_tolerated(server):
    video = server.openai().videos.create(
        prompt="a cat", extra_body={"seed": 7, "metadata": {"a": "b"}, "user": "me", "loud": True}
    )
    assert video.seed == 7


def test_19_an_unknown_model_is_named(server):
    with pytest.raises(BadRequestError) as caught:
        server.openai().videos.create(prompt="a cat", model="sora-9")
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")


def test_20_a_missing_prompt_is_named(server):
    with pytest.raises(BadRequestError) as caught:
        server.openai().post("/videos", body={"seconds": "4"}, cast_to=Video)
    assert (caught.value.param, caught.value.code) == ("prompt", "missing_required_parameter")
    with pytest.raises(BadRequestError) as caught:
        server.openai().videos.create(prompt="  ")
    assert caught.value.param == "prompt"


def test_21_every_answer_has_an_id(server):
    http = server.http()
    answers = [
        http.get("/v1/models"),
        http.get("/nowhere"),
        http.put("/v1/videos"),
        http.get("/health"),
    ]
    answers.append(server.http("wrong").get("/v1/videos"))
    answers.append(http.get("/v1/videos", headers={"host": "evil.example"}))
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert all(re.fullmatch(r"req_[0-9a-f]{32}", id) for id in ids)
    assert len(set(ids)) == len(ids)
    with pytest.raises(NotFoundError) as caught:
        server.openai().videos.retrieve("video_none")
    assert caught.value.request_id == caught.value.response.headers["x-request-id"]


def test_22_who_has_no_key_is_told_so(server):
    for key in ("", "sk-sky-wrong", "sk-sky-0123456789ab-" + "a" * 43):
        answer = server.http(None).get("/v1/videos", headers={"authorization": f"Bearer {key}"})
        assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error")
    with pytest.raises(openai.AuthenticationError) as caught:
        server.openai("nonsense").videos.list()
    assert caught.value.code == "invalid_api_key"


def test_23_batches(server):
    from skyloom.serve.api.routes.batches import advance

    client = server.openai()
    bodies = [{"prompt": "a cat"}, {"prompt": "a dog", "seconds": "8"}, {"seconds": "4"}]
    lines = [
        json.dumps(
            {"custom_id": f"line-{index}", "method": "POST", "url": "/v1/videos", "body": body}
        )
        for index, body in enumerate(bodies)
    ]
    file = client.files.create(file=io.BytesIO("\n".join(lines).encode()), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/videos", completion_window="24h"
    )
    assert (batch.status, batch.request_counts.total) == ("in_progress", 3)
    for _ in range(2):
        advance(server.services)
    server.work()
    advance(server.services)
    ended = client.batches.retrieve(batch.id)
    assert (ended.status, ended.request_counts.completed, ended.request_counts.failed) == (
        "completed",
        2,
        1,
    )
    rows = [
        json.loads(line) for line in client.files.content(ended.output_file_id).text.splitlines()
    ]
    assert {row["custom_id"]: row["response"]["body"]["status"] for row in rows} == {
        "line-0": "completed",
        "line-1": "completed",
    }
    wrong = json.loads(client.files.content(ended.error_file_id).text)
    assert (wrong["custom_id"], wrong["response"]["body"]["error"]["param"]) == ("line-2", "prompt")
    assert [one.id for one in client.batches.list()] == [batch.id]


def test_24_every_spelling_of_a_reference(server):
    client = server.openai()
    file = client.files.create(file=("ref.png", PNG, "image/png"), purpose="vision")
    data = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
    videos = [
        client.videos.create(prompt="a cat", input_reference=("ref.png", PNG, "image/png")),
        client.videos.create(prompt="a cat", input_reference=io.BytesIO(PNG)),
        client.videos.create(prompt="a cat", extra_body={"input_reference": {"file_id": file.id}}),
        client.videos.create(prompt="a cat", extra_body={"input_reference": {"image_url": data}}),
        client.videos.create(
            prompt="a cat", extra_body={"input_reference": json.dumps({"file_id": file.id})}
        ),
        *(
            client.post("/videos", body={"prompt": "a cat", "input_reference": one}, cast_to=Video)
            for one in ({"file_id": file.id}, {"image_url": data}, data)
        ),
    ]
    images = {server.services.jobs.get(video.id).request["image"] for video in videos}
    assert len(images) == 1
    for url in ("https://example.org/a.png", "http://127.0.0.1/a.png", "file:///etc/passwd"):
        with pytest.raises(BadRequestError) as caught:
            client.post(
                "/videos",
                body={"prompt": "a", "input_reference": {"image_url": url}},
                cast_to=Video,
            )
        assert (caught.value.code, caught.value.param) == ("url_references_off", "input_reference")
    for bad in (
        {"file_id": "file-none"},
        {"file_id": file.id, "image_url": data},
        {},
        7,
        [],
        "data:text/html,x",
    ):
        with pytest.raises((BadRequestError, NotFoundError)):
            client.post("/videos", body={"prompt": "a", "input_reference": bad}, cast_to=Video)
    with pytest.raises(BadRequestError) as caught:
        client.videos.create(prompt="a cat", input_reference=b"<svg onload=alert(1)>")
    assert caught.value.code == "invalid_media"


def test_24_urls_are_fetched_where_the_settings_say_so(tmp_path, make_server):
    client = make_server(tmp_path, url_references=True).openai()
    body = {"prompt": "a", "input_reference": {"image_url": "https://example.org/a.png"}}
    assert client.post("/videos", body=body, cast_to=Video).status == "queued"
    body["input_reference"]["image_url"] = "https://169.254.169.254/a.png"
    with pytest.raises(BadRequestError) as caught:
        client.post("/videos", body=body, cast_to=Video)
    assert (caught.value.code, caught.value.param) == ("invalid_url", "input_reference")


def test_25_a_reference_of_another_size_is_taken_and_filled(server):
    """docs/server.md: the worker crops the picture to the frame; the server checks its type."""
    video = server.openai().videos.create(
        prompt="a cat", size="1280x720", input_reference=("a.png", PNG, "image/png")
    )
    assert (video.status, video.requested_size, video.size) == ("queued", "1280x720", "128x128")
    with pytest.raises(BadRequestError) as caught:
        server.openai().videos.create(prompt="a cat", model="diorama", size="1280x720")
    assert caught.value.param == "size"


def test_our_own_fields_reach_the_request(server):
    extra = {
        "seed": 7,
        "steps": 4,
        "negative_prompt": "fog",
        "fps": 8,
        "guidance": 2.5,
        "n": 3,
        "style": "at night",
    }
    video = server.openai().videos.create(
        prompt="a cat", model="diorama", seconds="2", extra_body=extra
    )
    request = server.services.jobs.get(video.id).request
    assert (request["seed"], request["num_steps"], request["negative_prompt"]) == (7, 4, "fog")
    assert (request["fps"], request["guidance_scale"], request["prompt"]) == (
        8,
        2.5,
        "a cat, at night",
    )
    seeds = {server.services.jobs.get(id).request["seed"] for id in video.variations}
    assert seeds == {8, 9}
    for field, value in (
        ("region", "0,0,8,8"),
        ("strength", 0.5),
        ("quality", "superb"),
        ("steps", 0),
        ("seed", -1),
    ):
        with pytest.raises(BadRequestError) as caught:
            server.openai().videos.create(prompt="a cat", extra_body={field: value})
        assert caught.value.param == field


def test_moderation_comes_before_any_work(server):
    with pytest.raises(BadRequestError) as caught:
        server.openai().videos.create(prompt="a forbidden cat")
    assert (caught.value.code, caught.value.param) == ("moderation_blocked", "prompt")
    assert "rule sexual (characters 2 to 11)" in str(caught.value)
    assert server.services.jobs.page() == ([], False)
    result = server.openai().moderations.create(input=["a cat", "forbidden"]).results
    assert [one.flagged for one in result] == [False, True]
    assert result[1].categories.sexual
    assert result[1].span == [0, 9]
    found = server.openai().content_provenance_checks.create(file=("a.png", PNG, "image/png"))
    assert found.results[0].outcome == "not_detected"


def test_models_can_be_listed(server):
    models = {model.id: model for model in server.openai().models.list()}
    assert {"sora-2", "sora-2-pro", "diorama"} <= set(models)
    assert (
        models["sora-2"].base_model
        == server.openai().models.retrieve("sora-2").base_model
        == "diorama"
    )


def test_an_answer_is_what_random_calls_agree_on(server):
    """The same body by form and by JSON becomes the same request."""
    source = random.Random(3)
    http = server.http()
    for _ in range(20):
        body = {
            "prompt": "a cat",
            "seed": source.randrange(2**40),
            "seconds": source.choice(["2", "4", "8"]),
        }
        ids = [
            http.post("/v1/videos", json=body).json()["id"],
            http.post("/v1/videos", data=body, files={"x": b""}).json()["id"],
        ]
        first, second = (server.services.jobs.get(id).request for id in ids)
        assert first == second
