"""Workers on many hosts: how many are wished, which are there, what is placed and what is let go.

A keeper is what a cluster places: it watches one worker process on its host and starts it again when it dies. Jobs,
leases and results are in the database and the storage alone, so a cluster that breaks loses none of them. This file
knows no Ray, only a `Plane` that can place keepers (ray_plane.py is one).
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from sqlalchemy.engine import make_url

from skyloom.core.errors import CapacityError, ConfigError
from skyloom.core.version import __version__
from skyloom.serve.queue.leases import Hand
from skyloom.serve.settings import Settings
from skyloom.serve.workers.processes import settings_environment

WAIT_SECONDS = 120.0
_LOOK_SECONDS = 0.5
_ROUNDING = 1e-6
_PREFIX = "skyloom-worker-"
_FORWARDED = (
    "SKYLOOM_",
    "AWS_",
    "AZURE_",
    "GOOGLE_",
    "PG",
)  # settings, and the keys of stores and databases
_LOOPBACK = ("localhost", "127.", "::1")


@dataclass(frozen=True)
class Node:
    """A node of a cluster: what it has, and what of that nobody uses."""

    id: str
    host: str
    address: str
    cpus: float
    gpus: float
    free_cpus: float
    free_gpus: float


@dataclass(frozen=True)
class Orders:
    """What a keeper is to do: the part of a host that its worker takes, and the environment that tells it the queue."""

    cpus: float
    gpus: float
    environment: Mapping[str, str] = field(repr=False)

    @property
    def stamp(self) -> str:
        """Changes with anything that a running worker would have to be started again for."""
        whole = json.dumps([__version__, self.cpus, self.gpus, sorted(self.environment.items())])
        return hashlib.sha256(whole.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Keeper:
    """What a keeper tells of itself: the orders that it has, where it is, and how its worker does."""

    stamp: str
    cpus: float
    gpus: float
    node: str
    host: str
    worker: str | None
    pid: int | None
    alive: bool
    restarts: int


class Plane(Protocol):
    """Whatever can place keepers on hosts, under names."""

    def nodes(self) -> Sequence[Node]:
        """Those that live."""
        ...

    def keepers(self) -> Mapping[str, Keeper | None]:
        """Every keeper by its name; None for one that does not answer (yet)."""
        ...

    def place(self, name: str, orders: Orders, node: str | None) -> None:
        """Start a keeper, on a node or wherever there is room, spread over the hosts; it comes back if it dies."""
        ...

    def dismiss(self, names: Sequence[str]) -> None:
        """Let workers give back their jobs and end, all at once, and their keepers with them."""
        ...


@dataclass(frozen=True)
class Wish:
    """How many workers there are to be, and what of a host each takes.

    "per-gpu" is as many as the GPUs have room for. None is that where there is a GPU, and one for each node elsewhere.
    `gpus` None is a whole one where there are any.
    """

    workers: int | Literal["per-gpu"] | None = None
    cpus: float = 1.0
    gpus: float | None = None

    def settle(self, nodes: Sequence[Node]) -> tuple[int, float]:
        """The number of workers, and the GPUs of each. Raises ConfigError for what cannot be counted."""
        share = self.gpus if self.gpus is not None else float(any(node.gpus for node in nodes))
        if isinstance(self.workers, int):
            return self.workers, share
        if not share and self.workers is None:
            return len(nodes), 0.0
        if share > 1 and not share.is_integer():
            raise ConfigError(
                f"{share:g} GPUs cannot be shared out.", hint="Use a part of one, or whole ones."
            )
        room = sum(_fit(node.gpus, share) for node in nodes) if share else 0
        if not room:
            raise ConfigError(
                "The cluster has no GPU of that share.", hint="Give a number: --workers 2 --gpus 0."
            )
        return room, share


def environment_of(settings: Settings, *, data: bool) -> dict[str, str]:
    """What workers on other hosts are told: our settings, and the keys of stores and databases in our environment.

    Their data folder is their own, unless `data`.
    """
    kept = {name: value for name, value in os.environ.items() if name.startswith(_FORWARDED)}
    told = {**kept, **settings_environment(settings)}
    if not data:
        del told["SKYLOOM_DATA"]
    return told


def is_local(settings: Settings) -> str | None:
    """What of the settings only this host can reach, as a word; None if nothing."""
    url = make_url(settings.database)
    host = str(url.host or url.query.get("host") or "/")
    if url.get_backend_name() == "sqlite" or host.startswith(("/", *_LOOPBACK)):
        return "database"
    return (
        "storage" if "://" not in settings.storage or settings.storage.startswith("file:") else None
    )


def bring_up(
    plane: Plane,
    settings: Settings,
    wish: Wish,
    hands: Callable[[], Mapping[str, Hand]],
    *,
    data: bool = False,
    wait: float = WAIT_SECONDS,
) -> None:
    """Make the cluster's workers what is wished: place what is missing, let go of what is too much or has old orders.

    Returns when every worker was seen in the database. Raises ConfigError for what other hosts cannot reach,
    CapacityError when there is no room or a worker does not come up in `wait` seconds.
    """
    nodes = plane.nodes()
    local = is_local(settings)
    if local and len({node.address for node in nodes}) > 1:
        raise ConfigError(
            f"The cluster has several hosts, and the {local} is on this one only.",
            hint="Use --database postgresql://user@host/name and --storage s3://bucket, which all of them reach.",
        )
    count, gpus = wish.settle(nodes)
    orders = Orders(wish.cpus, gpus, environment_of(settings, data=data))
    names = [f"{_PREFIX}{index}" for index in range(count)]
    there = plane.keepers()
    good = {
        name
        for name, told in there.items()
        if name in names and told is not None and told.stamp == orders.stamp
    }
    old = [name for name in there if name not in good]
    missing = [name for name in names if name not in good]
    _check_room(nodes, [told for name in old if (told := there[name])], orders, len(missing))
    if old:
        plane.dismiss(old)
    pinned = (
        nodes[0].id if local and len(nodes) == 1 else None
    )  # it must not go to a host that joins later
    for name in missing:
        plane.place(name, orders, pinned)
    _wait_for(plane, names, hands, wait)


def take_down(plane: Plane) -> int:
    """Let all workers give back their jobs and end; how many keepers there were."""
    names = list(plane.keepers())
    if names:
        plane.dismiss(names)
    return len(names)


def report(plane: Plane, hands: Mapping[str, Hand]) -> dict[str, list[dict[str, Any]]]:
    """Nodes and workers as plain values; device, job and times are the database's. Times are seconds since 1970."""
    workers: list[dict[str, Any]] = []
    for name, told in sorted(plane.keepers().items(), key=lambda item: (len(item[0]), item[0])):
        hand = None if told is None else hands.get(told.worker or "")
        state = (
            "lost"
            if told is None
            else "starting"
            if hand is None
            else "working"
            if hand.job
            else "idle"
        )
        row = {"name": name, "state": state, "host": told and told.host, "pid": told and told.pid}
        row |= {
            "device": hand and hand.device,
            "since": hand and hand.started_at,
            "job": hand and hand.job,
        }
        row |= {"job_begun": hand and hand.job_begun_at, "restarts": told and told.restarts}
        workers.append(row)
    return {"nodes": [asdict(node) for node in plane.nodes()], "workers": workers}


