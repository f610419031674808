"""Requests for a model that no worker holds are refused before anything is stored."""

import pytest

from skyloom.serve.health import WorkerHealth
from skyloom.serve.queue.capabilities import Capabilities
from skyloom.serve.queue.leases import Leases

PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)


@pytest.fixture
def leases(server):
    """The workers' side of the server's queue."""
    return Leases(server.services.database, server.services.settings)


def test_a_model_that_no_worker_holds_is_refused_before_its_media_is_stored(server, leases):
    leases.register_worker("other", "cpu", Capabilities({"wan": 1}))
    files = {"input_reference": ("a.png", PNG, "image/png")}
    answer = server.http().post("/v1/videos", data={"prompt": "a cat"}, files=files)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "model_not_found", "model")
    assert error["message"] == ("model must be held by a running worker, got 'diorama'. Held: wan.")
    folder = server.services.settings.data / "assets"
    assert not [path for path in folder.rglob("*") if path.is_file() and path.suffix == ".png"]
    assert server.http().get("/v1/videos").json()["data"] == []


def test_an_installed_model_is_accepted_before_any_worker_has_started(server, leases):
    assert server.http().post("/v1/videos", json={"prompt": "a cat"}).status_code == 200
    leases.register_worker("remote", "cpu", Capabilities({"wan": 1}))
    server.children[0] = WorkerHealth(expected=1, alive=1, restarts=0, names=("own",))
    starting = server.http().post("/v1/videos", json={"prompt": "a cat"})
    assert starting.status_code == 200, "the server's own worker has not registered yet"
    leases.register_worker("own", "cpu", Capabilities({"wan": 1}))
    refused = server.http().post("/v1/videos", json={"prompt": "a cat"})
    assert refused.json()["error"]["code"] == "model_not_found"


def test_edits_and_storyboards_are_refused_too(server, leases):
    id = server.http().post("/v1/videos", json={"prompt": "a cat"}).json()["id"]
    server.work()
    leases.requeue_worker_jobs("painter")
    leases.register_worker("other", "cpu", Capabilities({"wan": 1}))
    cards = [{"at": 0, "prompt": "a cat"}, {"at": 2, "prompt": "a dog"}]
    for path, body in (
        (f"{id}/remix", {"prompt": "a dog"}),
        ("storyboard", {"cards": cards}),
    ):
        answer = server.http().post(f"/v1/videos/{path}", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "model_not_found")


def test_metrics_count_workers_by_model(server, leases):
    leases.register_worker("a", "cpu", Capabilities({"diorama": 1, "wan": 1}))
    leases.register_worker("b", "cpu", Capabilities({"wan": 1}))
    lines = server.http().get("/metrics").text.splitlines()
    assert {
        'skyloom_model_workers{model="diorama"} 1.0',
        'skyloom_model_workers{model="wan"} 2.0',
    } <= set(lines)
