"""Checks before a job is queued: fields, one call of the policy, then quotas, then media."""

import base64

import pytest

from skyloom.generate import validate
from skyloom.safety.moderation import ModerationResult
from skyloom.serve.api.model_aliases import find_model_alias
from skyloom.serve.api.request_models import CreateVideoBody, parse_body

PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)
DATA_URL = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
CARDS = [{"at": 0, "prompt": "a cat"}, {"at": 2, "prompt": "a dog", "cut": True}]


@pytest.fixture
def texts(server, monkeypatch) -> list[str]:
    """The texts of all calls of the policy, from the API and from generate/validate.py."""
    seen: list[str] = []

    def check(text: str) -> ModerationResult:
        seen.append(text)
        start = text.find("forbidden")
        span = None if start < 0 else (start, start + len("forbidden"))
        return ModerationResult(span is None, "own", span, "Not allowed.")

    monkeypatch.setattr(server.services.checks, "_check_policy", check)
    monkeypatch.setattr(validate, "refuse_prompt", seen.append)
    return seen


@pytest.mark.parametrize(
    ("path", "body", "checked"),
    [
        ("", {"prompt": "a cat"}, "a cat"),
        ("", {"prompt": "a cat", "n": 3}, "a cat"),
        ("", {"prompt": "a cat", "style": "in fog"}, "a cat\na cat, in fog"),
        ("", {"prompt": "at night", "storyboard": CARDS}, "at night\na cat\na dog"),
        ("/storyboard", {"cards": CARDS}, "a cat\na dog"),
        ("/plan", {"prompt": "a cat"}, "a cat"),
    ],
)
def test_the_policy_is_called_once_for_each_call(server, texts, path, body, checked):
    assert server.http().post(f"/v1/videos{path}", json=body).status_code == 200
    assert texts == [checked]


def test_the_policy_is_called_once_for_an_edit(server, texts):
    http = server.http()
    id = http.post("/v1/videos", json={"prompt": "a cat"}).json()["id"]
    server.work()
    texts.clear()
    body = {"prompt": "a dog", "style": "in fog"}
    for verb, fields in (("remix", {"prompt": "a dog"}), ("restyle", body), ("loop", {})):
        assert http.post(f"/v1/videos/{id}/{verb}", json=fields).status_code == 200
    assert texts == ["a dog", "a dog\nin fog", "a cat"]


def test_the_worker_checks_the_prompt_again(server, texts):
    request, metadata = server.services.submitter.plan(
        parse_body(CreateVideoBody, {"prompt": "a cat"})
    )
    texts.clear()
    alias = find_model_alias(server.services.settings, metadata.model)
    validate.resolve_defaults(request, alias.info)
    assert texts == ["a cat\n"]


