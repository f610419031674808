"""Quotas: limits hold under concurrency; errors name the quota, its usage and its limit."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pytest

from skyloom.core.errors import CapacityError
from skyloom.serve.queue.batches import BatchStore, Line
from skyloom.serve.queue.database import Database
from skyloom.serve.queue.jobs import JobStore
from skyloom.serve.queue.leases import Leases
from skyloom.serve.queue.library import CharacterLikeness, Library
from skyloom.serve.queue.quotas import MIN_COST, QUOTAS, QuotaError, Quotas, job_cost
from skyloom.serve.queue.webhooks import EndpointStore
from skyloom.serve.settings import UNLIMITED_BY_ZERO, Settings

THREADS = 8
LIMITS = {name: 3 for name in QUOTAS} | {"file_bytes": 30, "queued_cost": 30}


def limited(folder: Path, **limits: int) -> Settings:
    """Settings with these quotas only."""
    settings = {quota.setting: limits.get(name, 0) for name, quota in QUOTAS.items()}
    return Settings(data=folder, **settings)


def maker(database: Database, settings: Settings, name: str):
    """Return a call that uses one unit (or ten) of a quota for an owner."""
    quotas, jobs = Quotas(settings), JobStore(database, settings)
    library, batches = Library(database, quotas), BatchStore(database, jobs, quotas)
    endpoints = EndpointStore(database, quotas)
    return {
        "queued_jobs": lambda owner: jobs.submit({"prompt": "x"}, owner=owner),
        "queued_cost": lambda owner: jobs.submit({"prompt": "x"}, owner=owner, cost=10.0),
        "files": lambda owner: library.add_file(owner, "vision", "a.png", "asset:a.png", 10),
        "file_bytes": lambda owner: library.add_file(owner, "vision", "a.png", "asset:a.png", 10),
        "characters": lambda owner: library.add_character(
            owner, "Mossy", "asset:a.mp4", CharacterLikeness()
        ),
        "batches": lambda owner: batches.create(owner, "file-1", {}, [Line("a", {"prompt": "x"})]),
        "webhooks": lambda owner: endpoints.add(
            owner, "a", "https://example.org", ["video.completed"]
        ),
    }[name]


@pytest.mark.parametrize("name", QUOTAS)
def test_concurrent_calls_do_not_exceed_a_quota(database, tmp_path, name: str):
    settings = limited(tmp_path, **{name: LIMITS[name]})
    make, gate = maker(database, settings, name), Barrier(THREADS)

    def ask(_: int) -> QuotaError | None:
        gate.wait()
        try:
            make("ada")
        except QuotaError as error:
            return error
        return None

    with ThreadPoolExecutor(THREADS) as clients:
        refusals = [error for error in clients.map(ask, range(THREADS)) if error is not None]
    assert len(refusals) == THREADS - 3
    assert {error.quota for error in refusals} == {name}
    assert f"{LIMITS[name]} of {LIMITS[name]} {QUOTAS[name].unit}" in refusals[0].message
    assert QUOTAS[name].setting in refusals[0].message
    assert (refusals[0].retry_after is not None) == name.startswith("queued")
    make("bob")  # an owner's own


@pytest.mark.parametrize("name", QUOTAS)
def test_a_limit_of_0_is_unlimited(database, tmp_path, name: str):
    make = maker(database, limited(tmp_path), name)
    for _ in range(12):
        make("ada")


def test_every_quota_can_be_unlimited():
    assert {quota.setting for quota in QUOTAS.values()} <= set(UNLIMITED_BY_ZERO)


def test_deleted_and_ended_things_free_their_quota(database, tmp_path, clock):
    settings = limited(tmp_path, **LIMITS)
    jobs, library = JobStore(database, settings), Library(database, Quotas(settings))
    made = [jobs.submit({"prompt": "x"}, owner="ada", cost=10.0).id for _ in range(3)]
    with pytest.raises(QuotaError):
        jobs.submit({"prompt": "x"}, owner="ada", cost=1.0)
    jobs.cancel(made[0])
    made.append(jobs.submit({"prompt": "x"}, owner="ada", cost=9.0).id)
    with pytest.raises(QuotaError):
        jobs.retry(made[0])  # counts like a new one
    jobs.cancel(made[1])
    jobs.retry(made[0])
    files = [library.add_file("ada", "vision", "a", "asset:a.png", 10) for _ in range(3)]
    library.delete_file(files[0].id, "ada")
    library.add_file("ada", "vision", "a", "asset:a.png", 10)
    make = maker(database, settings, "batches")
    for _ in range(3):
        make("ada")
    with pytest.raises(QuotaError):
        make("ada")
    clock.turn(86_401)
    with pytest.raises(QuotaError):  # they still run
        make("ada")


def test_running_jobs_count(database, tmp_path):
    settings = limited(tmp_path, queued_cost=30)
    jobs, leases = JobStore(database, settings), Leases(database, settings)
    jobs.submit({"prompt": "x"}, owner="ada", cost=25.0)
    assert leases.lease("w") is not None
    with pytest.raises(QuotaError):
        jobs.submit({"prompt": "x"}, owner="ada", cost=6.0)
    jobs.submit({"prompt": "x"}, owner="ada", cost=5.0)


def test_a_repeated_call_does_not_count_twice(database, tmp_path):
    jobs = JobStore(database, limited(tmp_path, queued_jobs=1))
    first = jobs.submit({"prompt": "x"}, owner="ada", key="k", fingerprint="f")
    assert jobs.submit({"prompt": "x"}, owner="ada", key="k", fingerprint="f").id == first.id


def test_a_job_over_the_whole_quota_has_no_retry_after(database, tmp_path):
    jobs = JobStore(database, limited(tmp_path, queued_cost=30))
    with pytest.raises(QuotaError) as refusal:
        jobs.submit({"prompt": "x"}, owner="ada", cost=31.0)
    assert refusal.value.retry_after is None
    assert "ask for 31 more" in refusal.value.message


def test_job_cost():
    assert job_cost(1, 128, 128, 4) == 1
    assert job_cost(3_600, 128, 128, 50) == 45_000
    assert job_cost(4, 1280, 720, 20) == 1_125
    assert job_cost(0, 128, 128, 4) == MIN_COST


# By the wire


def code_of(answer) -> str:
    """The error's code of a refusal."""
    assert answer.status_code == 429, answer.text
    assert answer.json()["error"]["type"] == "rate_limit_error"
    return answer.json()["error"]["code"]


