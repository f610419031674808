"""The cost of calls is independent of the number of finished jobs: no scans of growing tables."""

import importlib.util
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import func, select

from skyloom.serve.api.routes.batches import advance
from skyloom.serve.queue.api_keys import KeyStore
from skyloom.serve.queue.database import Database
from skyloom.serve.queue.jobs import REFERENCE_ROWS, JobResult, JobStore
from skyloom.serve.queue.leases import Leases
from skyloom.serve.queue.retention import delete_old_rows
from skyloom.serve.queue.tables import jobs
from skyloom.serve.workers.worker import Worker


def load(path: Path):
    """A program beside the tests as a module."""
    place = importlib.util.spec_from_file_location(f"cost_{path.stem}", path)
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    return module


HERE = Path(__file__).parent
watched = load(HERE.parent / "plans.py").watched
deliver_due = load(HERE.parent / "delivering.py").deliver_due
seed = load(HERE.parents[2] / "bench" / "history.py").seed
FEW, MANY = 200, 4_000
MORE = 1.05  # a tree of more rows may be a level higher


def make(server, **headers: str) -> str:
    """A video that is asked for."""
    answer = server.http().post(
        "/v1/videos", json={"prompt": "a cat on the beach", "seconds": "4"}, headers=headers
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def good(server, path: str) -> object:
    """A call that has to be answered."""
    answer = server.http().get(path)
    assert answer.status_code == 200, answer.text
    return answer


def newest(server) -> str:
    """The newest finished video of the caller's."""
    return next(server.services.jobs.walk("local", status="completed")).id


def start(server) -> None:
    """What a server asks before it listens, and its first beats."""
    services, settings = server.services, server.services.settings
    database = Database(settings.database)
    KeyStore(database).usable()
    Leases(database, settings).expire()
    deliver_due(database, services.effects.post)
    delete_old_rows(database, settings)
    advance(services)
    database.close()


def idle(server) -> None:
    """A worker that finds nothing to do."""
    services = server.services
    leases = Leases(services.database, services.settings)
    Worker(leases, services.storage, None, services.settings, name="idle", device="none").run(
        until_empty=True
    )


def busy(server) -> None:
    """Lease and finish a job with a webhook, without a worker, whose heartbeats depend on time."""
    leases = Leases(server.services.database, server.services.settings)
    lease = leases.lease("w")
    leases.heartbeat(lease, progress=40, phase="denoise", checkpoint={"0.bin": "asset:x"})
    leases.requested_action(lease)
    leases.finish(lease, JobResult({"video": "asset:x"}, {}))
    deliver_due(server.services.database, server.services.effects.post)


def end(server, id: str) -> None:
    """Cancel and delete a video."""
    assert server.http().post(f"/v1/videos/{id}/cancel", json={}).status_code == 200
    assert server.http().delete(f"/v1/videos/{id}").status_code == 200


def clear(server) -> None:
    """Nothing waits."""
    for job in list(server.services.jobs.walk(status="queued")):
        server.services.jobs.delete(job.id)


def full(server) -> None:
    """A call when the queue is full."""
    settings = server.services.jobs.settings
    object.__setattr__(settings, "max_queued", 0)
    assert server.http().post("/v1/videos", json={"prompt": "a cat"}).status_code == 429
    object.__setattr__(settings, "max_queued", 1_000)


def nothing(_server) -> None:
    """No preparation."""


# What comes before a call, and the call, which gets what that gave.
CALLS: dict[str, tuple[Callable[..., object], Callable[..., object]]] = {
    "create": (nothing, lambda server, _: make(server)),
    "create by key": (nothing, lambda server, _: make(server, **{"idempotency-key": "k"})),
    "create again": (make, lambda server, _: make(server, **{"x-stainless-retry-count": "1"})),
    "create in a full queue": (nothing, lambda server, _: full(server)),
    "cancel and delete": (make, end),
    "get": (newest, lambda server, id: good(server, f"/v1/videos/{id}")),
    "events": (newest, lambda server, id: good(server, f"/v1/videos/{id}/events")),
    "list": (nothing, lambda server, _: good(server, "/v1/videos")),
    "list after one": (newest, lambda server, id: good(server, f"/v1/videos?limit=100&after={id}")),
    "list of files": (nothing, lambda server, _: good(server, "/v1/files?purpose=batch_output")),
    "list of batches": (nothing, lambda server, _: good(server, "/v1/batches")),
    "list of webhooks": (nothing, lambda server, _: good(server, "/v1/webhook_endpoints")),
    "ready": (nothing, lambda server, _: good(server, "/ready")),
    "metrics": (nothing, lambda server, _: good(server, "/metrics")),
    "idle worker": (nothing, lambda server, _: idle(server)),
    "working": (make, lambda server, _: busy(server)),
    "start": (nothing, lambda server, _: start(server)),
    "hands": (
        nothing,
        lambda server, _: Leases(server.services.database, server.services.settings).list_workers(),
    ),
}


@pytest.fixture
def filled(make_server, tmp_path, database_url):
    """A server on a database, and how to fill that."""
    server = make_server(tmp_path, database_url=database_url)

    def fill(count: int) -> None:
        seed(server.services.database, count)

    return server, fill


def look(server, name: str):
    """What one call did. Whatever it left is ended before."""
    prepare, call = CALLS[name]
    for _ in range(2):  # some things are done once, like the first use of a key
        clear(server)
        told = prepare(server)
        with watched() as seen:
            call(server, told)
    clear(server)
    return seen


def test_cost_of_routes_is_independent_of_history(filled):
    server, fill = filled
    fill(FEW)
    few = {name: look(server, name) for name in CALLS}
    fill(MANY)
    many = {name: look(server, name) for name in CALLS}
    for name, seen in many.items():
        assert not seen.scans, name
        assert seen.statements, name
        assert len(seen.statements) == len(few[name].statements), name
        assert seen.work <= MORE * few[name].work + 20, (name, few[name].work, seen.work)


def test_watcher_detects_scans(filled):
    server, fill = filled
    counting = select(func.count()).select_from(
        jobs
    )  # one instruction of SQLite, however many rows
    reading = select(jobs.c.id).where(jobs.c.progress == 3)
    work = []
    for count in (FEW, MANY):
        fill(count)
        for statement in (counting, reading):
            with watched() as seen, server.services.database.read() as connection:
                connection.execute(statement).all()
            assert seen.scans
        work.append(seen.work)
    assert work[1] > 5 * work[0]


def test_references_are_read_in_pages(filled):
    server, fill = filled
    store: JobStore = server.services.jobs
    peaks = []
    for count in (FEW * 2, MANY):
        fill(count)
        with watched() as seen:
            assert sum(1 for _ in store.references()) > 2 * count
        assert not [scan for scan in seen.scans if "LIMIT" not in scan]
        assert len(seen.statements) <= (count + FEW * 2) / REFERENCE_ROWS + 3
        tracemalloc.start()
        for _ in store.references():
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0]  # of ten times as many
    assert set(store.references()) == store.referenced_assets()
