"""Every error of the house has an answer, and no answer tells what is inside."""

import importlib
import pkgutil

import pytest
from sqlalchemy.exc import OperationalError

import skyloom.serve
from skyloom.core import errors
from skyloom.core.errors import CapacityError, RequestError, SkyloomError
from skyloom.serve.api.errors import STATUS, WireError, tell


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
        if kind.__module__.startswith("skyloom") and kind is not WireError
    }
    assert codes == set(STATUS)
    assert {kind.code for kind in vars(errors).values() if isinstance(kind, type)} <= codes


@pytest.mark.parametrize("code", sorted(STATUS))
def test_an_error_becomes_the_envelope(code):
    kind = next(
        kind
        for kind in kinds()
        if kind.code == code and kind.__name__ not in ("CardError", "QueueFullError")
    )
    arguments = ("job", "/secret") if code == "not_found" else ("It went wrong in /secret.",)
    told = tell(kind(*arguments), "req_1")
    assert told.status == STATUS[code][0]
    assert told.body["error"].keys() == {"message", "type", "param", "code"}
    assert ("/secret" in str(told.body)) == (told.status < 500)


def test_a_database_that_is_away_is_said_so_and_no_more():
    told = tell(
        OperationalError("SELECT secret", {}, Exception("connection to /secret refused")), "req_1"
    )
    assert (told.status, told.headers["retry-after"]) == (503, "5")
    assert "secret" not in str(told.body)


def test_fields_of_a_request_are_named_as_the_wire_has_them():
    for field, param in (
        ("num_steps", "steps"),
        ("size", "size"),
        ("cards", "storyboard"),
        (None, None),
    ):
        told = tell(RequestError("No.", field=field), "req_1")
        assert told.body["error"]["param"] == param


def test_a_full_queue_says_how_long_to_wait():
    for seconds, header in ((3.2, "4"), (1_000, "120"), (None, "10")):
        told = tell(CapacityError("Full.", retry_after=seconds), "req_1")
        assert (told.status, told.headers["retry-after"]) == (429, header)
        assert "x-ratelimit-limit-requests" not in told.headers


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