@pytest.fixture
def serve(tmp_path):
    """Makes servers with other settings; clients of it."""
    from ..api.conftest import make_server

    made = []

    def start(**changes):
        made.append(make_server(tmp_path, **changes))
        return made[-1]

    yield start
    for server in made:
        server.services.database.close()


def stored(server) -> int:
    """How many files the storage has."""
    return len([path for path in server.services.storage.folder.rglob("*") if path.is_file()])


def test_a_hundred_hours_are_not_queued_by_default(serve):
    client = serve().http()
    body = {"prompt": "a cat", "model": "diorama", "seconds": "3600", "steps": 50}
    answers = [client.post("/v1/videos", json={**body, "seed": seed}) for seed in range(100)]
    assert [answer.status_code for answer in answers[:3]] == [200, 200, 429]
    assert {code_of(answer) for answer in answers[2:]} == {"queued_cost_quota_exceeded"}
    assert answers[2].headers["retry-after"]
    assert "90,000 of 100,000" in answers[2].json()["error"]["message"]
    assert (
        client.post("/v1/videos", json={"prompt": "a cat"}).status_code == 200
    )  # small ones still fit


def test_variations_are_all_submitted_or_none(serve):
    server = serve(max_queued_per_owner=3)
    assert (
        code_of(server.http().post("/v1/videos", json={"prompt": "a cat", "n": 4}))
        == "queued_jobs_quota_exceeded"
    )
    assert server.services.jobs.counts().by_status == {}


def test_a_storyboard_costs_as_much_as_a_video(serve):
    client = serve(max_queued_cost_per_owner=100).http()
    cards = [{"at": 0, "prompt": "a cat"}]
    body = {"cards": cards, "model": "diorama", "seconds": "60", "steps": 50}
    assert code_of(client.post("/v1/videos/storyboard", json=body)) == "queued_cost_quota_exceeded"


def test_edits_of_uploaded_videos_count_as_a_minute(serve):
    from ..api.conftest import MP4

    client = serve(max_queued_cost_per_owner=100).http()
    form = {"prompt": "a dog", "model": "diorama", "steps": "50"}
    refused = client.post("/v1/videos/edits", data=form, files={"video": ("a.mp4", MP4)})
    assert code_of(refused) == "queued_cost_quota_exceeded"


def test_uploads_over_quota_are_rejected_before_they_are_stored(serve):
    from ..api.conftest import MP4, PNG

    server = serve(max_files_per_owner=1, max_characters_per_owner=1, max_queued_per_owner=1)
    client = server.http()
    assert (
        client.post(
            "/v1/files", data={"purpose": "vision"}, files={"file": ("a.png", PNG)}
        ).status_code
        == 200
    )
    assert client.post("/v1/videos", json={"prompt": "a cat"}).status_code == 200
    clip = {"video": ("a.mp4", MP4)}
    assert (
        client.post("/v1/videos/characters", data={"name": "Mossy"}, files=clip).status_code == 200
    )
    before, seen = stored(server), len(server.viewer.asked)
    refused = client.post(
        "/v1/files", data={"purpose": "vision"}, files={"file": ("b.png", PNG + b"b")}
    )
    assert code_of(refused) == "files_quota_exceeded"
    assert refused.headers["x-should-retry"] == "false"
    assert "retry-after" not in refused.headers
    other = {"video": ("b.mp4", MP4 + b"b")}
    assert (
        code_of(client.post("/v1/videos/characters", data={"name": "B"}, files=other))
        == "characters_quota_exceeded"
    )
    picture = {"input_reference": ("c.png", PNG + b"c")}
    refused = client.post("/v1/videos", data={"prompt": "a cat"}, files=picture)
    assert code_of(refused) == "queued_jobs_quota_exceeded"
    assert refused.headers["x-ratelimit-limit-requests"] == "1"
    assert (
        code_of(client.post("/v1/videos/edits", data={"prompt": "a"}, files=other))
        == "queued_jobs_quota_exceeded"
    )
    assert (stored(server), len(server.viewer.asked)) == (before, seen)


