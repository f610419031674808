"""Ray as a plane: keepers are detached actors in a namespace of ours. Ray is imported inside of functions only.

Ray places and restarts them, and nothing else: no job, file or frame passes through it. Orders, which hold the
database's password, reach an actor as a pickled argument over connections that ask for the cluster's token; they stand
in no process's arguments, and in no runtime environment, which Ray would log.
"""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast

from skyloom.core.errors import CapacityError, ConfigError, SkyloomError
from skyloom.serve.workers.cluster import Keeper, Node, Orders
from skyloom.serve.workers.local_ray import LOOPBACK, Head, answers, found_here, has_token
from skyloom.serve.workers.processes import STOP_SECONDS, Child, worker_command

_NAMESPACE = "skyloom"
_ANSWER_SECONDS, _PROBE_SECONDS = 5.0, 60.0
_OPEN, _CLOSED = 0, 3
# Asks without a token, as anybody could. The answer says whether the cluster lets anybody in.
_PROBE = f"""
import sys
from ray._raylet import GcsClient
from ray.exceptions import AuthenticationError
try:
    GcsClient(address=sys.argv[1]).internal_kv_keys(b"skyloom")
except AuthenticationError:
    sys.exit({_CLOSED})
"""


class KeptWorker:
    """The actor: one worker process on the host where Ray has put it, and a thread that watches it.

    The process ends by itself, giving back its job, when the actor is gone: its standard input ends then.
    """

    def __init__(self, orders: Orders) -> None:
        own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self._orders = orders
        self._environment = {**own, **orders.environment}
        self._child = Child(
            worker_command("cuda:0" if orders.gpus else "cpu"), self._environment, self._forget
        )
        self._child.start()

    def tell(self) -> Keeper:
        """How it does."""
        child, orders, node = self._child, self._orders, _ray().get_runtime_context().get_node_id()
        told = (child.name, child.pid, child.alive, child.restarts)
        return Keeper(orders.stamp, orders.cpus, orders.gpus, node, os.uname().nodename, *told)

    def stop(self) -> None:
        """Let the worker give back its job and end, within ten seconds."""
        self._child.ask_to_stop()
        self._child.join()

    def _forget(self, name: str) -> None:
        """A worker died: what it held goes back to the queue at once. The database is open only meanwhile."""
        from skyloom.serve.queue.database import Database
        from skyloom.serve.queue.leases import Leases
        from skyloom.serve.settings import load_settings

        settings = load_settings(environment=self._environment)
        with contextlib.closing(Database(settings.database)) as database:
            Leases(database, settings).requeue_worker_jobs(name)


class RayPlane:
    """The cluster that this process is connected to."""

    def nodes(self) -> list[Node]:
        """Those that live."""
        ray = _ray()
        free = import_module(
            "ray._private.state"
        ).available_resources_per_node()  # the public call needs the dashboard
        found = [node for node in ray.nodes() if node["Alive"]]
        return [_node(told, free.get(told["NodeID"], {})) for told in found]

    def keepers(self) -> dict[str, Keeper | None]:
        """Every keeper by its name; None for one that does not answer."""
        ray = _ray()
        calls = {
            name: handle.tell.remote()
            for name in self._names()
            if (handle := _handle(name)) is not None
        }
        ready, _ = (
            ray.wait(list(calls.values()), num_returns=len(calls), timeout=_ANSWER_SECONDS)
            if calls
            else ([], [])
        )
        return {name: _answer(call) if call in ready else None for name, call in calls.items()}

    def place(self, name: str, orders: Orders, node: str | None) -> None:
        """Start a keeper on a node, or spread over all. Ray restarts it wherever there is room."""
        ray = _ray()
        strategy: Any = "SPREAD"
        if node is not None:
            scheduling = import_module("ray.util.scheduling_strategies")
            strategy = scheduling.NodeAffinitySchedulingStrategy(node, soft=False)
        options = {
            "name": name,
            "namespace": _NAMESPACE,
            "lifetime": "detached",
            "max_restarts": -1,
        }
        options |= {
            "num_cpus": orders.cpus,
            "num_gpus": orders.gpus,
            "scheduling_strategy": strategy,
        }
        ray.remote(KeptWorker).options(**options, max_concurrency=2).remote(orders)

    def dismiss(self, names: Sequence[str]) -> None:
        """Let workers give back their jobs and end, all at once; then their actors."""
        ray = _ray()
        handles = [handle for name in names if (handle := _handle(name)) is not None]
        stops = [handle.stop.remote() for handle in handles]
        if stops:
            ray.wait(stops, num_returns=len(stops), timeout=STOP_SECONDS + _ANSWER_SECONDS)
        for handle in handles:
            ray.kill(handle, no_restart=True)

    def _names(self) -> list[str]:
        found = _ray().util.list_named_actors(all_namespaces=True)
        return [one["name"] for one in found if one["namespace"] == _NAMESPACE]


