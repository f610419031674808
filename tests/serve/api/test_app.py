"""The application as a whole: HEAD, unknown paths and methods, and invalid parameters."""

import pytest


def test_head_has_the_headers_of_get_and_no_side_effects(server):
    http = server.http()
    http.post("/v1/videos", json={"prompt": "a cat"})
    for path in ("/health", "/v1/videos", "/v1/models/sora-2", "/openapi.json"):
        head, get = http.head(path), http.get(path)
        assert head.status_code == 200
        for name in ("content-type", "content-length"):
            assert head.headers[name] == get.headers[name]
    assert http.head("/v1/videos/none").status_code == 404
    assert http.head("/v1/videos/plan/x").status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "status", "code", "param"),
    [
        ("GET", "/nowhere", 404, "not_found", None),
        ("PUT", "/v1/videos", 405, "method_not_allowed", None),
        ("PATCH", "/v1/models/sora-2", 405, "method_not_allowed", None),
        ("HEAD", "/v1/videos/plan", 404, "not_found", None),  # no video has that id
        ("GET", "/v1/videos?order=up", 400, "invalid_value", "order"),
        ("GET", "/v1/videos?after=a/b", 400, "invalid_value", "after"),
        ("GET", "/v1/files?purpose=x", 400, "invalid_value", "purpose"),
        ("GET", "/v1/videos/video_1/content?variant=gif", 400, "invalid_value", "variant"),
    ],
)
def test_refused_requests_have_the_envelope(server, method, path, status, code, param):
    answer = server.http().request(method, path)
    assert answer.status_code == status
    assert answer.headers["x-request-id"].startswith("req_")
    if method != "HEAD":
        error = answer.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert (error["type"], error["code"], error["param"]) == (
            "invalid_request_error",
            code,
            param,
        )
    if status == 405:
        assert "POST" in answer.headers["allow"] or "GET" in answer.headers["allow"]


def test_unexpected_errors_are_counted(server, monkeypatch):
    def fail(*_):
        raise RuntimeError("unexpected")

    monkeypatch.setattr(type(server.services.jobs), "get", fail)
    assert server.http().get("/v1/videos/video_1").status_code == 500
    metrics = server.http().get("/metrics").text
    assert 'skyloom_answers_total{call="GET /v1/videos/{id}",status="500"} 1.0' in metrics
