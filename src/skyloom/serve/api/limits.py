"""Limits on what happens at once: calls by kind and owner, and bytes of request bodies.

Every kind of call has threads of its own and a share of them per owner, so no owner takes all threads, and slow kinds
take none from quick ones. Threads are daemons: a call that hangs never keeps the process from ending.
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
"""What a call is limited with. "loop" runs on the event loop and must not wait for anything."""
MEMORY_BYTES, MEMORY_BYTES_PER_OWNER = 128 * 2**20, 64 * 2**20  # of bodies that are held in memory


@dataclass(frozen=True)
class Limit:
    """How many calls run at once, in all and per owner, and how many more of an owner wait for their turn; what is
    more is refused with 429. `retry_after` in seconds."""

    total: int
    per_owner: int
    waiting: int = 0
    retry_after: float = 1.0


_ALL = 1_000_000  # an answer that has begun is not broken off

LIMITS: Mapping[Kind, Limit] = {
    "quick": Limit(24, 12, waiting=200),
    "auth": Limit(8, 8, waiting=400),  # the owner is not known yet
    "body": Limit(200, 100),  # being read: a slow one holds a connection
    "parse": Limit(2, 1, waiting=50),
    "ready": Limit(2, 2, waiting=100),
    "metrics": Limit(1, 1, waiting=20),
    "events": Limit(6, 3, waiting=_ALL),
    "download": Limit(16, 8, waiting=_ALL),
    "plan": Limit(4, 2, retry_after=5.0),
    "webhook": Limit(8, 2, retry_after=5.0),
    "inspect": Limit(4, 2, retry_after=5.0),
    "batch": Limit(2, 1, waiting=2, retry_after=5.0),  # each holds its file's lines in memory
    "upload": Limit(16, 4, waiting=4, retry_after=5.0),
    "stream": Limit(200, 50, retry_after=10.0),
}


@dataclass(frozen=True, eq=False)
class _Ticket:
    """A call that waits for its turn."""

    owner: str
    loop: asyncio.AbstractEventLoop
    turn: "asyncio.Future[None]"


class Gate:
    """A limit at work. May be used from any thread and any event loop."""

    def __init__(self, name: str, limit: Limit) -> None:
        self._name, self._limit = name, limit
        self._lock = threading.Lock()
        self._running: Counter[str] = Counter()
        self._queue: deque[_Ticket] = deque()

    @property
    def running(self) -> int:
        """How many calls run."""
        return self._running.total()

    async def run(self, owner: str, work: Callable[[], T]) -> T:
        """What `work` returns or raises, on a daemon thread. Raises CapacityError over the limit."""
        await self.enter(owner)
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        try:
            threading.Thread(
                target=self._work, args=(owner, work, loop, done), name=self._name, daemon=True
            ).start()
        except RuntimeError as error:  # the system has no thread left
            self.leave(owner)
            raise self._busy() from error
        return await done

    async def stream(self, owner: str, pieces: Iterator[T]) -> AsyncIterator[T]:
        """The items of an iterator, each made by `run`."""
        while (piece := await self.run(owner, lambda: next(pieces, None))) is not None:
            yield piece

    async def hold(self, owner: str, work: Coroutine[Any, Any, T]) -> T:
        """What `work` comes to on the event loop, with a place for as long. Raises CapacityError over the limit."""
        try:
            await self.enter(owner)
        except BaseException:
            work.close()
            raise
        try:
            return await work
        finally:
            self.leave(owner)

    async def enter(self, owner: str) -> None:
        """Take a place, at once or when there is one; `leave` must follow. Raises CapacityError over the limit."""
        loop = asyncio.get_running_loop()
        with self._lock:
            if self._has_room(owner):
                self._running[owner] += 1
                return
            if sum(ticket.owner == owner for ticket in self._queue) >= self._limit.waiting:
                raise self._busy()
            ticket = _Ticket(owner, loop, loop.create_future())
            self._queue.append(ticket)
        try:
            await ticket.turn
        except asyncio.CancelledError:
            with self._lock:
                waits = ticket in self._queue
                if waits:
                    self._queue.remove(ticket)
            if not waits:  # its turn came in the same moment
                self.leave(owner)
            raise

    def leave(self, owner: str) -> None:
        """Give a place back, to the first who waits and may have it."""
        with self._lock:
            self._running[owner] -= 1
            self._running += Counter()  # drops owners with nothing
            chosen = next((ticket for ticket in self._queue if self._has_room(ticket.owner)), None)
            if chosen is None:
                return
            self._queue.remove(chosen)
            self._running[chosen.owner] += 1
        try:
            chosen.loop.call_soon_threadsafe(_settle, chosen.turn, None, None)
        except RuntimeError:  # its loop has ended
            self.leave(chosen.owner)

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
        self.leave(owner)
        with suppress(RuntimeError):  # the loop has ended, and nobody waits
            loop.call_soon_threadsafe(_settle, done, value, error)

    def _busy(self) -> CapacityError:
        limit = self._limit
        message = f"Too many {self._name} calls at once: {limit.per_owner} per owner and {limit.total} in all may run."
        return CapacityError(message, hint="Try again in a moment.", retry_after=limit.retry_after)


class Gates:
    """A gate for every kind."""

    def __init__(self, limits: Mapping[Kind, Limit] = LIMITS) -> None:
        self._gates: dict[Kind, Gate] = {kind: Gate(kind, limit) for kind, limit in limits.items()}

    def __getitem__(self, kind: Kind) -> Gate:
        return self._gates[kind]


class InFlight:
    """Bytes of bodies that are being read or used: `total` in the process, and `per_owner`."""

    def __init__(self, total: int, per_owner: int) -> None:
        self._total, self._per_owner = total, per_owner
        self._lock = threading.Lock()
        self._held: Counter[str] = Counter()

    @property
    def held(self) -> int:
        """Bytes in flight."""
        return self._held.total()

    def take(self, owner: str, count: int) -> None:
        """Add bytes. Raises ApiError: 429 over the owner's share, 503 where others have the rest."""
        with self._lock:
            if self._held[owner] + count > self._per_owner:
                raise _too_much(
                    429,
                    f"Your requests in flight are larger than {self._per_owner >> 20} MiB together.",
                )
            if self.held + count > self._total:
                raise _too_much(
                    503, f"All requests in flight are larger than {self._total >> 20} MiB together."
                )
            self._held[owner] += count

    def give_back(self, owner: str, count: int) -> None:
        """Remove bytes."""
        with self._lock:
            self._held[owner] -= count
            self._held += Counter()


