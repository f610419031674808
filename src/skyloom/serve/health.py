"""State of the worker processes that a server has started, as its API and metrics report it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class WorkerHealth:
    """Number of worker processes configured, running now, and restarted since the server began.

    `names`: the names under which the processes register; each is empty before the first start.
    """

    expected: int
    alive: int
    restarts: int
    names: tuple[str, ...] = ()