@contextlib.contextmanager
def connected(head: Head, address: str, *, start: bool) -> Iterator[tuple[RayPlane, str]]:
    """The plane at an address ("auto", "local" or host:port), and which address that is, while the block runs.

    "local" is our own on this machine; "auto" the one that is there, by ours, RAY_ADDRESS or Ray's own search. `start`
    starts ours where there is none. Raises ConfigError for a missing Ray, a missing token, or a cluster past this
    machine that asks for none; CapacityError where nothing answers.
    """
    before = head.address()
    where, loopback = _find(head, address, start=start)
    if not where.startswith(LOOPBACK) and not has_token():
        raise ConfigError(
            "This machine has no token for a Ray cluster past itself.",
            hint="Start all nodes with RAY_AUTH_MODE=token, and put their token in ~/.ray/auth_token.",
        )
    _prepare(loopback=loopback)
    try:
        with _joined(where) as found:
            yield RayPlane(), found
    except SkyloomError:
        if start and before is None:  # what this call has started for nothing
            head.stop()
        raise


@contextlib.contextmanager
def _joined(where: str) -> Iterator[str]:
    """Connected to a cluster, while the block runs; its address as it says it. Raises CapacityError, ConfigError."""
    ray = _ray()
    try:
        found = _init(ray, where)
        if not all(node.address.startswith(LOOPBACK) for node in RayPlane().nodes()) and _is_open(
            found
        ):
            raise ConfigError(
                f"The Ray cluster at {found} lets in anybody who can reach it, to run whatever they like.",
                hint="Start all of its nodes with RAY_AUTH_MODE=token; `ray get-auth-token --generate` makes a token.",
            )
        yield found
    except ray.exceptions.RayError as error:
        raise _explain(error) from error
    finally:
        ray.shutdown()


def _init(ray: Any, where: str) -> str:
    try:
        context = ray.init(
            address=where, namespace=_NAMESPACE, log_to_driver=False, logging_level="ERROR"
        )
    except (
        ConnectionError,
        TimeoutError,
        RuntimeError,
    ) as error:  # another version of Ray or Python is the last
        raise _explain(error) from error
    return str(context.address_info["gcs_address"])


def _find(head: Head, address: str, *, start: bool) -> tuple[str, bool]:
    """Where to connect to, and whether that cluster is on the loopback. Ray is not imported yet: it would not see what
    `_prepare` sets."""
    if find_spec("ray") is None:
        raise ConfigError("A cluster needs Ray.", hint="Run pip install 'skyloom[ray]'.")
    own, there = head.address(), found_here()
    if address not in ("auto", "local"):
        if re.fullmatch(r"[\w.\[\]:-]+:\d+", address) is None:
            raise ConfigError(
                f"{address!r:.60} is no address of a cluster.",
                hint="Give host:port of its head, auto or local, on a machine that is one of its nodes.",
            )
        if not answers(address):
            raise CapacityError(
                f"Nothing answers at {address}.", hint="Check that Ray's head runs there."
            )
        return address, address.startswith(LOOPBACK) and address in (own, there)
    if own is None and address == "auto" and there is not None:
        return there, there.startswith(LOOPBACK)
    if own is None and not start:
        raise CapacityError(
            "There is no Ray cluster here.",
            hint="`skyloom cluster up` connects to one or starts it.",
        )
    return own or head.start(), True


def _prepare(*, loopback: bool) -> None:
    """Set what Ray reads from the environment: the token, no statistics, and that a cluster is on the loopback."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if has_token():
        os.environ["RAY_AUTH_MODE"] = "token"
    if loopback:
        os.environ.update(Head.environment())


def _is_open(address: str) -> bool:
    """Whether a cluster answers to somebody without a token. Raises CapacityError where that cannot be told."""
    hidden = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    asked = [sys.executable, "-c", _PROBE, address]
    try:
        done = subprocess.run(
            asked,
            env={**hidden, "RAY_AUTH_MODE": "disabled"},
            capture_output=True,
            timeout=_PROBE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        done = None
    if done is None or done.returncode not in (_OPEN, _CLOSED):
        raise CapacityError(
            "Whether the Ray cluster asks for a token could not be told.", hint="Try again."
        )
    return done.returncode == _OPEN


def _ray() -> Any:
    return import_module("ray")


def _handle(name: str) -> Any:
    """The actor of a name; None where it has just gone."""
    try:
        return _ray().get_actor(name, namespace=_NAMESPACE)
    except ValueError:
        return None


def _answer(call: Any) -> Keeper | None:
    ray = _ray()
    try:
        return cast("Keeper", ray.get(call))
    except ray.exceptions.RayError:
        return None


def _node(told: Mapping[str, Any], free: Mapping[str, float]) -> Node:
    has = told["Resources"]
    return Node(
        told["NodeID"],
        told["NodeManagerHostname"],
        told["NodeManagerAddress"],
        has.get("CPU", 0.0),
        has.get("GPU", 0.0),
        free.get("CPU", 0.0),
        free.get("GPU", 0.0),
    )


def _explain(error: Exception) -> SkyloomError:
    """What Ray says, as ours."""
    cause = (str(error).splitlines() or [""])[0]
    return CapacityError(
        f"The Ray cluster cannot be used ({cause:.200}).",
        hint="Check that it runs, and that its token is this machine's.",
    )
