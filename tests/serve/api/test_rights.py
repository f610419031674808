"""Keys, scopes and isolation of owners, over every route."""

import re

import pytest

from skyloom.core.errors import ConfigError, RequestError
from skyloom.serve.queue.api_keys import KeyStore, check_exposure
from skyloom.serve.queue.database import Database

MP4 = b"\x00\x00\x00\x18ftypisom" + bytes(2_000)
OPEN = {"/health", "/ready"}


def things_of(server, key: str) -> dict[str, str]:
    """One resource of each kind, by its path."""
    http = server.http(key)
    video = http.post("/v1/videos", json={"prompt": "a secret cat"}).json()["id"]
    server.work()
    character = http.post(
        "/v1/videos/characters",
        files={"name": (None, "Momo"), "video": ("m.mp4", MP4, "video/mp4")},
    ).json()["id"]
    line = b'{"custom_id":"1","method":"POST","url":"/v1/videos","body":{"prompt":"a secret cat"}}'
    file = http.post(
        "/v1/files", files={"file": ("b.jsonl", line), "purpose": (None, "batch")}
    ).json()["id"]
    batch = http.post(
        "/v1/batches",
        json={"input_file_id": file, "endpoint": "/v1/videos", "completion_window": "24h"},
    ).json()["id"]
    hook = {
        "url": "https://example.org/secret",
        "event_types": ["video.completed"],
        "name": "secret",
    }
    endpoint = http.post("/v1/webhook_endpoints", json=hook).json()["id"]
    return {
        "/v1/videos/{id}": video,
        "/v1/videos/characters/{id}": character,
        "/v1/files/{id}": file,
        "/v1/batches/{id}": batch,
        "/v1/webhook_endpoints/{id}": endpoint,
    }


BODIES = {
    "remix": {"prompt": "x"},
    "edits": {"prompt": "x"},
    "inpaint": {"prompt": "x", "region": "0,0,8,8"},
    "retake": {"prompt": "x", "start": 0, "stop": 1},
    "recut": {"start": 0, "stop": 1, "seconds": 4},
    "restyle": {"style": "at night"},
    "upscale": {"size": "256x256"},
    "interpolate": {"fps": 32},
}


def test_resources_of_another_owner_are_404(server):
    """Every route with an id is 404 for another owner and changes nothing."""
    mine, theirs = server.key("alice"), server.key("bob")
    things = things_of(server, mine)
    tried = 0
    for call in server.calls():
        if "{id}" not in call.path or call.path.startswith("/v1/models"):
            continue
        prefix = max((known for known in things if call.path.startswith(known)), key=len)
        path = call.path.replace("{id}", things[prefix])
        body = BODIES.get(call.path.rsplit("/", 1)[-1], {})
        kwargs = {"json": body} if call.method == "POST" else {}
        answer = server.http(theirs).request(call.method, path, **kwargs)
        assert answer.status_code == 404, (call.name, answer.text)
        assert not re.search(r"secret|alice", answer.text), call.name
        tried += 1
    assert tried == sum(
        "{id}" in call.path and not call.path.startswith("/v1/models") for call in server.calls()
    )
    for path in ("/v1/videos", "/v1/files", "/v1/batches", "/v1/webhook_endpoints"):
        assert server.http(theirs).get(path).json()["data"] == []
        assert len(server.http(mine).get(path).json()["data"]) == 1
    for known, id in things.items():
        assert server.http(mine).get(known.replace("{id}", id)).status_code == 200, known


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/videos/edits", {"prompt": "x", "video": {"id": "/v1/videos/{id}"}}),
        (
            "/v1/videos/extensions",
            {"prompt": "x", "seconds": "4", "video": {"id": "/v1/videos/{id}"}},
        ),
        ("/v1/videos/stitch", {"videos": [{"id": "/v1/videos/{id}"}, {"id": "/v1/videos/{id}"}]}),
        ("/v1/videos", {"prompt": "x", "input_reference": {"file_id": "/v1/files/{id}"}}),
        ("/v1/videos", {"prompt": "Momo", "characters": [{"id": "/v1/videos/characters/{id}"}]}),
        ("/v1/batches", {"endpoint": "/v1/videos", "input_file_id": "/v1/files/{id}"}),
        (
            "/v1/videos/storyboard",
            {"cards": [{"at": 0, "prompt": "x", "image": {"file_id": "/v1/files/{id}"}}]},
        ),
    ],
)
def test_references_to_another_owners_resources_are_404(server, path, body):
    things = things_of(server, server.key("alice"))

    def fill(value):
        if isinstance(value, dict):
            return {name: fill(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [fill(inner) for inner in value]
        return things.get(value, value) if isinstance(value, str) else value

    answer = server.http(server.key("bob")).post(path, json=fill(body))
    assert answer.status_code == 404, answer.text


def test_cursors_of_another_owner_are_404(server):
    things = things_of(server, server.key("alice"))
    http = server.http(server.key("bob"))
    for path in ("/v1/videos", "/v1/files", "/v1/batches"):
        assert http.get(path, params={"after": things[f"{path}/{{id}}"]}).status_code == 404


def test_every_route_but_health_and_ready_needs_a_key(server):
    for call in server.calls():
        status = server.http(None).request(call.method, call.path.replace("{id}", "x")).status_code
        assert status == (200 if call.path in OPEN else 401), call.name


def test_keys_are_limited_to_their_scopes(server):
    reader, writer = server.key("alice", "read"), server.key("alice", "write")
    for call in server.calls():
        for key, scope in ((reader, "read"), (writer, "write")):
            answer = server.http(key).request(call.method, call.path.replace("{id}", "x"))
            forbidden = call.scope not in ("", scope)
            assert (answer.status_code == 403) == forbidden, (call.name, scope)
    assert server.http(server.key("root", "admin")).get("/metrics").status_code == 200


def test_keys_are_stored_as_hashes_and_expire(tmp_path):
    now = [1_000.0]
    database = Database(f"sqlite:///{tmp_path / 'keys.db'}", clock=lambda: now[0])
    keys = KeyStore(database)
    _, text = keys.create("alice", name="laptop", seconds=60)
    assert re.fullmatch(r"sk-sky-[0-9a-f]{12}-[\w-]{43}", text)
    assert keys.authenticate(f"Bearer {text}").owner == "alice"
    assert keys.list()[0].last_used_at == 1_000.0
    database.close()
    raw = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert text.encode() not in raw
    assert text.split("-", 3)[-1].encode() not in raw
    now[0] += 61
    with pytest.raises(Exception, match="expired"):
        keys.authenticate(f"Bearer {text}")
    fresh, secret = keys.create("alice")
    keys.revoke(fresh.id)
    with pytest.raises(Exception, match="not valid"):
        keys.authenticate(f"Bearer {secret}")
    assert not keys.usable()
    for owner in ("", "a b", "../x", "x" * 101):
        with pytest.raises(RequestError):
            keys.create(owner)
    with pytest.raises(RequestError):
        keys.create("alice", scopes=["root"])
    with pytest.raises(RequestError):
        keys.revoke("none")
    database.close()


def test_listening_beyond_loopback_needs_a_key(tmp_path):
    database = Database(f"sqlite:///{tmp_path / 'keys.db'}")
    keys = KeyStore(database, "token")
    check_exposure("127.0.0.1", keys)
    with pytest.raises(ConfigError, match="no API key"):
        check_exposure("0.0.0.0", keys)
    keys.create("alice")
    check_exposure("0.0.0.0", keys)
    database.close()
