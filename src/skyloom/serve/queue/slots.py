# pyright: basic
"""Slots: limits on the work that runs at once, in total, per owner and per resource."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from skyloom.core.errors import CapacityError

RETRY_SECONDS = 10.0


class Slots:
    """A thread-safe count of running work: at most `total`, `per_owner`, and one per resource."""

    def __init__(self, total: int, per_owner: int) -> None:
        self._total = total
        self._per_owner = per_owner
        self._owners: Counter[str] = Counter()
        self._resources: set[str] = set()
        self._lock = threading.Condition()

    def acquire(self, owner: str, resource: str | None = None) -> bool:
        """Take a slot if there is one; `release` it when the work ends."""
        with self._lock:
            full = self._owners.total() >= self._total
            if full or self._owners.get(owner, 0) >= self._per_owner or resource in self._resources:
                return False
            self._owners[owner] += 1
            if resource is not None:
                self._resources.add(resource)
            return True

    def release(self, owner: str, resource: str | None = None) -> None:
        """Return a slot."""
        with self._lock:
            self._owners[owner] -= 1
            if not self._owners[owner]:
                del self._owners[owner]  # or the counter grows with the number of owners
            if resource is not None:
                self._resources.discard(resource)
            self._lock.notify_all()

    def wait_until_idle(self, seconds: float) -> bool:
        """Wait until no slot is taken, at most `seconds`; return whether that happened."""
        with self._lock:
            return self._lock.wait_for(lambda: not self._owners.total(), seconds)

    @contextmanager
    def hold(self, owner: str, kind: str) -> Iterator[None]:
        """Hold a slot for the block. Raises CapacityError naming the `kind` of work."""
        if not self.acquire(owner):
            message = f"Too many {kind} run at once."
            raise CapacityError(message, hint="Try again.", retry_after=RETRY_SECONDS)
        try:
            yield
        finally:
            self.release(owner)

    def count(self, owner: str) -> int:
        """Return the number of an owner's slots in use."""
        with self._lock:
            return self._owners.get(owner, 0)

    @property
    def free(self) -> int:
        """Number of free slots, for all owners together."""
        with self._lock:
            return self._total - self._owners.total()

    @property
    def resources(self) -> list[str]:
        """Resources in use, sorted."""
        with self._lock:
            return sorted(self._resources)
