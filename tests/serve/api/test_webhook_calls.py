"""Limits on test events and downloads, which hold a thread while the other side answers."""

import base64
import threading

import openai
import pytest

from skyloom.core.errors import RequestError

PATIENCE = 60
PICTURE = {"prompt": "a cat", "input_reference": {"image_url": "https://example.org/a.png"}}


class Tarpit:
    """A server that answers only after `open` is set."""

    def __init__(self, answer) -> None:
        self.answer, self.asked, self.open = answer, [], threading.Event()
        self.begun = threading.Condition()

    def __call__(self, url, *_) -> object:
        with self.begun:
            self.asked.append(url)
            self.begun.notify_all()
        assert self.open.wait(PATIENCE)
        return self.answer

    def wait_for(self, count: int) -> None:
        with self.begun:
            assert self.begun.wait_for(lambda: len(self.asked) == count, PATIENCE)


def endpoint(http) -> str:
    """The path of the test of a new endpoint."""
    hook = {"url": "https://example.org/", "event_types": ["video.failed"]}
    return (
        f"/v1/webhook_endpoints/{http.post('/v1/webhook_endpoints', json=hook).json()['id']}/test"
    )


@pytest.mark.parametrize("kind", ["test", "download"])
def test_outgoing_requests_are_limited_per_owner_and_in_all(make_server, tmp_path, kind):
    server = make_server(tmp_path, url_references=True)
    tarpit = Tarpit(200 if kind == "test" else b"\x89PNG\r\n\x1a\n" + bytes(100))
    object.__setattr__(server.services.effects, "post", tarpit)
    server.services.media._fetch = tarpit
    clients = [server.http(server.key(f"owner{index}")) for index in range(6)]
    calls = [
        (client, endpoint(client), {"event_type": "video.failed"})
        if kind == "test"
        else (client, "/v1/videos", PICTURE)
        for client in clients
    ]
    answers = []

    def ask(call) -> None:
        client, path, body = call
        answers.append(client.post(path, json=body).status_code)

    threads = [threading.Thread(target=ask, args=(call,), daemon=True) for call in calls[:4]]
    for count, thread in enumerate(threads, start=1):
        thread.start()
        tarpit.wait_for(count)
        client, path, body = calls[count - 1]
        refused = client.post(path, json=body)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "10")
    client, path, body = calls[4]
    assert client.post(path, json=body).status_code == 429, "four others are at it"
    tarpit.open.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert answers == [200] * 4
    assert client.post(path, json=body).status_code == 200


def test_failed_download_releases_its_slot(make_server, tmp_path):
    server = make_server(tmp_path, url_references=True)

    def refuse(url):
        raise RequestError("The URL cannot be reached.")

    server.services.media._fetch = refuse
    for _ in range(6):
        assert server.http().post("/v1/videos", json=PICTURE).status_code == 400


def test_webhook_tests_are_signed_by_both_secrets_after_rotation(server):
    client = server.openai()
    made = client.webhooks.create(
        event_types=["video.completed"], name="mine", url="https://example.org/hook"
    )
    rotated = client.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True)
    client.webhooks.test(made.id, event_type="video.completed")
    _, headers, body = server.posts.sent.pop()
    for secret in (made.signing_secret, rotated.signing_secret):
        client.webhooks.unwrap(body.decode(), headers, secret=secret)
    client.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=False)
    client.webhooks.test(made.id, event_type="video.completed")
    _, headers, body = server.posts.sent.pop()
    for secret in (
        made.signing_secret,
        rotated.signing_secret,
        "whsec_" + base64.b64encode(b"x" * 32).decode(),
    ):
        with pytest.raises(openai.InvalidWebhookSignatureError):
            client.webhooks.unwrap(body.decode(), headers, secret=secret)