def _fit(gpus: float, share: float) -> int:
    """How many shares there are in GPUs; none lies on two of them, unless it is of whole ones."""
    if share >= 1:
        return int(gpus / share + _ROUNDING)
    return int(gpus + _ROUNDING) * int(1 / share + _ROUNDING) + int(gpus % 1 / share + _ROUNDING)


def _check_room(
    nodes: Sequence[Node], leaving: Sequence[Keeper], orders: Orders, missing: int
) -> None:
    """Raise CapacityError where so many more workers do not fit once the leaving ones have gone."""
    room = 0
    for node in nodes:
        gone = [keeper for keeper in leaving if keeper.node == node.id]
        cpus = node.free_cpus + sum(keeper.cpus for keeper in gone)
        gpus = node.free_gpus + sum(keeper.gpus for keeper in gone)
        fits = [int(cpus / orders.cpus + _ROUNDING)] if orders.cpus else []
        fits += [_fit(gpus, orders.gpus)] if orders.gpus else []
        room += min(fits, default=missing)
    if room < missing:
        raise CapacityError(
            f"{missing} more workers of {orders.cpus:g} CPUs and {orders.gpus:g} GPUs are wished, {room} fit.",
            hint="Wish for fewer, give each less (--cpus, --gpus), or add nodes.",
        )


def _wait_for(
    plane: Plane, names: Sequence[str], hands: Callable[[], Mapping[str, Hand]], wait: float
) -> None:
    """Until each keeper's worker has said hello in the database."""
    until = time.monotonic() + wait
    while True:
        keepers, seen = plane.keepers(), hands()
        late = [
            name for name in names if (told := keepers.get(name)) is None or told.worker not in seen
        ]
        if not late:
            return
        if time.monotonic() > until:
            where = {told.host for name in late if (told := keepers.get(name))}
            raise CapacityError(
                f"{len(late)} of {len(names)} workers were not seen in the database after {wait:.0f} s"
                f"{' (on ' + ', '.join(sorted(where)) + ')' if where else ''}.",
                hint="Ray's session folder on that host has their logs; `skyloom cluster down` lets go of all.",
            )
        time.sleep(_LOOK_SECONDS)
