"""Every error of the house has an answer, and no answer tells what is inside."""

import importlib
import pkgutil

import pytest
from sqlalchemy.exc import OperationalError

import skyloom.serve
from skyloom.core import errors
from skyloom.core.errors import CapacityError, RequestError, SkyloomError
from skyloom.serve.api.errors import STATUS, ApiError, to_api_error


def kinds(of: type = SkyloomError) -> set[type]:
    """A class and all below it."""
    return {of, *(found for child in of.__subclasses__() for found in kinds(child))}


def test_the_table_is_complete():
    for module in pkgutil.walk_packages(skyloom.serve.__path__, "skyloom.serve."):
        if not module.name.endswith(("_task", ".render")):  # which load the networks
            importlib.import_module(module.name)
    codes = {
        kind.code
        for kind in kinds()
        if kind.__module__.startswith("skyloom") and kind is not ApiError
    }
    assert codes == set(STATUS)
    assert {kind.code for kind in vars(errors).values() if isinstance(kind, type)} <= codes


@pytest.mark.parametrize("code", sorted(STATUS))
def test_an_error_becomes_the_envelope(code):
    kind = next(
        kind
        for kind in kinds()
        if kind.code == code and kind.__name__ not in ("ApiError", "CardError", "QueueFullError")
    )
    reply = to_api_error(kind("It went wrong in /secret."), "req_1")
    assert reply.status == STATUS[code][0]
    assert reply.body["error"].keys() == {"message", "type", "param", "code"}
    assert ("/secret" in str(reply.body)) == (reply.status < 500)


def test_a_database_that_is_away_is_said_so_and_no_more():
    reply = to_api_error(
        OperationalError("SELECT secret", {}, Exception("connection to /secret refused")), "req_1"
    )
    assert (reply.status, reply.headers["retry-after"]) == (503, "5")
    assert "secret" not in str(reply.body)


def test_fields_of_a_request_are_named_as_the_wire_has_them():
    for field, param in (
        ("num_steps", "steps"),
        ("size", "size"),
        ("cards", "storyboard"),
        (None, None),
    ):
        reply = to_api_error(RequestError("No.", field=field), "req_1")
        assert reply.body["error"]["param"] == param


def test_a_full_queue_says_how_long_to_wait():
    for seconds, header in ((3.2, "4"), (1_000, "120"), (None, "10")):
        reply = to_api_error(CapacityError("Full.", retry_after=seconds), "req_1")
        assert (reply.status, reply.headers["retry-after"]) == (429, header)
        assert "x-ratelimit-limit-requests" not in reply.headers


@pytest.mark.parametrize(
    ("changes", "limit"), [({"max_queued_per_owner": 3}, 3), ({"max_queued": 2}, 2)]
)
def test_calls_that_make_jobs_say_how_many_more_may_wait(make_server, tmp_path, changes, limit):
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
