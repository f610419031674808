"""Concurrency limits per owner, fair waiting, hanging threads; budgets of bytes."""

import asyncio
import threading

import pytest

from skyloom.core.errors import CapacityError, DiskFullError
from skyloom.serve.api.app import RESOURCES
from skyloom.serve.api.errors import ApiError, to_api_error
from skyloom.serve.api.limits import (
    LIMITS,
    BodyReservation,
    ByteBudget,
    ConcurrencyLimit,
    ConcurrencyLimiter,
)
from skyloom.serve.storage.disk_reserve import DiskReserve

SLOW = ("plan", "webhook", "inspect", "upload", "batch", "stream")


async def until(holds) -> None:
    """Wait until a condition holds."""
    while not holds():
        await asyncio.sleep(0.005)


def test_the_limit_per_owner_is_below_the_total():
    for kind in (*SLOW, "quick", "events", "download", "parse"):
        assert LIMITS[kind].per_owner < LIMITS[kind].total, kind


def test_every_call_has_a_limit_and_only_health_runs_on_the_event_loop():
    routes = [route for resource in RESOURCES for route in resource.router.routes]
    assert [route.path for route in routes if route.limits[0] == "loop"] == ["/health"]
    assert {kind for route in routes for kind in route.limits} - {"loop"} <= set(LIMITS)
    kinds = {(min(route.methods), route.path): route.limits[0] for route in routes}
    assert kinds["POST", "/v1/videos/plan"] == "plan"
    hooks = [
        kind for (method, path), kind in kinds.items() if method == "POST" and "webhook" in path
    ]
    assert set(hooks) == {"webhook", "quick"}, "calls with and without network access"
    assert (
        kinds["POST", "/v1/content_provenance_checks"]
        == kinds["POST", "/v1/videos/characters"]
        == "inspect"
    )


def test_an_owner_over_the_limit_is_rejected_and_another_is_not():
    limiter = ConcurrencyLimiter("plan", ConcurrencyLimit(total=3, per_owner=2, retry_after=5.0))
    go = threading.Event()

    async def run():
        held = [asyncio.create_task(limiter.run("mallory", go.wait)) for _ in range(2)]
        await until(lambda: limiter.running == 2)
        with pytest.raises(CapacityError) as refused:
            await limiter.run("mallory", go.wait)
        response = to_api_error(refused.value, "req_1")
        assert (response.status, response.headers["retry-after"]) == (429, "5")
        assert await limiter.run("alice", lambda: 7) == 7
        go.set()
        assert await asyncio.gather(*held) == [True, True]
        assert await limiter.run("mallory", lambda: 8) == 8

    asyncio.run(run())
    assert limiter.running == 0


def test_waiting_calls_run_in_order_and_do_not_block_other_owners():
    limiter = ConcurrencyLimiter("quick", ConcurrencyLimit(total=2, per_owner=1, max_waiting=2))
    first = threading.Event()
    begun = []

    async def call(owner, name, rest=lambda: None):
        await limiter.run(owner, lambda: (begun.append(name), rest()))

    async def run():
        tasks = [asyncio.create_task(call("mallory", "m1", first.wait))]
        await until(lambda: limiter.running == 1)
        tasks += [asyncio.create_task(call("mallory", name)) for name in ("m2", "m3")]
        await asyncio.sleep(0)
        with pytest.raises(CapacityError):
            await limiter.run("mallory", lambda: None)
        await call("alice", "a1")
        first.set()
        await asyncio.gather(*tasks)

    asyncio.run(run())
    assert begun == ["m1", "a1", "m2", "m3"]


def test_a_cancelled_wait_occupies_no_place():
    limiter = ConcurrencyLimiter("quick", ConcurrencyLimit(total=1, per_owner=1, max_waiting=5))
    go = threading.Event()

    async def run():
        held = asyncio.create_task(limiter.run("a", go.wait))
        await until(lambda: limiter.running == 1)
        waiting = [asyncio.create_task(limiter.run("a", lambda: None)) for _ in range(3)]
        await asyncio.sleep(0)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        go.set()
        await held
        assert await limiter.run("a", lambda: 1) == 1

    asyncio.run(run())
    assert limiter.running == 0


def test_a_hanging_call_occupies_its_place_on_a_daemon_thread():
    """Its task is cancelled at once; its place is freed when the thread ends."""
    limiter = ConcurrencyLimiter("webhook", ConcurrencyLimit(total=1, per_owner=1))
    go = threading.Event()
    threads = []

    def hang():
        threads.append(threading.current_thread())
        go.wait()

    async def run():
        task = asyncio.create_task(limiter.run("a", hang))
        await until(lambda: threads)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert threads[0].daemon
    assert limiter.running == 1
    go.set()
    threads[0].join()
    assert limiter.running == 0


def test_errors_of_the_work_are_raised_by_run():
    limiter = ConcurrencyLimiter("quick", ConcurrencyLimit(1, 1))

    def fail():
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        asyncio.run(limiter.run("a", fail))
    assert limiter.running == 0


def test_bytes_are_reserved_by_owner_and_released():
    bodies, memory = ByteBudget(total=100, per_owner=60), ByteBudget(50, 40)
    with (
        BodyReservation("mallory", memory, bodies) as mallory,
        BodyReservation("alice", memory, bodies) as alice,
    ):
        mallory.add_body(60)
        mallory.add_memory(40)
        with pytest.raises(ApiError) as refused:
            mallory.add_body(1)
        assert (refused.value.status, refused.value.headers["retry-after"]) == (429, "5")
        alice.add_body(40)
        with pytest.raises(ApiError) as refused:
            alice.add_body(1)
        assert (refused.value.status, refused.value.headers["retry-after"]) == (503, "5")
        with pytest.raises(ApiError):
            alice.add_memory(11)
        assert (bodies.reserved, memory.reserved, mallory.size) == (100, 40, 61)
    assert (bodies.reserved, memory.reserved) == (0, 0)


def test_the_reserve_counts_what_is_to_come_and_folders_that_are_not_there_yet(tmp_path):
    free = DiskReserve(tmp_path / "not" / "there", 0)
    free.check(2**20)
    with pytest.raises(DiskFullError):
        free.check(2**80)
    with pytest.raises(DiskFullError):
        DiskReserve(tmp_path, 2**80).check()
