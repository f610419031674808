"""The server process: a socket, the application, maintenance tasks, and workers as child processes.

Start: database, socket, application, workers; stop in reverse order. SIGTERM drains: no new
requests, open ones are answered, workers return their jobs to the queue. A second signal stops
everything at once.
"""

import contextlib
import ctypes
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from skyloom.core.errors import ConfigError
from skyloom.safety.moderation import ModerationResult, check_prompt, current_policy
from skyloom.serve.api.app import create_app, make_services
from skyloom.serve.api.connections import Connection, Connections
from skyloom.serve.api.dependencies import SideEffects
from skyloom.serve.api.middleware import local_hosts
from skyloom.serve.api.routes.batches import advance
from skyloom.serve.maintenance import (
    MaintenanceThreads,
    garbage_collection_task,
    queue_tasks,
)
from skyloom.serve.queue import http_client
from skyloom.serve.queue.api_keys import KeyStore, check_exposure
from skyloom.serve.queue.leases import Leases
from skyloom.serve.queue.library import CharacterLikeness
from skyloom.serve.queue.webhook_delivery import WebhookSender
from skyloom.serve.settings import Settings
from skyloom.serve.storage import Asset, AssetStorage
from skyloom.serve.storage.installation import open_installation
from skyloom.serve.workers.processes import WorkerSupervisor
from skyloom.serve.workers.subprocess_tasks import (
    inspect_in_subprocess,
    plan_in_subprocess,
    verify_in_subprocess,
)

BATCH_SECONDS = 2.0
GRACE_SECONDS = 5
_ANY_ADDRESS = ("0.0.0.0", "::")
_ARENA_MAX = -8  # parameters of mallopt(3)
_MMAP_THRESHOLD = -3
_LARGE_BYTES = 256 * 1024
_KEEP_ALIVE_SECONDS = 30
_MAX_HEAD_BYTES = 64 * 1024
Announce = Callable[[str, str], None]
"""Called with the URL and the token of a server that is ready."""


def listen(
    settings: Settings, devices: Sequence[str], announce: Announce, *, adopt: bool = False
) -> None:
    """Serve until a signal.

    `devices`: one worker each; `adopt`: bind database and storage to each other.
    Raises ConfigError for an address that cannot be bound or is exposed without any API key, and
    for a database and a storage of different installations.
    """
    _share_heaps()
    database, storage = open_installation(settings, adopt=adopt)
    with contextlib.closing(database), _bind(settings.host, settings.port) as listener:
        check_exposure(settings.host, KeyStore(database))
        host, port = listener.getsockname()[:2]
        token = secrets.token_urlsafe(32)
        stopping = threading.Event()
        supervisor = WorkerSupervisor(Leases(database, settings), settings, devices)
        effects = _side_effects(settings, storage, supervisor)
        services = make_services(
            settings, database, storage, effects, token=token, stopping=stopping
        )
        maintenance = MaintenanceThreads(
            [*queue_tasks(services.jobs), (BATCH_SECONDS, partial(advance, services))]
        )
        collector = MaintenanceThreads(
            [garbage_collection_task(services.jobs, storage, stopping.is_set)]
        )
        server = _Server(
            create_app(services, {*_own_hosts(host, port), *settings.hosts}),
            Connections(settings.max_connections, settings.max_connections_per_address),
            lambda: announce(_url(host, port), token),
        )

        def stop(_number: int, _frame: FrameType | None) -> None:
            if stopping.is_set():
                server.force_exit = True
                supervisor.kill()
            stopping.set()
            server.should_exit = True
            supervisor.drain()

        sender = WebhookSender(database, effects.post)
        with (
            _signals(stop),
            _running(sender),
            _running(maintenance),
            _running(collector),
            _running(supervisor),
        ):
            server.run(sockets=[listener])


def find_devices() -> list[str]:
    """Devices that get a worker each: every CUDA device of torch, else the CPU.

    Torch is imported in a child process, and only if there is a driver.
    """
    if not any(Path("/proc/driver/nvidia/gpus").glob("*")):
        return ["cpu"]
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    count = int(output) if output.isdigit() else 0
    return [f"cuda:{index}" for index in range(count)] or ["cpu"]


def _own_hosts(host: str, port: int) -> set[str]:
    """Values of the Host header for the address that is bound."""
    hosts = local_hosts(port)
    return hosts if host in _ANY_ADDRESS else {*hosts, f"{_in_url(host)}:{port}"}


def _url(host: str, port: int) -> str:
    return f"http://{'127.0.0.1' if host in _ANY_ADDRESS else _in_url(host)}:{port}"


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _share_heaps() -> None:
    """Limit glibc to two malloc arenas and map large blocks, like bodies, separately.

    By default each of forty threads gets an arena of its own, which grows for minutes under load.
    Separately mapped blocks are returned to the system when they are freed.
    """
    with contextlib.suppress(AttributeError, TypeError):  # of another C library
        ctypes.CDLL(None).mallopt(_ARENA_MAX, 2)
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers; calls `ready` once it listens."""

    def __init__(self, app: Any, connections: Connections, ready: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                ws="none",
                http=partial(Connection, connections),  # type: ignore[arg-type] - called like a class
                loop="asyncio",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=GRACE_SECONDS,
                h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
            )
        )
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then call `ready`."""
        await super().startup(sockets)
        self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to `listen`, which handles them until the workers have stopped."""
        yield


@contextlib.contextmanager
def _signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle SIGINT and SIGTERM while the block runs."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _bind(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # asyncio sets TCP_NODELAY only on sockets whose protocol is TCP
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        cause = error.strerror or "no such address"
        raise ConfigError(
            f"{host}:{port} cannot be listened to ({cause}).", hint="Use another --port."
        ) from error
    return listener


@contextlib.contextmanager
def _running(service: WebhookSender | MaintenanceThreads | WorkerSupervisor) -> Iterator[None]:
    service.start()
    try:
        yield
    finally:
        service.stop()


def _side_effects(
    settings: Settings, storage: AssetStorage, supervisor: WorkerSupervisor
) -> SideEffects:
    loopback = settings.webhooks_to_loopback

    def verify(asset: Asset) -> list[dict[str, Any]]:
        return verify_in_subprocess(storage, asset, settings.data)

    def view(asset: Asset, recognise: bool) -> tuple[ModerationResult, CharacterLikeness]:
        policy = current_policy()
        if not (recognise or policy.pictures or policy.classifiers):
            return ModerationResult(True), CharacterLikeness()
        return inspect_in_subprocess(storage, asset, recognise=recognise)

    return SideEffects(
        moderate=check_prompt,
        view=view,
        verify=verify,
        plan=plan_in_subprocess,
        check_url=partial(http_client.check_url, loopback=loopback),
        post=partial(http_client.post_to, loopback=loopback),
        fetch=http_client.fetch,
        workers=supervisor.health,
    )