class Hold:
    """What one request has in flight, in memory and in all; given back at the end of the block."""

    def __init__(self, owner: str, memory: InFlight, bodies: InFlight) -> None:
        self._owner, self._memory, self._bodies = owner, memory, bodies
        self._taken: list[tuple[InFlight, int]] = []
        self.size = 0

    def __enter__(self) -> "Hold":
        return self

    def __exit__(self, *raised: object) -> None:
        for where, count in self._taken:
            where.give_back(self._owner, count)

    def body(self, count: int) -> None:
        """Bytes of a body were read; `size` is all of them. Raises ApiError (429, 503)."""
        self.size += count
        self._take(self._bodies, count)

    def memory(self, count: int) -> None:
        """Bytes are held in memory. Raises ApiError (429, 503)."""
        self._take(self._memory, count)

    def _take(self, where: InFlight, count: int) -> None:
        where.take(self._owner, count)
        if self._taken and self._taken[-1][0] is where:
            count += self._taken.pop()[1]
        self._taken.append((where, count))


def _too_much(status: int, message: str) -> ApiError:
    kind = "rate_limit_error" if status == 429 else "server_error"  # noqa: PLR2004 - Too Many Requests
    code = "rate_limit_exceeded" if kind == "rate_limit_error" else "unavailable"
    return ApiError(
        status, f"{message} Try again in a moment.", code, type=kind, headers={"retry-after": "5"}
    )


def _settle(future: "asyncio.Future[Any]", value: Any, error: BaseException | None) -> None:
    if future.done():  # whoever waited is gone
        return
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)
