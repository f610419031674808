"""How much of one kind of work may be in hand at once: in all, of one owner, and on one thing."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from skyloom.core.errors import CapacityError

RETRY_SECONDS = 10.0


class Slots:
    """Counts work in hand, for any number of threads. At most `total`, at most `per_owner` of one owner, and one piece
    of work on each thing that has a name."""

    def __init__(self, total: int, per_owner: int) -> None:
        self._total, self._per_owner = total, per_owner
        self._owners: Counter[str] = Counter()
        self._things: set[str] = set()
        self._lock = threading.Condition()

    def take(self, owner: str, thing: str | None = None) -> bool:
        """Begin work, if there is room: give it back when the work ends."""
        with self._lock:
            full = self._owners.total() >= self._total or self._owners[owner] >= self._per_owner
            if full or thing in self._things:
                self._forget(owner)
                return False
            self._owners[owner] += 1
            if thing is not None:
                self._things.add(thing)
            return True

    def give_back(self, owner: str, thing: str | None = None) -> None:
        """The work has ended, well or not."""
        with self._lock:
            self._owners[owner] -= 1
            self._forget(owner)
            if thing is not None:
                self._things.discard(thing)
            self._lock.notify_all()

    def settle(self, seconds: float) -> bool:
        """Wait until nothing is in hand; whether that came about in time."""
        with self._lock:
            return self._lock.wait_for(lambda: not self._owners.total(), seconds)

    @contextmanager
    def hold(self, owner: str, what: str) -> Iterator[None]:
        """A slot while the block runs. Raises CapacityError that names `what` when there is no room."""
        if not self.take(owner):
            raise CapacityError(
                f"Too many {what} run at once.", hint="Try again.", retry_after=RETRY_SECONDS
            )
        try:
            yield
        finally:
            self.give_back(owner)

    def of_owner(self, owner: str) -> int:
        """How much of an owner's work is in hand."""
        with self._lock:
            return self._owners.get(owner, 0)

    @property
    def free(self) -> int:
        """How much more may begin, for all owners together."""
        with self._lock:
            return self._total - self._owners.total()

    @property
    def things(self) -> list[str]:
        """What is worked on."""
        with self._lock:
            return sorted(self._things)

    def _forget(self, owner: str) -> None:
        """Keep no row for an owner who has nothing in hand."""
        if not self._owners[owner]:
            del self._owners[owner]
