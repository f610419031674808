"""Limits over HTTP: threads, bodies, disk, numbers."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from starlette.datastructures import QueryParams

from skyloom.core.errors import SkyloomError
from skyloom.serve.api.limits import LIMITS, ConcurrencyLimiters
from skyloom.serve.api.numbers import find_number, find_whole, plain_number

PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)
DATA_URL = "data:image/png;base64,iVBORw0KGgoAAAAA"


def asking(call, count):
    """So many calls at once, as they are answered."""
    with ThreadPoolExecutor(count) as pool:
        yield from pool.map(lambda _: call(), range(count))


def test_hanging_webhook_test_blocks_no_other_route(server, monkeypatch):
    hook = {"url": "https://example.org/", "event_types": ["video.failed"]}
    id = server.http().post("/v1/webhook_endpoints", json=hook).json()["id"]
    go, begun = threading.Event(), threading.Semaphore(0)
    posts = server.posts.__class__.__call__

    def hang(self, url, headers, body):
        begun.release()
        go.wait()
        return posts(self, url, headers, body)

    monkeypatch.setattr(server.posts.__class__, "__call__", hang)
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(server.http().post, f"/v1/webhook_endpoints/{id}/test", json={})
        try:
            assert begun.acquire(timeout=120)
            refused = [
                server.http().post(f"/v1/webhook_endpoints/{id}/test", json={}) for _ in range(43)
            ]
            assert {answer.status_code for answer in refused} == {429}
            assert {answer.json()["error"]["code"] for answer in refused} == {"rate_limit_exceeded"}
            assert all("retry-after" in answer.headers for answer in refused)
            for path in ("/health", "/ready", "/metrics", "/v1/videos"):
                assert server.http().get(path).status_code == 200
        finally:
            go.set()
        assert held.result().status_code == 200


@pytest.mark.parametrize(
    "kind", [kind for kind, limit in LIMITS.items() if kind not in ("auth", "metrics")]
)
def test_health_and_metrics_answer_while_a_limit_is_full(server, kind):
    gate = server.services.limiters[kind]
    gate._running["mallory"] = LIMITS[kind].total
    assert server.http(None).get("/health").status_code == 200
    assert server.http().get("/metrics").status_code == 200


def test_health_needs_no_thread(server, monkeypatch):
    def no_thread(*_arguments, **_options):
        raise SkyloomError("a thread was asked for")

    monkeypatch.setattr(ConcurrencyLimiters, "__getitem__", no_thread)
    assert server.http(None).get("/health").status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        {"input_reference": {"image_url": DATA_URL}},
        {"input_reference": {"image_url": "https://x/a.png"}},
    ],
)
def test_requests_with_media_have_the_limit_of_uploads(server, body):
    server.services.limiters["upload"]._running["local"] = LIMITS["upload"].total
    asked = {"prompt": "a cat", **body}
    gate = server.services.limiters["upload"]
    gate._limit = LIMITS["plan"]  # nobody waits
    assert server.http().post("/v1/videos", json=asked).status_code == 429
    assert server.http().post("/v1/videos", json={"prompt": "a cat"}).status_code == 200
    form = {"prompt": (None, "a cat"), "input_reference": ("a.png", PNG)}
    assert server.http().post("/v1/videos", files=form).status_code == 429


def test_moderated_pictures_have_the_limit_of_inspections(server):
    gate = server.services.limiters["inspect"]
    gate._running["alice"] = LIMITS["inspect"].total
    pictures = [{"type": "image_url", "image_url": {"url": DATA_URL}}]
    assert server.http().post("/v1/moderations", json={"input": pictures}).status_code == 429
    assert server.http().post("/v1/moderations", json={"input": "a cat"}).status_code == 200


def test_stream_releases_its_place(server):
    http, gate = server.http(), server.services.limiters["stream"]
    id = http.post("/v1/videos", json={"prompt": "a cat"}).json()["id"]
    server.work()
    for _ in range(3):
        assert http.get(f"/v1/videos/{id}/events").status_code == 200
        assert http.head(f"/v1/videos/{id}/events").status_code == 200
        assert http.get("/v1/videos/none/events").status_code == 404
    assert gate.running == 0
    gate._running["local"] = LIMITS["stream"].per_owner
    assert http.get(f"/v1/videos/{id}/events").status_code == 429


LIMIT_TRICKS = [
    "000000000000005",
    "000000001999999",
    "1_0",
    "+5",
    " 5",
    "5 ",
    "5.0",
    "\u0665",
    "\uff15",
    "0x5",
    "-1",
    "0",
    "101",
]
LIMIT_TRICKS += ["", "1e1", "9" * 5_000, "5\x00"]


@pytest.mark.parametrize("text", LIMIT_TRICKS)
@pytest.mark.parametrize("path", ["/v1/videos", "/v1/files", "/v1/batches"])
def test_limit_parameter_has_one_grammar(server, path, text):
    answer = server.http().get(path, params={"limit": text})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "limit")
    assert "must be a whole number from 1 to 100, got" in answer.json()["error"]["message"]
    assert len(answer.json()["error"]["message"]) < 200


def test_limit_parameter_takes_1_to_100(server):
    for text in ("1", "20", "100"):
        assert (
            server.http().get("/v1/videos", params=QueryParams({"limit": text})).status_code == 200
        )


NUMBER_TRICKS = [
    "1_0",
    "010",
    "+5",
    " 5 ",
    "\u0665",
    "\uff15",
    "0x5",
    "1e",
    ".5",
    "5.",
    "inf",
    "nan",
    "1" * 400,
]


@pytest.mark.parametrize("text", NUMBER_TRICKS)
@pytest.mark.parametrize("name", ["seconds", "seed", "fps", "steps", "guidance", "n", "strength"])
def test_numbers_in_bodies_have_one_grammar(server, name, text):
    answer = server.http().post("/v1/videos", files={"prompt": (None, "a cat"), name: (None, text)})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)


@pytest.mark.parametrize("text", ["00", "1_0", "\u0665", "+1", "1" * 19])
def test_last_event_id_has_the_grammar_of_numbers(server, text):
    http = server.http()
    id = http.post("/v1/videos", json={"prompt": "a cat"}).json()["id"]
    server.stopping.set()
    assert (
        http.get(f"/v1/videos/{id}/events", headers={"last-event-id": text.encode()}).status_code
        == 400
    )


def test_numbers():
    assert [find_whole(text) for text in ("0", "7", "100", "00", "-1", "")] == [
        0,
        7,
        100,
        None,
        None,
        None,
    ]
    assert [find_number(text) for text in ("0", "-1.5", "1e3", "1E-2")] == [0.0, -1.5, 1000.0, 0.01]
    assert [plain_number(value) for value in ("8", "-8", "8.5", 7, None)] == [8, -8, 8.5, 7, None]
    assert isinstance(plain_number("8"), int)


def test_uploads_stop_at_the_disk_reserve(make_server, tmp_path):
    server = make_server(tmp_path, disk_reserve=2**60)
    http = server.http()
    assert (http.get("/ready").status_code, http.get("/ready").json()["status"]) == (
        503,
        "disk_full",
    )
    sent = {"file": ("a.png", PNG), "purpose": (None, "vision")}
    answers = [
        http.post("/v1/files", files=sent),
        http.post(
            "/v1/videos", files={"prompt": (None, "a cat"), "input_reference": ("a.png", PNG)}
        ),
        http.post(
            "/v1/videos", json={"prompt": "a cat", "input_reference": {"image_url": DATA_URL}}
        ),
    ]
    assert {(answer.status_code, answer.json()["error"]["code"]) for answer in answers} == {
        (429, "disk_full")
    }
    assert not [path for path in (tmp_path / "assets").rglob("*") if path.is_file()]


def test_uploads_below_the_disk_reserve_are_not_read(make_server, tmp_path):
    server, read = make_server(tmp_path, disk_reserve=2**60), []

    def body():
        read.append(True)
        yield b"--X\r\n"

    kind = {"content-type": "multipart/form-data; boundary=X"}
    answer = server.http().post("/v1/files", content=body(), headers=kind)
    assert answer.json()["error"]["code"] == "disk_full"
    assert not read


def test_bytes_in_flight_are_limited_and_released(make_server, tmp_path):
    server = make_server(tmp_path, max_body_bytes=4_000, max_body_bytes_per_owner=2_000)
    http = server.http()
    long = json.dumps({"prompt": "a" * 3_000})
    assert (
        http.post(
            "/v1/videos", content=long, headers={"content-type": "application/json"}
        ).status_code
        == 429
    )
    for _ in range(5):
        assert http.post("/v1/videos", json={"prompt": "a" * 1_000}).status_code == 200
    assert (server.services.bodies.reserved, server.services.memory.reserved) == (0, 0)


def test_content_length_with_transfer_encoding_is_refused(server):
    headers = {
        "transfer-encoding": "chunked",
        "content-length": "2",
        "content-type": "application/json",
    }
    answer = server.http().post("/v1/videos", content=b"{}", headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_header")
    assert answer.headers["connection"] == "close"
