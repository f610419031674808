"""Webhooks: signatures that the official client accepts, secrets, retries and endpoints."""

import base64
import json
import time

import openai
import pytest

from skyloom.serve.queue.jobs import JobFailure, JobResult
from skyloom.serve.queue.webhook_delivery import BACKOFF
from skyloom.serve.queue.webhooks import EVENT_TYPES, EndpointStore, NotFoundError, sign

from ..conftest import load_beside

deliver_due = load_beside("delivering").deliver_due
URL = "https://example.org/hook"


class Post:
    """Records requests and returns prepared status codes."""

    def __init__(self, *answers: int) -> None:
        self.answers, self.sent = list(answers), []

    def __call__(self, url, headers, body) -> int:
        self.sent.append((url, dict(headers), body))
        answer = self.answers.pop(0) if self.answers else 200
        if answer == 0:
            raise OSError("no route")
        return answer


@pytest.fixture
def endpoints(database) -> EndpointStore:
    """The endpoints of all owners."""
    return EndpointStore(database)


def end_a_job(store, leases, owner="ada", *, well=True) -> str:
    """A job that completed or failed."""
    id = store.submit({"prompt": "x"}, owner=owner).id
    lease = leases.lease("w")
    if well:
        leases.finish(lease, JobResult({}, {}))
    else:
        leases.fail(lease, JobFailure("x", "x"))
    return id


def test_ended_jobs_are_delivered_once_to_their_owner(store, leases, endpoints, database):
    endpoint = endpoints.add("ada", "mine", URL, EVENT_TYPES)
    endpoints.add("bob", "his", URL, EVENT_TYPES)
    endpoints.add("ada", "failures", "https://example.org/bad", ["video.failed"])
    good, bad = end_a_job(store, leases), end_a_job(store, leases, well=False)
    post = Post()
    assert deliver_due(database, post) == 3
    assert deliver_due(database, post) == 0
    sent = [
        (url, json.loads(body)["type"], json.loads(body)["data"]["id"])
        for url, _, body in post.sent
    ]
    assert sorted(sent) == sorted(
        [
            (URL, "video.completed", good),
            (URL, "video.failed", bad),
            ("https://example.org/bad", "video.failed", bad),
        ]
    )
    assert endpoint.secret.startswith("whsec_")


def test_the_official_client_accepts_the_signature(store, leases, endpoints, database, clock):
    clock.now = time.time()
    endpoint = endpoints.add("ada", "mine", URL, EVENT_TYPES)
    id = end_a_job(store, leases)
    post = Post()
    deliver_due(database, post)
    _, headers, body = post.sent[0]
    client = openai.OpenAI(api_key="x", webhook_secret=endpoint.secret)
    event = client.webhooks.unwrap(body, headers)
    assert (event.type, event.data.id, event.id) == ("video.completed", id, headers["webhook-id"])
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(body + b" ", headers)


def test_after_a_rotation_both_secrets_sign_for_a_day(store, leases, endpoints, database, clock):
    clock.now = time.time()
    old = endpoints.add("ada", "mine", URL, EVENT_TYPES)
    new = endpoints.rotate(old.id, "ada", keep_old=True)
    assert new.secret != old.secret
    post = Post()
    end_a_job(store, leases)
    deliver_due(database, post)
    _, headers, body = post.sent[0]
    for secret in (old.secret, new.secret):
        openai.OpenAI(api_key="x", webhook_secret=secret).webhooks.unwrap(body, headers)
    clock.turn(24 * 3600 + 1)
    end_a_job(store, leases)
    deliver_due(database, post)
    assert len(post.sent[1][1]["webhook-signature"].split()) == 1
    assert endpoints.rotate(old.id, "ada", keep_old=False).secret != new.secret


def test_failed_deliveries_are_retried_with_backoff_for_three_days(
    store, leases, endpoints, database, clock
):
    endpoints.add("ada", "mine", URL, EVENT_TYPES)
    end_a_job(store, leases)
    post = Post(*[500, 0, 302, 404] * 20)
    for wait in BACKOFF:
        assert deliver_due(database, post) == 1
        clock.turn(wait - 1)
        assert deliver_due(database, post) == 0
        clock.turn(1)
    assert deliver_due(database, post) == 1
    clock.turn(30 * 86_400)
    assert deliver_due(database, post) == 0
    assert list(BACKOFF) == sorted(BACKOFF)
    assert 71 * 3600 < sum(BACKOFF) < 80 * 3600
    assert len({headers["webhook-id"] for _, headers, _ in post.sent}) == 1


def test_a_delivery_ends_when_it_succeeds(store, leases, endpoints, database, clock):
    endpoints.add("ada", "mine", URL, EVENT_TYPES)
    end_a_job(store, leases)
    post = Post(503, 204)
    deliver_due(database, post)
    assert deliver_due(database, post) == 0
    clock.turn(6)
    assert deliver_due(database, post) == 1
    clock.turn(30 * 86_400)
    assert deliver_due(database, post) == 0
    assert len(post.sent) == 2


def test_endpoints_of_other_owners_are_hidden(endpoints):
    mine = endpoints.add("ada", "mine", URL, EVENT_TYPES)
    assert endpoints.get(mine.id, "ada") == mine
    assert endpoints.page("eve") == []
    for call in (
        lambda: endpoints.get(mine.id, "eve"),
        lambda: endpoints.change(mine.id, "eve", name="x"),
        lambda: endpoints.rotate(mine.id, "eve", keep_old=True),
        lambda: endpoints.delete(mine.id, "eve"),
    ):
        with pytest.raises(NotFoundError):
            call()
    assert endpoints.change(mine.id, "ada", name="x", event_types=["video.failed"]).event_types == (
        "video.failed",
    )
    endpoints.delete(mine.id, "ada")
    assert endpoints.page("ada") == []


def test_signatures_accept_both_kinds_of_secret():
    raw = base64.b64encode(b"key").decode()
    assert sign(f"whsec_{raw}", "evt", 1, b"x") == sign("key", "evt", 1, b"x")
    assert sign("whsec_not base64!", "evt", 1, b"x").startswith("v1,")
