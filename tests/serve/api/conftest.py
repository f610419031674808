"""Fixtures: an in-process server for OpenAI's client, and workers with a fake renderer."""

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from starlette.testclient import TestClient

from skyloom.core.errors import RequestError
from skyloom.safety.moderation import ModerationResult
from skyloom.serve.api.app import create_app, make_services
from skyloom.serve.api.dependencies import Services, SideEffects
from skyloom.serve.health import WorkerHealth
from skyloom.serve.queue.database import Database
from skyloom.serve.queue.job import Job
from skyloom.serve.queue.leases import Leases
from skyloom.serve.queue.library import CharacterLikeness
from skyloom.serve.queue.webhook_delivery import WebhookSender
from skyloom.serve.settings import Settings
from skyloom.serve.storage import Asset, open_storage
from skyloom.serve.workers.worker import Progress, Worker

TOKEN = "token-of-this-run"
HOST = "127.0.0.1:8765"
MP4 = b"\x00\x00\x00\x18ftypisom" + bytes(range(256)) * 40
PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)
JPG, WEBP = b"\xff\xd8\xff" + bytes(100), b"RIFF\x00\x00\x00\x00WEBP" + bytes(100)


@dataclass
class Posts:
    """Records webhooks (url, headers, body) and answers them with `status`."""

    status: int = 200
    sent: list[tuple[str, Mapping[str, str], bytes]] = field(default_factory=list)

    def __call__(self, url: str, headers: Mapping[str, str], body: bytes) -> int:
        self.sent.append((url, headers, body))
        return self.status


@dataclass
class Viewer:
    """Fake inspection of pictures and videos."""

    verdict: ModerationResult = ModerationResult(True)
    likeness: CharacterLikeness = CharacterLikeness()
    asked: list[bool] = field(default_factory=list[bool])

    def __call__(self, asset: Asset, recognise: bool) -> tuple[ModerationResult, CharacterLikeness]:
        self.asked.append(recognise)
        return self.verdict, self.likeness


@dataclass(frozen=True)
class ApiCall:
    """An operation of the OpenAPI document; `scope` is empty for open ones."""

    method: str
    path: str
    scope: str

    @property
    def name(self) -> str:
        return f"{self.method} {self.path}"


@dataclass(eq=False)
class Server:
    """A server in this process and its replaced side effects."""

    services: Services
    app: Any
    posts: Posts
    viewer: Viewer
    stopping: threading.Event
    children: list[WorkerHealth]

    def calls(self) -> list[ApiCall]:
        """Every operation of the OpenAPI document."""
        found = []
        for path, item in self.app.openapi()["paths"].items():
            for method, operation in item.items():
                scopes = [scope for one in operation.get("security", []) for scope in one["key"]]
                found.append(ApiCall(method.upper(), path, "".join(scopes)))
        return found

    def http(self, key: str | None = TOKEN, **options: Any) -> TestClient:
        """A plain HTTP client with the key."""
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        base = f"http://{HOST}"
        return TestClient(
            self.app, base_url=base, headers=headers, raise_server_exceptions=False, **options
        )

    def openai(self, key: str = TOKEN, **options: Any) -> OpenAI:
        """OpenAI's client, unchanged."""
        return OpenAI(
            base_url=f"http://{HOST}/v1", api_key=key, http_client=self.http(None), **options
        )

    def key(self, owner: str, *scopes: str) -> str:
        """A new key of an owner."""
        return self.services.keys.create(owner, scopes=scopes or ("read", "write"))[1]

    def work(self, paint: Callable[[Job, Path], Iterator[Progress]] | None = None) -> None:
        """Run all queued jobs."""
        settings = self.services.settings
        leases = Leases(self.services.database, settings)

        def render(job: Job, folder: Path, *, output: Path) -> Iterator[Progress]:
            yield from (paint or painted)(job, output)

        worker = Worker(
            leases, self.services.storage, render, settings, name="painter", device="none"
        )
        worker.run(until_empty=True)

    def deliver(self) -> None:
        """Send all due webhooks."""
        sender = WebhookSender(self.services.database, self.posts)
        while sender.send_due():
            assert sender.wait_until_idle(60)


def painted(job: Job, output: Path) -> Iterator[Progress]:
    """A fake video with thumbnail, spritesheet and receipt."""
    for percent in (10, 40, 80):
        yield Progress(percent, "denoise")
    files = {
        "video": output / "video.mp4",
        "thumbnail": output / "t.webp",
        "spritesheet": output / "s.jpg",
    }
    for path, content in zip(files.values(), (MP4 + job.id.encode(), WEBP, JPG), strict=True):
        path.write_bytes(content)
    shape = [round(16 * float(job.metadata["seconds"])) + 1, 128, 128, 3]
    yield Progress(99, "decode", files, {"frames": {"shape": shape, "fps": "16"}})


def moderate(text: str) -> ModerationResult:
    """A policy with one rule."""
    start = text.find("forbidden")
    return (
        ModerationResult(True)
        if start < 0
        else ModerationResult(False, "sexual", (start, start + 9), "That is not made here.")
    )


def verify(asset: Asset) -> list[dict[str, Any]]:
    """Nothing is marked."""
    return [{"type": "c2pa", "outcome": "not_detected", "validation_state": "not_present"}]


def check_url(url: str) -> None:
    """https only."""
    if not url.startswith("https://"):
        raise RequestError("http:// is not allowed.", hint="Use https.")


def fetch(url: str) -> bytes:
    """A picture, or the error of http_client.fetch."""
    if url != "https://example.org/a.png":
        raise RequestError(
            "The URL leads to an address that is not public.", hint="Use a public host."
        )
    return PNG


def plan(request: object) -> dict[str, Any]:
    """A plan as the planning subprocess returns it."""
    return {
        "size": "128x128",
        "fps": 16.0,
        "steps": 4,
        "guidance": 1.0,
        "estimate": {"seconds": 3.0},
    }


def make_server(data: Path, **changes: Any) -> Server:
    """A server on its own data folder."""
    changes = {"lease_seconds": 2.0, "heartbeat_seconds": 0.5, "disk_reserve": 0, **changes}
    settings, posts, stopping = Settings(data=data, **changes), Posts(), threading.Event()
    viewer, children = Viewer(), [WorkerHealth(expected=1, alive=1, restarts=0)]
    effects = SideEffects(
        moderate=moderate,
        view=viewer,
        verify=verify,
        plan=plan,
        check_url=check_url,
        post=posts,
        fetch=fetch,
        workers=lambda: children[0],
    )
    database = Database(settings.database)
    services = make_services(
        settings, database, open_storage(settings.storage), effects, TOKEN, stopping
    )
    return Server(services, create_app(services, {HOST}), posts, viewer, stopping, children)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server with an empty queue."""
    made = make_server(tmp_path)
    yield made
    made.services.database.close()


@pytest.fixture(name="make_server")
def server_maker() -> Iterator[Callable[..., Server]]:
    """Makes servers with other settings."""
    yield from _makers()


@pytest.fixture(name="make_server_once", scope="module")
def lasting_server_maker() -> Iterator[Callable[..., Server]]:
    """Makes servers that last for a file of tests."""
    yield from _makers()


def _makers() -> Iterator[Callable[..., Server]]:
    made: list[Server] = []

    def make(data: Path, **changes: Any) -> Server:
        made.append(make_server(data, **changes))
        return made[-1]

    yield make
    for server in made:
        server.services.database.close()