def test_a_refusal_names_the_place_in_its_own_text(server, texts):
    cards = [CARDS[0], {**CARDS[1], "prompt": "a forbidden dog"}]
    body = {"prompt": "at night", "storyboard": cards}
    error = server.http().post("/v1/videos", json=body).json()["error"]
    assert error["code"] == "moderation_blocked"
    assert "(characters 2 to 11)" in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("", {"prompt": "a cat", "size": "1x1x1"}, "size"),
        ("", {"prompt": "a cat", "steps": 9_999}, "steps"),
        ("", {"prompt": "a cat", "model": "none"}, "model"),
        ("", {"prompt": "a cat", "input_reference": "data:image/png;base64,!"}, "input_reference"),
        ("", {"prompt": "a cat", "consent": {"who": "ada"}}, "consent"),
        ("/storyboard", {"cards": [{"at": 0}]}, "storyboard"),
        ("/edits", {"prompt": "a cat"}, "video"),
    ],
)
def test_fields_are_validated_before_quotas(make_server, tmp_path, path, body, param):
    http = make_server(tmp_path, max_queued_per_owner=1).http()
    assert http.post("/v1/videos", json={"prompt": "a cat"}).status_code == 200
    assert http.post("/v1/videos", json={"prompt": "a cat"}).status_code == 429
    answer = http.post(f"/v1/videos{path}", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_no_media_is_stored_or_fetched_over_a_quota(make_server, tmp_path):
    server = make_server(tmp_path, max_queued_per_owner=1, url_references=True)
    http = server.http()
    assert http.post("/v1/videos", json={"prompt": "a cat"}).status_code == 200

    def fetch(url: str) -> bytes:
        raise AssertionError(f"fetched {url}")

    server.services.media._fetch = fetch
    card = {"at": 0, "prompt": "a cat", "image": DATA_URL}
    remote = {"image_url": "https://example.org/a.png"}
    rejected = [
        http.post("/v1/videos", json={"prompt": "a cat", "input_reference": DATA_URL}),
        http.post("/v1/videos", json={"prompt": "a cat", "input_reference": remote}),
        http.post("/v1/videos/storyboard", json={"cards": [card]}),
    ]
    assert {answer.json()["error"]["code"] for answer in rejected} == {"queued_jobs_quota_exceeded"}
    assert not [path for path in (tmp_path / "assets").rglob("*") if path.is_file()]


def test_media_is_stored_after_the_checks_and_named_in_the_request(server):
    card = {"at": 0, "prompt": "a cat", "image": DATA_URL}
    http = server.http()
    calls = (
        ("", {"prompt": "a cat", "input_reference": DATA_URL}),
        ("", {"prompt": "a cat", "input_reference": DATA_URL, "strength": 0.5}),
        ("/storyboard", {"cards": [card]}),
    )
    for path, body in calls:
        answer = http.post(f"/v1/videos{path}", json=body)
        assert answer.status_code == 200
        request = server.services.jobs.get(answer.json()["id"]).request
        image = request.get("image") or request["cards"][0]["image"]
        assert image.startswith("asset:")
        assert image.endswith(".png")


@pytest.mark.parametrize(
    "loras", [["felt:0.5"], "felt:0.5", [{"name": "felt", "weight": 0.5}], '["felt:0.5"]']
)
def test_loras_of_the_settings_are_part_of_the_request(make_server, tmp_path, loras):
    server = make_server(tmp_path, loras={"felt": str(tmp_path / "felt.safetensors")})
    video = server.http().post("/v1/videos", json={"prompt": "a cat", "loras": loras}).json()
    expected = [{"name": "felt", "weight": 0.5}]
    assert (video["loras"], server.services.jobs.get(video["id"]).request["loras"]) == (
        expected,
        expected,
    )
    assert server.http().post("/v1/videos", json={"prompt": "a cat"}).json()["loras"] == []


def test_loras_are_names_of_the_settings_only(make_server, tmp_path):
    file = tmp_path / "felt.safetensors"
    file.write_bytes(b"a file of this host")
    server = make_server(tmp_path, loras={"felt": str(file)})
    http = server.http()
    id = http.post("/v1/videos", json={"prompt": "a cat"}).json()["id"]
    server.work()
    for lora in (str(file), "ink", "felt:11", {"name": "felt", "weight": "x"}, 3, ["felt"]):
        body = {"prompt": "a dog", "loras": [lora]}
        for path in ("", "/plan", f"/{id}/remix"):
            answer = http.post(f"/v1/videos{path}", json=body)
            assert answer.status_code == 400, (lora, path)
            assert answer.json()["error"]["param"].startswith("loras")
    body = {"size": "512x512", "loras": ["felt"]}
    error = http.post(f"/v1/videos/{id}/upscale", json=body).json()["error"]
    assert (error["param"], error["code"]) == ("loras", "unsupported_parameter")


def test_another_lora_is_another_call(make_server, tmp_path):
    http = make_server(tmp_path, loras={"felt": "/felt", "ink": "/ink"}).http()
    headers = {"idempotency-key": "k"}
    for loras, status in ((["felt"], 200), (["felt:1"], 200), (["ink"], 409), ([], 409)):
        body = {"prompt": "a cat", "loras": loras}
        assert http.post("/v1/videos", json=body, headers=headers).status_code == status
