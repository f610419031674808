"""Limits on concurrent calls (by kind and owner) and on bytes of request bodies in flight.

Every kind of call has its own threads and a maximum per owner, so that neither one owner nor a slow
kind of call can use up all threads. The threads are daemons: a call that hangs does not keep the
process from exiting.
"""

import asyncio
import threading
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from skyloom.core.errors import CapacityError
from skyloom.serve.api.errors import ApiError

T = TypeVar("T")
_Slow = Literal["plan", "webhook", "inspect", "upload", "batch", "stream"]
_Inner = Literal["auth", "body", "parse", "events", "download"]
Kind = Literal["loop", "quick", "ready", "metrics"] | _Slow | _Inner
"""Name of a concurrency limit. Calls of kind "loop" run on the event loop and must not block."""
MEMORY_BYTES = 128 * 2**20  # of request bodies held in memory
MEMORY_BYTES_PER_OWNER = 64 * 2**20


@dataclass(frozen=True)
class ConcurrencyLimit:
    """Maximum number of concurrent calls, in total and per owner.

    Up to `max_waiting` further calls of an owner wait for a free place; calls beyond that are
    rejected with status 429 and the header Retry-After: `retry_after` (seconds).
    """

    total: int
    per_owner: int
    max_waiting: int = 0
    retry_after: float = 1.0


_UNLIMITED = 1_000_000  # a response that has started is never rejected halfway

LIMITS: Mapping[Kind, ConcurrencyLimit] = {
    "quick": ConcurrencyLimit(24, 12, max_waiting=200),
    "auth": ConcurrencyLimit(8, 8, max_waiting=400),  # runs before the owner is known
    "body": ConcurrencyLimit(200, 100),  # while a body is read, its connection is in use
    "parse": ConcurrencyLimit(2, 1, max_waiting=50),
    "ready": ConcurrencyLimit(2, 2, max_waiting=100),
    "metrics": ConcurrencyLimit(1, 1, max_waiting=20),
    "events": ConcurrencyLimit(6, 3, max_waiting=_UNLIMITED),
    "download": ConcurrencyLimit(16, 8, max_waiting=_UNLIMITED),
    "plan": ConcurrencyLimit(4, 2, retry_after=5.0),
    "webhook": ConcurrencyLimit(8, 2, retry_after=5.0),
    "inspect": ConcurrencyLimit(4, 2, retry_after=5.0),
    "batch": ConcurrencyLimit(2, 1, max_waiting=2, retry_after=5.0),  # holds a file in memory
    "upload": ConcurrencyLimit(16, 4, max_waiting=4, retry_after=5.0),
    "stream": ConcurrencyLimit(200, 50, retry_after=10.0),
}


@dataclass(frozen=True, eq=False)
class _Waiter:
    """A call that waits for a free place; `admitted` is resolved when it has one."""

    owner: str
    loop: asyncio.AbstractEventLoop
    admitted: "asyncio.Future[None]"


class ConcurrencyLimiter:
    """Enforces one ConcurrencyLimit. Safe to use from any thread and any event loop."""

    def __init__(self, name: str, limit: ConcurrencyLimit) -> None:
        self._name = name
        self._limit = limit
        self._lock = threading.Lock()
        self._running: Counter[str] = Counter()
        self._queue: deque[_Waiter] = deque()

    @property
    def running(self) -> int:
        """Number of running calls."""
        return self._running.total()

    async def run(self, owner: str, work: Callable[[], T]) -> T:
        """Run `work` on a daemon thread and return its result.

        Raises CapacityError over the limit.
        """
        await self.acquire(owner)
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        try:
            threading.Thread(
                target=self._work, args=(owner, work, loop, done), name=self._name, daemon=True
            ).start()
        except RuntimeError as error:  # the operating system refuses a new thread
            self.release(owner)
            raise self._over_limit() from error
        return await done

    async def stream(self, owner: str, items: Iterator[T]) -> AsyncIterator[T]:
        """Iterate over `items`, producing each item by `run`."""
        while (item := await self.run(owner, lambda: next(items, None))) is not None:
            yield item

    async def run_coroutine(self, owner: str, work: Coroutine[Any, Any, T]) -> T:
        """Await `work` on the event loop while occupying a place.

        Raises CapacityError over the limit.
        """
        try:
            await self.acquire(owner)
        except BaseException:
            work.close()
            raise
        try:
            return await work
        finally:
            self.release(owner)

    async def acquire(self, owner: str) -> None:
        """Occupy a place, waiting for one if necessary; pair with `release`.

        Raises CapacityError over the limit.
        """
        loop = asyncio.get_running_loop()
        with self._lock:
            if self._has_room(owner):
                self._running[owner] += 1
                return
            if sum(waiter.owner == owner for waiter in self._queue) >= self._limit.max_waiting:
                raise self._over_limit()
            waiter = _Waiter(owner, loop, loop.create_future())
            self._queue.append(waiter)
        try:
            await waiter.admitted
        except asyncio.CancelledError:
            with self._lock:
                still_waiting = waiter in self._queue
                if still_waiting:
                    self._queue.remove(waiter)
            if not still_waiting:  # cancelled after a place was assigned
                self.release(owner)
            raise

    def release(self, owner: str) -> None:
        """Free a place and assign it to the first waiting call whose owner is below the limit."""
        with self._lock:
            self._running[owner] -= 1
            self._running += Counter()  # removes owners with a count of 0
            admitted = next((one for one in self._queue if self._has_room(one.owner)), None)
            if admitted is None:
                return
            self._queue.remove(admitted)
            self._running[admitted.owner] += 1
        try:
            admitted.loop.call_soon_threadsafe(_resolve, admitted.admitted, None, None)
        except RuntimeError:  # its event loop is closed
            self.release(admitted.owner)

    def _has_room(self, owner: str) -> bool:
        return self.running < self._limit.total and self._running[owner] < self._limit.per_owner

    def _work(
        self,
        owner: str,
        work: Callable[[], T],
        loop: asyncio.AbstractEventLoop,
        done: "asyncio.Future[T]",
    ) -> None:
        value, error = None, None
        try:
            value = work()
        except BaseException as caught:  # raised again where the call is awaited
            error = caught
        self.release(owner)
        with suppress(RuntimeError):  # the event loop is closed
            loop.call_soon_threadsafe(_resolve, done, value, error)

    def _over_limit(self) -> CapacityError:
        limit = self._limit
        message = (
            f"Concurrent {self._name} calls must be <= {limit.per_owner} per owner"
            f" and <= {limit.total} in total."
        )
        return CapacityError(message, hint="Try again in a moment.", retry_after=limit.retry_after)


