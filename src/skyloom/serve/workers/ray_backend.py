"""Run workers on the nodes of a Ray cluster: one detached actor per worker, by Ray's public API.

Ray places the actors and restarts them elsewhere when a node is lost. Jobs, leases and results are
in the database and the storage only, so losing the cluster loses no job. The operator starts and
stops Ray itself (docs/cluster.md). Ray is imported inside functions only.
"""

import contextlib
import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal, NamedTuple

from skyloom import __version__
from skyloom.core.errors import CapacityError, ConfigError
from skyloom.serve.settings import Settings
from skyloom.serve.workers.processes import STOP_SECONDS, WorkerProcess, worker_command

_REPLY_SECONDS = 5.0


class Node(NamedTuple):
    """A live node of the cluster and its total resources."""

    id: str
    host: str
    address: str
    cpus: float
    gpus: float


@dataclass(frozen=True)
class WorkerSpec:
    """Resources that Ray reserves for a worker, and the worker's environment with its secrets."""

    cpus: float
    gpus: float
    environment: Mapping[str, str] = field(repr=False)

    @property
    def digest(self) -> str:
        """Hash of spec and version; a running worker with another digest is replaced."""
        values = [__version__, self.cpus, self.gpus, sorted(self.environment.items())]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


class ActorStatus(NamedTuple):
    """Digest of an actor's spec, its host, and the name and state of its worker process."""

    digest: str
    host: str
    worker: str | None
    pid: int | None
    restarts: int


class WorkerActor:
    """Ray actor: run one `skyloom worker` process on its node and restart it after a crash.

    When the actor dies, the worker's standard input closes: it returns its job and exits.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self._environment = {**own, **spec.environment}
        self._digest = spec.digest
        command = worker_command("cuda:0" if spec.gpus else "cpu")
        self._process = WorkerProcess(command, self._environment, on_exit=self._requeue_jobs)
        self._process.start()

    def status(self) -> ActorStatus:
        """Current state of the worker process."""
        process, host = self._process, os.uname().nodename
        return ActorStatus(self._digest, host, process.name, process.pid, process.restarts)

    def stop(self) -> None:
        """Let the worker return its job and exit; kill it after STOP_SECONDS."""
        self._process.terminate()
        self._process.join()

    def _requeue_jobs(self, worker: str) -> None:
        """Return a dead worker's jobs to the queue; the database is open for this call only."""
        from skyloom.serve.queue.database import Database
        from skyloom.serve.queue.leases import Leases
        from skyloom.serve.settings import load_settings

        settings = load_settings(environment=self._environment)
        with contextlib.closing(Database(settings.database)) as database:
            Leases(database, settings).requeue_worker_jobs(worker)


