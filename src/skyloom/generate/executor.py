"""Work side by side on a CPU without changing a bit: whole calls in parallel, never the inside of an operation.

An operation that is split over threads adds up in another order, so its last bits depend on their number. Here
every call runs on one thread, and independent calls (with and without the prompt) run on two at a time; the
result is the same on one core, two or sixty-four.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


class Lanes:
    """Runs calls on worker threads that give each operation one thread; on a GPU simply one after another."""

    def __init__(self, device: torch.device, count: int = 2) -> None:
        single = device.type == "cpu"
        self._pool = (
            ThreadPoolExecutor(count, "skyloom", initializer=_use_one_thread) if single else None
        )
        self._side = (
            ThreadPoolExecutor(1, "skyloom-side", initializer=_use_one_thread) if single else None
        )

    def run(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """The results of all calls, in order."""
        if self._pool is None:
            return [call() for call in calls]
        return [
            future.result()
            for future in [self._pool.submit(_without_gradients, call) for call in calls]
        ]

    def run_one(self, call: Callable[[], T]) -> T:
        """The result of one call."""
        return self.run([call])[0]

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Start a call beside all others; such calls are done in their order."""
        if self._side is not None:
            return self._side.submit(_without_gradients, call)
        done: Future[T] = Future()
        done.set_result(_without_gradients(call))
        return done


def _use_one_thread() -> None:
    torch.set_num_threads(1)


def _without_gradients(call: Callable[[], T]) -> T:
    with torch.no_grad():
        return call()
