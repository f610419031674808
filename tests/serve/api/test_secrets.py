"""No secret and no prompt in any line of the log, whatever goes wrong, unless the settings say so.

Each text sent by a client and each secret given to it is a canary. The complete log output of
server and worker is captured in both formats.
"""

import io
import json
import logging
from collections.abc import Iterator

import pytest
from sqlalchemy import insert
from sqlalchemy.exc import IntegrityError

from skyloom.core.errors import MediaError
from skyloom.core.log import set_up_logging
from skyloom.serve.queue.database import Database
from skyloom.serve.queue.tables import endpoints

PROMPT, NAME, QUERY = "canaryprompt", "canaryname", "canaryquery"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(9)


@pytest.fixture(params=["human", "json"])
def style(request) -> str:
    """A format of the log."""
    return request.param


@pytest.fixture
def log(style) -> Iterator[io.StringIO]:
    """All that is logged, as `skyloom serve` and `skyloom worker` log it."""
    logger, root = logging.getLogger("skyloom"), logging.getLogger()
    before = logger.handlers[:], logger.level, logger.propagate, root.handlers[:]
    stream = io.StringIO()
    set_up_logging("debug", style, stream, details=False)
    yield stream
    logger.handlers[:], logger.propagate, root.handlers[:] = before[0], before[2], before[3]
    logger.setLevel(before[1])


def broken(error: Exception):
    """A function that fails."""

    def fail(*_, **__):
        raise error

    return fail


def worker_failures(server, http) -> None:
    """Run renderers that raise errors with the prompt: foreign, skyloom's, chained, grouped."""

    def chained(job, output):
        try:
            raise KeyError(job.request["prompt"])
        except KeyError as error:
            raise ExceptionGroup(
                job.request["prompt"], [ValueError(job.request["prompt"]), error]
            ) from error
        yield

    def quoting(kind):
        def paint(job, output):
            raise kind(f"bad: {job.request['prompt']} of {job.metadata}")
            yield

        return paint

    for paint in (quoting(RuntimeError), quoting(MediaError), quoting(OSError), chained):
        assert http.post("/v1/videos", json={"prompt": PROMPT}).status_code == 200
        server.work(paint)


def server_failures(server, http, monkeypatch) -> None:
    """Wrong requests, errors of the house's and of nobody's, an answer that breaks off."""
    http.post("/v1/videos", json={"prompt": PROMPT, "seconds": PROMPT, NAME: NAME})
    http.post("/v1/videos", json={"prompt": 3, "size": PROMPT})
    http.post(
        "/v1/videos", content=f'{{"prompt": "{PROMPT}', headers={"content-type": "application/json"}
    )
    http.get(
        f"/v1/videos/{NAME}?{QUERY}=1", headers={"x-canary": QUERY, "origin": f"https://{QUERY}"}
    )
    with monkeypatch.context() as patch:
        patch.setattr(type(server.services.submitter), "create_video", broken(RuntimeError(PROMPT)))
        assert http.post("/v1/videos", json={"prompt": PROMPT}).status_code == 500
    video = http.post("/v1/videos", json={"prompt": PROMPT}).json()["id"]
    server.work()
    with monkeypatch.context() as patch:
        patch.setattr(type(server.services.storage), "read", broken(RuntimeError(PROMPT)))
        http.get(f"/v1/videos/{video}/content")
    logging.getLogger("uvicorn.error").error(
        "Exception in ASGI application", exc_info=ValueError(PROMPT)
    )


def webhooks(server, http, monkeypatch) -> str:
    """An endpoint whose URL has secrets, heard and unheard; the secret that it signs by."""
    hook = {
        "url": f"https://example.org/{QUERY}?token={QUERY}",
        "event_types": ["video.completed", "video.failed"],
    }
    made = http.post("/v1/webhook_endpoints", json=hook).json()
    failing = broken(OSError(f"no route to {hook['url']}"))
    server.work()
    server.deliver()
    for error in (failing, broken(ValueError(hook["url"]))):
        http.post("/v1/videos", json={"prompt": PROMPT})
        server.work()
        with monkeypatch.context() as patch:
            patch.setattr(type(server.posts), "__call__", error)
            server.deliver()
            http.post(
                f"/v1/webhook_endpoints/{made['id']}/test", json={"event_type": "video.failed"}
            )
    return made["signing_secret"]