class RayBackend:
    """The cluster that this process is connected to. Actor names identify workers."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray

    def nodes(self) -> list[Node]:
        """The live nodes."""
        return [
            Node(
                id=node["NodeID"],
                host=node["NodeManagerHostname"],
                address=node["NodeManagerAddress"],
                cpus=node["Resources"].get("CPU", 0.0),
                gpus=node["Resources"].get("GPU", 0.0),
            )
            for node in self._ray.nodes()
            if node["Alive"]
        ]

    def actors(self) -> dict[str, ActorStatus | None]:
        """Status of every actor by name; None for one that does not reply within 5 s."""
        calls = {name: actor.status.remote() for name, actor in self._handles()}
        if calls:
            self._ray.wait(list(calls.values()), num_returns=len(calls), timeout=_REPLY_SECONDS)
        statuses: dict[str, ActorStatus | None] = dict.fromkeys(calls)
        for name, call in calls.items():
            with contextlib.suppress(self._ray.exceptions.RayError):
                statuses[name] = self._ray.get(call, timeout=0)
        return statuses

    def start(self, name: str, spec: WorkerSpec, node: str | None) -> None:
        """Create an actor on a node, or spread over all nodes if None."""
        self._ray.remote(WorkerActor).options(
            name=name,
            lifetime="detached",
            max_restarts=-1,
            max_concurrency=2,  # `status` replies while `stop` waits
            num_cpus=spec.cpus,
            num_gpus=spec.gpus,
            scheduling_strategy="SPREAD" if node is None else self._on_node(node),
        ).remote(spec)

    def stop(self, names: Sequence[str]) -> None:
        """Stop these workers in parallel and remove their actors."""
        actors = [actor for name, actor in self._handles() if name in names]
        stops = [actor.stop.remote() for actor in actors]
        if stops:
            self._ray.wait(stops, num_returns=len(stops), timeout=STOP_SECONDS + _REPLY_SECONDS)
        for actor in actors:
            self._ray.kill(actor, no_restart=True)

    def check_authentication(self) -> None:
        """Raise ConfigError unless every node runs with token authentication."""
        task = self._ray.remote(num_cpus=0)(os.getenv)
        placed = [task.options(scheduling_strategy=self._on_node(n.id)) for n in self.nodes()]
        modes = self._ray.get([one.remote("RAY_AUTH_MODE") for one in placed], timeout=60)
        if set(modes) != {"token"}:
            hint = "Start every node with RAY_AUTH_MODE=token (docs/cluster.md)."
            raise ConfigError("The Ray cluster must use token authentication.", hint=hint)

    def _handles(self) -> Iterator[tuple[str, Any]]:
        for name in self._ray.util.list_named_actors():
            with contextlib.suppress(ValueError):  # removed since it was listed
                yield name, self._ray.get_actor(name)

    def _on_node(self, node: str) -> Any:
        strategies = self._ray.util.scheduling_strategies
        return strategies.NodeAffinitySchedulingStrategy(node, soft=False)


@contextlib.contextmanager
def connect(address: str) -> Iterator[tuple[RayBackend, str]]:
    """Connect to the cluster at "auto" or host:port; yield the backend and the head's address.

    "auto" is RAY_ADDRESS, or the cluster that this host is a node of. Raises ConfigError (Ray is
    not installed, or no token authentication) and CapacityError (no cluster).
    """
    try:
        ray = import_module("ray")
    except ImportError as error:
        raise ConfigError("A cluster needs Ray.", hint="Run pip install 'skyloom[ray]'.") from error
    address = os.environ.get("RAY_ADDRESS", address) if address == "auto" else address
    with contextlib.ExitStack() as stack:
        stack.callback(ray.shutdown)
        try:
            if address != "auto":  # Ray itself waits 80 s for an unreachable head
                host, _, port = address.rpartition(":")
                socket.create_connection((host.strip("[]"), int(port)), _REPLY_SECONDS).close()
            options = {"namespace": "skyloom", "log_to_driver": False, "logging_level": "ERROR"}
            context = ray.init(address=address, **options)
            backend = RayBackend(ray)
            backend.check_authentication()
        except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            cause = (str(error).splitlines() or [""])[0]
            raise CapacityError(
                f"The Ray cluster at {address!r:.60} cannot be used ({cause:.200}).",
                hint="Start one with `ray start --head`, or give --address (docs/cluster.md).",
            ) from error
        yield backend, context.address_info["gcs_address"]


def resolve_target(
    nodes: Sequence[Node], count: int | Literal["per-gpu"] | None, cpus: float, gpus: float | None
) -> tuple[int, float]:
    """Number of workers and GPUs of each. Raises CapacityError for more than the nodes have.

    `count` "per-gpu" is as many as the GPUs have room for; None is "per-gpu" on a cluster with
    GPUs, else one per node. `gpus` None is 1 on a cluster with GPUs, else 0.
    """
    if gpus is None:
        gpus = float(count == "per-gpu" or any(node.gpus for node in nodes))
    room = sum(_workers_that_fit(node, cpus, gpus) for node in nodes)
    if not isinstance(count, int):
        count = max(1, room) if gpus else len(nodes)
    if count > room:
        raise CapacityError(
            f"{count} workers with {cpus:g} CPUs and {gpus:g} GPUs each were requested, "
            f"but only {room} fit on the cluster.",
            hint="Request fewer (--workers), give each less (--cpus, --gpus), or add nodes.",
        )
    return count, gpus


def _workers_that_fit(node: Node, cpus: float, gpus: float) -> int:
    """Number of workers for an empty node; a part of a GPU never spans two GPUs."""
    limits = [node.cpus / cpus] if cpus else []
    if gpus:
        limits.append(node.gpus / gpus if gpus >= 1 else int(node.gpus) * int(1 / gpus + 1e-6))
    return int(min(limits, default=1_000) + 1e-6)


def scale(backend: RayBackend, settings: Settings, spec: WorkerSpec, count: int) -> list[str]:
    """Start missing workers, stop surplus ones and those with another spec; the actors' names.

    Raises ConfigError if the cluster has hosts that cannot reach the database or the storage.
    """
    nodes = backend.nodes()
    local = settings.local_only
    if local and len({node.address for node in nodes}) > 1:
        raise ConfigError(
            f"The {local} must be reachable from every host of the cluster.",
            hint="Use --database postgresql://user@host/name and --storage s3://bucket.",
        )
    names = [f"skyloom-worker-{index}" for index in range(count)]
    actors = backend.actors()
    current = {name for name in names if (s := actors.get(name)) and s.digest == spec.digest}
    if obsolete := [name for name in actors if name not in current]:
        backend.stop(obsolete)
    node = nodes[0].id if local else None  # a node that joins later could not reach it
    for name in names:
        if name not in current:
            backend.start(name, spec, node)
    return names