def test_bytes_of_files_are_bounded(serve):
    from ..api.conftest import PNG

    client = serve(max_file_bytes_per_owner=2 * len(PNG)).http()
    for index, expected in enumerate((200, 200, 429)):
        content = PNG[:-1] + bytes([index])
        answer = client.post(
            "/v1/files", data={"purpose": "vision"}, files={"file": ("a.png", content)}
        )
        assert answer.status_code == expected
    assert code_of(answer) == "file_bytes_quota_exceeded"


def test_webhooks_are_bounded(serve):
    client = serve(max_webhooks_per_owner=2).http()
    body = {"name": "a", "url": "https://example.org", "event_types": ["video.completed"]}
    answers = [client.post("/v1/webhook_endpoints", json=body) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert code_of(answers[2]) == "webhooks_quota_exceeded"
    assert "2 of 2 webhook endpoints" in answers[2].json()["error"]["message"]


def upload_lines(client, bodies: list[dict]) -> str:
    """The id of a batch's file."""
    rows = [
        {"custom_id": f"r{index}", "method": "POST", "url": "/v1/videos", "body": body}
        for index, body in enumerate(bodies)
    ]
    text = "\n".join(json.dumps(row) for row in rows).encode()
    return client.post(
        "/v1/files", data={"purpose": "batch"}, files={"file": ("a.jsonl", text)}
    ).json()["id"]


def test_batches_are_bounded_and_their_output_is_kept_over_quota(serve):
    from skyloom.serve.api.routes.batches import advance

    server = serve(max_batches_per_owner=1, max_files_per_owner=1)
    client = server.http()
    body = {"input_file_id": upload_lines(client, [{"prompt": "a cat"}]), "endpoint": "/v1/videos"}
    body["completion_window"] = "24h"
    batch = client.post("/v1/batches", json=body).json()
    assert code_of(client.post("/v1/batches", json=body)) == "batches_quota_exceeded"
    advance(server.services)
    server.work()
    advance(server.services)
    assert client.get(f"/v1/batches/{batch['id']}").json()["output_file_id"]
    assert (
        code_of(client.post("/v1/batches", json=body)) == "batches_quota_exceeded"
    )  # it is not a day old


def test_batch_lines_wait_for_room_and_fail_if_they_never_fit(serve):
    from skyloom.serve.api.routes.batches import advance

    server = serve(max_queued_cost_per_owner=100)
    client = server.http()
    long, short = (
        {"prompt": "a", "model": "diorama", "seconds": "3600"},
        {"prompt": "a", "seconds": "60"},
    )
    file = upload_lines(client, [long, short, short])
    body = {"input_file_id": file, "endpoint": "/v1/videos", "completion_window": "24h"}
    batch = client.post("/v1/batches", json=body).json()
    advance(server.services)
    assert server.services.jobs.counts().by_status == {"queued": 1}
    for _ in range(2):
        server.work()
        advance(server.services)
    batch = client.get(f"/v1/batches/{batch['id']}").json()
    assert (batch["status"], batch["request_counts"]) == (
        "completed",
        {"total": 3, "completed": 2, "failed": 1},
    )
    errors = client.get(f"/v1/files/{batch['error_file_id']}/content").text
    assert "queued_cost_quota_exceeded" in errors


def test_quotas_apply_to_each_owner_separately(serve):
    server = serve(max_queued_per_owner=1)
    for key in (server.key("ada"), server.key("bob"), server.key("root", "admin", "read", "write")):
        client = server.http(key)
        assert client.post("/v1/videos", json={"prompt": "a cat"}).status_code == 200
        assert client.post("/v1/videos", json={"prompt": "a dog"}).status_code == 429


def test_an_unlimited_owner_is_limited_by_the_queue(serve):
    client = serve(max_queued_per_owner=0, max_queued=2).http()
    answers = [client.post("/v1/videos", json={"prompt": f"a cat {index}"}) for index in range(3)]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == [
        "1",
        "0",
        "0",
    ]
    assert code_of(answers[2]) == "rate_limit_exceeded"


def test_defaults_and_error_class():
    settings = replace(Settings(), data=Path("/nowhere"))
    assert all(getattr(settings, quota.setting) >= 50 for quota in QUOTAS.values())
    assert issubclass(QuotaError, CapacityError)