class ConcurrencyLimiters:
    """The limiter of every kind of call."""

    def __init__(self, limits: Mapping[Kind, ConcurrencyLimit] = LIMITS) -> None:
        self._limiters: dict[Kind, ConcurrencyLimiter] = {
            kind: ConcurrencyLimiter(kind, limit) for kind, limit in limits.items()
        }

    def __getitem__(self, kind: Kind) -> ConcurrencyLimiter:
        return self._limiters[kind]


class ByteBudget:
    """Thread-safe counter of reserved bytes, limited to `total` and to `per_owner`."""

    def __init__(self, total: int, per_owner: int) -> None:
        self._total = total
        self._per_owner = per_owner
        self._lock = threading.Lock()
        self._reserved: Counter[str] = Counter()

    @property
    def reserved(self) -> int:
        """Bytes reserved by all owners."""
        return self._reserved.total()

    def reserve(self, owner: str, count: int) -> None:
        """Reserve bytes. Raises ApiError: 429 over the owner's limit, 503 over the total."""
        with self._lock:
            if self._reserved[owner] + count > self._per_owner:
                limit = f"{self._per_owner >> 20} MiB per owner"
                raise _over_budget(429, f"Request bodies in flight must be <= {limit} together.")
            if self.reserved + count > self._total:
                limit = f"{self._total >> 20} MiB in total"
                raise _over_budget(503, f"Request bodies in flight must be <= {limit}.")
            self._reserved[owner] += count

    def release(self, owner: str, count: int) -> None:
        """Release reserved bytes."""
        with self._lock:
            self._reserved[owner] -= count
            self._reserved += Counter()  # removes owners with a count of 0


class BodyReservation:
    """Bytes reserved for the body of one request; a context manager that releases them at its end.

    `memory` limits what is held in memory, `bodies` everything that is read, files on disk
    included.
    """

    def __init__(self, owner: str, memory: ByteBudget, bodies: ByteBudget) -> None:
        self._owner = owner
        self._memory = memory
        self._bodies = bodies
        self._reserved: Counter[ByteBudget] = Counter()
        self.size = 0

    def __enter__(self) -> "BodyReservation":
        return self

    def __exit__(self, *raised: object) -> None:
        for budget, count in self._reserved.items():
            budget.release(self._owner, count)

    def add_body(self, count: int) -> None:
        """Reserve bytes read from the connection; `size` is their sum.

        Raises ApiError (429, 503).
        """
        self.size += count
        self._reserve(self._bodies, count)

    def add_memory(self, count: int) -> None:
        """Reserve bytes held in memory. Raises ApiError (429, 503)."""
        self._reserve(self._memory, count)

    def _reserve(self, budget: ByteBudget, count: int) -> None:
        budget.reserve(self._owner, count)
        self._reserved[budget] += count


def _over_budget(status: Literal[429, 503], message: str) -> ApiError:
    message = f"{message} Try again in a moment."
    headers = {"retry-after": "5"}
    if status == 503:  # noqa: PLR2004 - Service Unavailable
        return ApiError(status, message, "unavailable", type="server_error", headers=headers)
    code = "rate_limit_exceeded"
    return ApiError(status, message, code, type="rate_limit_error", headers=headers)


def _resolve(future: "asyncio.Future[Any]", value: Any, error: BaseException | None) -> None:
    if future.done():  # the caller was cancelled
        return
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)
