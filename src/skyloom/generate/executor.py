"""Run independent calls in parallel on a CPU with results that do not depend on the core count.

An operation split over threads sums in another order, so its last bits depend on their number.
Here every call uses one thread per operation, and two independent calls (such as the guidance
branches) run at a time.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

T = TypeVar("T")


class DeterministicExecutor:
    """Thread pool with single-threaded operations on a CPU; runs calls in sequence on a GPU."""

    def __init__(self, device: torch.device, count: int = 2) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._background: ThreadPoolExecutor | None = None
        if device.type == "cpu":
            self._pool = ThreadPoolExecutor(count, "skyloom", initializer=_use_one_thread)
            self._background = ThreadPoolExecutor(1, "skyloom-side", initializer=_use_one_thread)

    def run(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Run all calls and return their results in order."""
        if self._pool is None:
            return [call() for call in calls]
        futures = [self._pool.submit(_without_gradients, call) for call in calls]
        wait(futures)  # if one fails, no other one goes on
        return [future.result() for future in futures]

    def run_one(self, call: Callable[[], T]) -> T:
        """Run one call and return its result."""
        return self.run([call])[0]

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Start a call on the background thread; such calls run one at a time, in order."""
        if self._background is not None:
            return self._background.submit(_without_gradients, call)
        done: Future[T] = Future()
        done.set_result(_without_gradients(call))
        return done


def _use_one_thread() -> None:
    torch.set_num_threads(1)


def _without_gradients(call: Callable[[], T]) -> T:
    with torch.no_grad():
        return call()
