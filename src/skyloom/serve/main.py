"""The server process: a socket, the application on it, upkeep, and workers as children.

It starts in this order: database, socket, application, workers; and ends in the other. SIGTERM drains: nothing new is
taken, answers are finished, and workers give back what they have in hand meanwhile; a second one ends all at once.
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
from skyloom.serve.api.app import build_app, make_services
from skyloom.serve.api.connections import Connection, Connections
from skyloom.serve.api.context import Outside
from skyloom.serve.api.middleware import local_hosts
from skyloom.serve.api.routes.batches import advance
from skyloom.serve.queue import http_client as outbound
from skyloom.serve.queue.api_keys import KeyStore, check_exposure
from skyloom.serve.queue.leases import Leases
from skyloom.serve.queue.library import Likeness
from skyloom.serve.queue.maintenance import Upkeep, collecting, usual_tasks
from skyloom.serve.queue.webhook_delivery import Courier
from skyloom.serve.settings import Settings
from skyloom.serve.storage.folder import Asset, Storage
from skyloom.serve.storage.installation import open_installation
from skyloom.serve.workers.processes import Supervisor
from skyloom.serve.workers.subprocess_tasks import plan_in_child, verify_in_child, view_in_child

BATCH_SECONDS, GRACE_SECONDS = 2.0, 5
_ARENA_MAX, _MMAP_THRESHOLD = -8, -3  # of mallopt(3)
_LARGE_BYTES = 256 * 1024
_KEEP_ALIVE_SECONDS, _MAX_HEAD_BYTES = 30, 64 * 1024
Announce = Callable[[str, str], None]
"""Takes the URL and the token of a server that is ready."""


def listen(
    settings: Settings, devices: Sequence[str], announce: Announce, *, adopt: bool = False
) -> None:
    """Serve until a signal. No devices: no workers of its own; `adopt` makes database and storage one installation.
    Raises ConfigError for an address that is none of ours, or that others can reach while there is no key, and for a
    database and a storage that do not belong together."""
    _share_heaps()
    database, storage = open_installation(settings, adopt=adopt)
    with contextlib.closing(database), _bind(settings.host, settings.port) as door:
        check_exposure(settings.host, KeyStore(database))
        host, port = door.getsockname()[:2]
        named = f"[{host}]" if ":" in host else host
        hosts = {*local_hosts(port), *settings.hosts} | (
            {f"{named}:{port}"} if host not in ("0.0.0.0", "::") else set()
        )
        token, stopping = secrets.token_urlsafe(32), threading.Event()
        supervisor = Supervisor(Leases(database, settings), settings, devices)
        outside = _outside(settings, storage, supervisor)
        services = make_services(settings, database, storage, outside, token, stopping)
        upkeep = Upkeep([*usual_tasks(services.jobs), (BATCH_SECONDS, partial(advance, services))])
        collector = Upkeep(collecting(services.jobs, storage, stopping.is_set))
        shown = "127.0.0.1" if host in ("0.0.0.0", "::") else named
        connections = Connections(settings.max_connections, settings.max_connections_per_address)
        server = _Server(
            build_app(services, hosts),
            connections,
            lambda: announce(f"http://{shown}:{port}", token),
        )

        def leave(_number: int, _frame: FrameType | None) -> None:
            if stopping.is_set():
                server.force_exit = True
                supervisor.kill()
            stopping.set()
            server.should_exit = True
            supervisor.drain()

        courier = Courier(database, outside.post)
        with (
            _signals(leave),
            _running(courier),
            _running(upkeep),
            _running(collector),
            _running(supervisor),
        ):
            server.run(sockets=[door])


def find_devices() -> list[str]:
    """The devices that get a worker each: every CUDA device that torch can use, or the CPU.

    Torch is asked in a process of its own, and only where there is a driver.
    """
    if not any(Path("/proc/driver/nvidia/gpus").glob("*")):
        return ["cpu"]
    ask = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    told = subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip()
    return (
        [f"cuda:{index}" for index in range(int(told))] if told.isdigit() and int(told) else ["cpu"]
    )


def _share_heaps() -> None:
    """Two heaps for all threads: glibc would give each of forty its own, which grow for minutes under load. What is
    large, like bodies, is mapped by itself and so given back when it is freed."""
    with contextlib.suppress(AttributeError, TypeError):  # of another C library
        ctypes.CDLL(None).mallopt(_ARENA_MAX, 2)
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)


class _Server(uvicorn.Server):
    """uvicorn without signals of its own: it says when it is ready, and is told when to end."""

    def __init__(self, app: Any, connections: Connections, ready: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                ws="none",
                http=partial(Connection, connections),  # type: ignore[arg-type] - called with names, as a class is
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
        """Listen, then say so."""
        await super().startup(sockets)
        self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave them to `listen`, for which they go on when this has ended."""
        yield


@contextlib.contextmanager
def _signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """SIGINT and SIGTERM are handled so while the block runs: to its end, workers and all."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _bind(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # asyncio sets TCP_NODELAY only on sockets that say that they are TCP
        door = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind((host, port))
    except OSError as error:
        cause = error.strerror or "no such address"
        raise ConfigError(
            f"{host}:{port} cannot be listened to ({cause}).", hint="Use another --port."
        ) from error
    return door


@contextlib.contextmanager
def _running(service: Courier | Upkeep | Supervisor) -> Iterator[None]:
    service.start()
    try:
        yield
    finally:
        service.stop()


def _outside(settings: Settings, storage: Storage, supervisor: Supervisor) -> Outside:
    loopback = settings.webhooks_to_loopback

    def verify(asset: Asset) -> list[dict[str, Any]]:
        return verify_in_child(storage, asset, settings.data)["results"]

    def view(asset: Asset, recognise: bool) -> tuple[ModerationResult, Likeness]:
        policy = current_policy()
        if not (recognise or policy.pictures or policy.classifiers):
            return ModerationResult(True), Likeness()
        return view_in_child(storage, asset, recognise=recognise)

    return Outside(
        moderate=check_prompt,
        view=view,
        verify=verify,
        plan=plan_in_child,
        check_url=partial(outbound.check_url, loopback=loopback),
        post=partial(outbound.post_to, loopback=loopback),
        fetch=outbound.fetch,
        workers=supervisor.health,
    )
