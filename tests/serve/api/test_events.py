"""Server-sent events, and what the server tells of itself."""

import json
import re

import pytest

from skyloom.serve.api.app import CALLS
from skyloom.serve.health import WorkerHealth


def told(text: str) -> list[tuple[int, str, dict]]:
    """Events as (number, type, data)."""
    found = re.findall(r"id: (\d+)\nevent: (\S+)\ndata: (.*)\n\n", text)
    return [(int(number), kind, json.loads(data)) for number, kind, data in found]


def test_events_tell_a_videos_whole_life_and_go_on_after_the_last_that_was_seen(server):
    http = server.http()
    id = http.post("/v1/videos", json={"prompt": "a cat"}).json()["id"]
    server.work()
    answer = http.get(f"/v1/videos/{id}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = told(answer.text)
    assert next(kind for _, kind, _ in events) == "video.queued"
    assert [kind for _, kind, _ in events][-1] == "video.completed"
    assert events[-1][2]["video"]["progress"] == 100
    rest = told(
        http.get(f"/v1/videos/{id}/events", headers={"last-event-id": str(events[0][0])}).text
    )
    assert rest == events[1:]
    assert http.get(f"/v1/videos/{id}/events", headers={"last-event-id": "x"}).status_code == 400
    assert server.http(server.key("bob")).get(f"/v1/videos/{id}/events").status_code == 404


def test_events_end_when_the_server_stops(server):
    id = server.http().post("/v1/videos", json={"prompt": "a cat"}).json()["id"]
    server.stopping.set()
    assert server.http().get(f"/v1/videos/{id}/events").text == ""


def test_health_and_readiness(server):
    http = server.http(None)
    assert http.get("/health").json() == {"status": "ok", "workers": 1, "restarts": 0}
    server.children[0] = WorkerHealth(expected=1, alive=0, restarts=2)
    assert http.get("/health").json() == {"status": "degraded", "workers": 0, "restarts": 2}
    assert http.get("/ready").json()["status"] == "no_workers"
    server.work()
    assert http.get("/ready").json() == {"status": "ready", "workers": 1, "queued": 0}
    server.stopping.set()
    assert http.get("/ready").status_code == 503


def test_metrics_count_answers_and_jobs_and_say_nothing_else(server):
    http = server.http()
    id = http.post("/v1/videos", json={"prompt": "a canary cat"}).json()["id"]
    http.get(f"/v1/videos/{id}")
    text = http.get("/metrics").text
    assert 'skyloom_answers_total{call="POST /v1/videos",status="200"} 1.0' in text
    assert 'skyloom_jobs{status="queued"} 1.0' in text
    assert "canary" not in text
    assert id not in text


def test_logs_hold_no_secret_and_no_prompt(server, caplog):
    """A canary in every text that a client can send."""
    caplog.set_level("DEBUG")
    key = server.key("alice")
    http = server.http(key)
    http.post("/v1/videos", json={"prompt": "canary prompt", "negative_prompt": "canary"})
    http.post("/v1/videos", json={"prompt": 3, "canary": "canary"})
    http.get("/v1/videos/canary?canary=1", headers={"x-canary": "canary"})
    http.post("/v1/files", files={"file": ("canary.png", b"\x89PNG\r\n\x1a\n" + bytes(9))})
    hook = {"url": "https://canary.example/", "event_types": ["video.completed"]}
    secret = http.post("/v1/webhook_endpoints", json=hook).json()["signing_secret"]
    ours = [record for record in caplog.records if record.name.startswith("skyloom")]
    assert ours
    said = " ".join(f"{record.getMessage()} {vars(record)}" for record in ours)
    assert "canary" not in said
    assert key not in said
    assert secret not in said


def test_prompts_are_logged_where_the_settings_say_so(tmp_path, make_server, caplog):
    caplog.set_level("INFO")
    server = make_server(tmp_path, log_prompts=True)
    server.http().post("/v1/videos", json={"prompt": "a canary"})
    assert any(getattr(record, "prompt", None) == "a canary" for record in caplog.records)


def test_what_nobody_foresaw_is_told_by_its_id_only(server, monkeypatch):
    def break_down(*_):
        raise RuntimeError("/root/secret")

    monkeypatch.setattr(type(server.services.jobs), "get", break_down)
    answer = server.http().get("/v1/videos/video_1")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] in answer.json()["error"]["message"]


def test_the_document_has_every_call_and_every_call_answers_by_it(server):
    document = server.http(None).get("/openapi.json").json()
    listed = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    assert listed == {(call.method, call.path) for call in CALLS}
    references = re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document))
    assert set(references) <= set(document["components"]["schemas"])


@pytest.mark.parametrize("path", ["/v1/videos/", "/v1//videos", "/V1/videos", "/v1/videos/x/y/z"])
def test_paths_are_exact(server, path):
    assert server.http().get(path).status_code == 404