def database_errors(server, http, monkeypatch) -> str:
    """Provoke database errors with a secret and a URL in the parameters; return the secret."""
    monkeypatch.setattr("skyloom.serve.queue.webhooks.secrets.token_hex", lambda _: "same")
    hook = {"url": f"https://example.org/?token={QUERY}", "event_types": ["video.completed"]}
    answers = [http.post("/v1/webhook_endpoints", json=hook) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 500]
    with monkeypatch.context() as patch:
        patch.setattr(server.services.database.engine, "connect", broken(OSError(QUERY)))
        assert http.post("/v1/webhook_endpoints", json=hook).status_code == 500
    return answers[0].json()["signing_secret"]


def test_nothing_private_is_logged(server, log, style, monkeypatch):
    key = server.key("alice")
    http = server.http(key)
    http.post("/v1/files", files={"file": (f"{NAME}.png", PNG)}, data={"purpose": "vision"})
    http.post(
        "/v1/videos", data={"prompt": PROMPT}, files={"input_reference": (f"{NAME}.png", PNG)}
    )
    http.post(
        "/v1/videos", data={"prompt": PROMPT}, files={"input_reference": (f"{NAME}.png", b"none")}
    )
    worker_failures(server, http)
    server_failures(server, http, monkeypatch)
    secrets = webhooks(server, http, monkeypatch), database_errors(server, http, monkeypatch)
    said = log.getvalue()
    for words in (
        "job failed",
        "a call failed",
        "a webhook could not be sent",
        "IntegrityError",
        "answered 400",
    ):
        assert words in said, f"the log says what went wrong: {words}"
    found = [word for word in ("canary", key, *secrets) if word in said]
    assert not found, [line for line in said.splitlines() if any(word in line for word in found)][
        :3
    ]
    if style == "json":
        assert all(json.loads(line)["message"] for line in said.splitlines())


def test_where_the_settings_say_so_prompts_are_logged(server, log, style):
    set_up_logging("debug", style, log, details=True)
    worker_failures(server, server.http())
    assert PROMPT in log.getvalue()


def test_answers_tell_no_secret_and_nothing_of_another_owner(server):
    http, other = server.http(server.key("alice")), server.http(server.key("eve"))
    hook = {"url": f"https://example.org/?token={QUERY}", "event_types": ["video.completed"]}
    made = http.post("/v1/webhook_endpoints", json=hook).json()
    http.post("/v1/files", files={"file": (f"{NAME}.png", PNG)}, data={"purpose": "vision"})
    video = http.post("/v1/videos", json={"prompt": PROMPT}).json()["id"]
    server.work()
    pages = [
        "/v1/webhook_endpoints",
        "/v1/files",
        "/v1/videos",
        "/v1/batches",
        "/health",
        "/ready",
        "/openapi.json",
    ]
    ours = [
        http.get(page).text
        for page in [*pages, f"/v1/webhook_endpoints/{made['id']}", f"/v1/videos/{video}"]
    ]
    theirs = [
        other.get(page).text
        for page in [*pages, f"/v1/webhook_endpoints/{made['id']}", f"/v1/videos/{video}"]
    ]
    assert made["signing_secret"] not in "".join(ours)
    assert "canary" in "".join(ours)
    assert "canary" not in "".join(theirs)
    assert http.headers["authorization"].split()[1] not in "".join(ours)


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///{}/x.db"])
def test_no_error_of_a_database_quotes_what_was_written(url, tmp_path):
    database = Database(url.format(tmp_path))
    row = {
        "id": "x",
        "owner": "ada",
        "name": NAME,
        "url": QUERY,
        "event_types": [],
        "secret": PROMPT,
    }
    row |= {"created_at": 0.0, "updated_at": 0.0}
    with pytest.raises(IntegrityError) as caught, database.write() as write:
        write.connection.execute(insert(endpoints), [row, row])
    assert "canary" not in str(caught.value)
    database.close()
