"""Every error code has an HTTP status, and no response shows internal details."""

import importlib
import pkgutil

import pytest
from sqlalchemy.exc import OperationalError

import skyloom.serve
from skyloom.core import errors
from skyloom.core.errors import CapacityError, RequestError, SkyloomError
from skyloom.serve.api.errors import STATUS, ApiError, to_api_error
from skyloom.serve.queue.errors import NotFoundError


def kinds(of: type = SkyloomError) -> set[type]:
    """A class and all below it."""
    return {of, *(found for child in of.__subclasses__() for found in kinds(child))}


def test_status_table_covers_every_error_code():
    for module in pkgutil.walk_packages(skyloom.serve.__path__, "skyloom.serve."):
        if not module.name.endswith((".render", ".env")):  # networks; only alembic runs env.py
            importlib.import_module(module.name)
    codes = {
        kind.code
        for kind in kinds()
        if kind.__module__.startswith("skyloom") and kind is not ApiError
    }
    assert codes == set(STATUS)
    assert {kind.code for kind in vars(errors).values() if isinstance(kind, type)} <= codes


@pytest.mark.parametrize("code", sorted(STATUS))
def test_errors_become_the_envelope(code):
    kind = next(
        kind
        for kind in kinds()
        if kind.code == code and kind.__name__ not in ("ApiError", "CardError", "QueueFullError")
    )
    arguments = ("file", "/secret") if kind is NotFoundError else ("It went wrong in /secret.",)
    reply = to_api_error(kind(*arguments), "req_1")
    assert reply.status == STATUS[code][0]
    assert reply.body["error"].keys() == {"message", "type", "param", "code"}
    assert ("/secret" in str(reply.body)) == (reply.status < 500)


def test_database_errors_are_503_without_details():
    reply = to_api_error(
        OperationalError("SELECT secret", {}, Exception("connection to /secret refused")), "req_1"
    )
    assert (reply.status, reply.headers["retry-after"]) == (503, "5")
    assert "secret" not in str(reply.body)


def test_request_fields_have_their_wire_names():
    for field, param in (
        ("num_steps", "steps"),
        ("size", "size"),
        ("cards", "storyboard"),
        (None, None),
    ):
        reply = to_api_error(RequestError("No.", field=field), "req_1")
        assert reply.body["error"]["param"] == param


def test_capacity_errors_have_retry_after():
    for seconds, header in ((3.2, "4"), (1_000, "120"), (None, "10")):
        reply = to_api_error(CapacityError("Full.", retry_after=seconds), "req_1")
        assert (reply.status, reply.headers["retry-after"]) == (429, header)
        assert "x-ratelimit-limit-requests" not in reply.headers


@pytest.mark.parametrize(
    ("changes", "limit"), [({"max_queued_per_owner": 3}, 3), ({"max_queued": 2}, 2)]
)
def test_new_jobs_have_rate_limit_headers(make_server, tmp_path, changes, limit):
    client = make_server(tmp_path, **changes).http()
    for remaining in range(limit - 1, -1, -1):
        made = client.post("/v1/videos", json={"prompt": f"cat {remaining}"})
        assert made.status_code == 200
        assert made.headers["x-ratelimit-remaining-requests"] == str(remaining)
        assert made.headers["openai-poll-after-ms"]
    full = client.post("/v1/videos", json={"prompt": "one more"})
    assert full.status_code == 429
    assert full.headers["x-ratelimit-limit-requests"] == str(limit)
    assert full.headers["x-ratelimit-remaining-requests"] == "0"
    assert full.headers["x-ratelimit-reset-requests"] == f"{full.headers['retry-after']}s"
    assert client.delete(f"/v1/videos/{made.json()['id']}").status_code == 200
    assert (
        client.post("/v1/videos", json={"prompt": "one more"}).headers[
            "x-ratelimit-remaining-requests"
        ]
        == "0"
    )
