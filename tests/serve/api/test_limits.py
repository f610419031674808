"""Gates: shares of owners, waiting in turn, threads that hang; and bytes in flight."""

import asyncio
import threading

import pytest

from skyloom.core.errors import CapacityError, DiskFullError
from skyloom.serve.api.app import RESOURCES
from skyloom.serve.api.errors import ApiError, to_api_error
from skyloom.serve.api.limits import LIMITS, Gate, Hold, InFlight, Limit
from skyloom.serve.storage.disk_reserve import DiskReserve

SLOW = ("plan", "webhook", "inspect", "upload", "batch", "stream")


async def until(holds) -> None:
    """Let others run until something holds."""
    while not holds():
        await asyncio.sleep(0.005)


def test_no_owner_may_take_all_places_of_a_kind_that_has_owners():
    for kind in (*SLOW, "quick", "events", "download", "parse"):
        assert LIMITS[kind].per_owner < LIMITS[kind].total, kind


def test_every_call_has_a_limit_and_only_health_runs_on_the_loop():
    routes = [route for resource in RESOURCES for route in resource.router.routes]
    assert [route.path for route in routes if route.limits[0] == "loop"] == ["/health"]
    assert {kind for route in routes for kind in route.limits} - {"loop"} <= set(LIMITS)
    kinds = {(min(route.methods), route.path): route.limits[0] for route in routes}
    assert kinds["POST", "/v1/videos/plan"] == "plan"
    hooks = [
        kind for (method, path), kind in kinds.items() if method == "POST" and "webhook" in path
    ]
    assert set(hooks) == {"webhook", "quick"}, (
        "those that resolve names or call somebody, and those that do not"
    )
    assert (
        kinds["POST", "/v1/content_provenance_checks"]
        == kinds["POST", "/v1/videos/characters"]
        == "inspect"
    )


def test_an_owner_over_the_share_is_refused_and_another_is_not():
    gate, go = Gate("plan", Limit(total=3, per_owner=2, retry_after=5.0)), threading.Event()

    async def run():
        held = [asyncio.create_task(gate.run("mallory", go.wait)) for _ in range(2)]
        await until(lambda: gate.running == 2)
        with pytest.raises(CapacityError) as refused:
            await gate.run("mallory", go.wait)
        reply = to_api_error(refused.value, "req_1")
        assert (reply.status, reply.headers["retry-after"]) == (429, "5")
        assert await gate.run("alice", lambda: 7) == 7
        go.set()
        assert await asyncio.gather(*held) == [True, True]
        assert await gate.run("mallory", lambda: 8) == 8

    asyncio.run(run())
    assert gate.running == 0


def test_waiting_calls_come_in_turn_and_an_owner_over_the_share_holds_nobody_up():
    gate, first, begun = (
        Gate("quick", Limit(total=2, per_owner=1, waiting=2)),
        threading.Event(),
        [],
    )

    async def call(owner, name, rest=lambda: None):
        await gate.run(owner, lambda: (begun.append(name), rest()))

    async def run():
        tasks = [asyncio.create_task(call("mallory", "m1", first.wait))]
        await until(lambda: gate.running == 1)
        tasks += [asyncio.create_task(call("mallory", name)) for name in ("m2", "m3")]
        await asyncio.sleep(0)
        with pytest.raises(CapacityError):
            await gate.run("mallory", lambda: None)
        await call("alice", "a1")
        first.set()
        await asyncio.gather(*tasks)

    asyncio.run(run())
    assert begun == ["m1", "a1", "m2", "m3"]


def test_who_gives_up_waiting_leaves_no_place_taken():
    gate, go = Gate("quick", Limit(total=1, per_owner=1, waiting=5)), threading.Event()

    async def run():
        held = asyncio.create_task(gate.run("a", go.wait))
        await until(lambda: gate.running == 1)
        waiting = [asyncio.create_task(gate.run("a", lambda: None)) for _ in range(3)]
        await asyncio.sleep(0)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        go.set()
        await held
        assert await gate.run("a", lambda: 1) == 1

    asyncio.run(run())
    assert gate.running == 0


def test_a_call_that_hangs_keeps_its_place_and_not_the_process():
    """Its task is cancelled at once; its thread is a daemon, and its place is free only when it has ended."""
    gate, go, threads = Gate("webhook", Limit(total=1, per_owner=1)), threading.Event(), []

    def hang():
        threads.append(threading.current_thread())
        go.wait()

    async def run():
        task = asyncio.create_task(gate.run("a", hang))
        await until(lambda: threads)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert threads[0].daemon
    assert gate.running == 1
    go.set()
    threads[0].join()
    assert gate.running == 0


def test_errors_of_the_work_are_raised_where_it_is_awaited():
    gate = Gate("quick", Limit(1, 1))

    def fail():
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        asyncio.run(gate.run("a", fail))
    assert gate.running == 0


def test_bytes_in_flight_are_counted_by_owner_and_given_back():
    bodies, memory = InFlight(total=100, per_owner=60), InFlight(50, 40)
    with Hold("mallory", memory, bodies) as mallory, Hold("alice", memory, bodies) as alice:
        mallory.body(60)
        mallory.memory(40)
        with pytest.raises(ApiError) as refused:
            mallory.body(1)
        assert (refused.value.status, refused.value.headers["retry-after"]) == (429, "5")
        alice.body(40)
        with pytest.raises(ApiError) as refused:
            alice.body(1)
        assert (refused.value.status, refused.value.headers["retry-after"]) == (503, "5")
        with pytest.raises(ApiError):
            alice.memory(11)
        assert (bodies.held, memory.held, mallory.size) == (100, 40, 61)
    assert (bodies.held, memory.held) == (0, 0)


def test_the_reserve_counts_what_is_to_come_and_folders_that_are_not_there_yet(tmp_path):
    free = DiskReserve(tmp_path / "not" / "there", 0)
    free.check(2**20)
    with pytest.raises(DiskFullError):
        free.check(2**80)
    with pytest.raises(DiskFullError):
        DiskReserve(tmp_path, 2**80).check()
