"""Server-sent events, health, metrics and logs."""

import asyncio
import json
import re
import threading
from collections.abc import Callable

import pytest

from skyloom.serve.api import events as event_streams
from skyloom.serve.api.app import RESOURCES
from skyloom.serve.api.events import EventBroadcaster
from skyloom.serve.health import WorkerHealth
from skyloom.serve.queue.event_feed import EventFeed
from skyloom.serve.queue.job import record_event


def parse_events(text: str) -> list[tuple[int, str, dict]]:
    """Parse events into (number, type, data)."""
    found = re.findall(r"id: (\d+)\nevent: (\S+)\ndata: (.*)\n\n", text)
    return [(int(number), kind, json.loads(data)) for number, kind, data in found]


def test_events_cover_the_life_of_a_video_and_resume_after_the_last_event_id(server):
    http = server.http()
    id = http.post("/v1/videos", json={"prompt": "a cat"}).json()["id"]
    server.work()
    answer = http.get(f"/v1/videos/{id}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = parse_events(answer.text)
    assert next(kind for _, kind, _ in events) == "video.queued"
    assert [kind for _, kind, _ in events][-1] == "video.completed"
    assert events[-1][2]["video"]["progress"] == 100
    rest = parse_events(
        http.get(f"/v1/videos/{id}/events", headers={"last-event-id": str(events[0][0])}).text
    )
    assert rest == events[1:]
    assert http.get(f"/v1/videos/{id}/events", headers={"last-event-id": "x"}).status_code == 400
    assert server.http(server.key("bob")).get(f"/v1/videos/{id}/events").status_code == 404


def test_events_end_when_the_server_stops(server):
    id = server.http().post("/v1/videos", json={"prompt": "a cat"}).json()["id"]
    server.stopping.set()
    assert server.http().get(f"/v1/videos/{id}/events").text == ""


class Reads(EventFeed):
    """An event feed that counts its reads."""

    def __init__(self, database) -> None:
        super().__init__(database)
        self.polls = 0
        self.histories = 0

    def history(self, id, owner, after):
        self.histories += 1
        return super().history(id, owner, after)

    def poll(self, after, ids):
        self.polls += 1
        return super().poll(after, ids)


class Intervals:
    """The broadcaster's wait: blocks until the test ends the interval."""

    def __init__(self) -> None:
        self._waiting = threading.Semaphore(0)
        self._go = threading.Semaphore(0)

    def __call__(self, _seconds: float) -> None:
        self._waiting.release()
        assert self._go.acquire(timeout=120)

    async def run(self, count: int = 1) -> None:
        """End the current interval, and return when the reader waits again."""
        for _ in range(count):
            assert await asyncio.to_thread(self._waiting.acquire, timeout=120)
            self._go.release()
        assert await asyncio.to_thread(self._waiting.acquire, timeout=120)
        self._waiting.release()

    def end(self) -> None:
        """Let the reader go on for good."""
        self._go.release(1_000)


async def off_loop(work: Callable):
    """Run a database read as the server does."""
    return await asyncio.to_thread(work)


async def until(holds: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    while not holds():
        await asyncio.sleep(0.005)


@pytest.fixture
def stand(server):
    """A broadcaster with counted reads and intervals that the test ends."""
    feed = Reads(server.services.database)
    intervals = Intervals()
    yield EventBroadcaster(feed, server.stopping.is_set, intervals), feed, intervals
    server.stopping.set()
    intervals.end()


def submit(server, prompt: str = "a cat"):
    """Submit a job."""
    id = server.http().post("/v1/videos", json={"prompt": prompt}).json()["id"]
    return server.services.jobs.get(id)


def add_event(server, job, name: str) -> None:
    """Write an event of a job."""
    with server.services.database.write() as write:
        record_event(write, job, name)


def test_fifty_viewers_cost_one_read_per_interval(server, stand):
    broadcaster, feed, intervals = stand
    jobs = [submit(server, f"cat {number}") for number in range(5)]
    seen = {number: [] for number in range(50)}

    async def view(number: int) -> None:
        async for event, _ in broadcaster.follow(jobs[number % 5], 0, off_loop):
            seen[number].append(event.type)

    async def run() -> None:
        viewers = [asyncio.create_task(view(number)) for number in range(50)]
        await until(lambda: all(len(types) == 1 for types in seen.values()))
        assert (feed.histories, feed.polls) == (50, 0)
        await intervals.run(3)
        assert (feed.histories, feed.polls) == (50, 3)
        for job in jobs:
            add_event(server, job, "progress")
        await intervals.run()
        await until(lambda: all(len(types) == 2 for types in seen.values()))
        assert (feed.histories, feed.polls) == (50, 4)
        for job in jobs:
            server.services.jobs.cancel(job.id)
        await intervals.run()
        await asyncio.gather(*viewers)
        assert (feed.histories, feed.polls) == (50, 5)

    asyncio.run(run())
    assert set(map(tuple, seen.values())) == {("video.queued", "video.progress", "video.cancelled")}
    assert not broadcaster._viewers


def test_the_reader_stops_without_viewers_and_starts_again(server, stand):
    broadcaster, feed, intervals = stand
    job = submit(server)

    async def view(events: list[str]) -> None:
        async for event, _ in broadcaster.follow(job, 0, off_loop):
            events.append(event.type)

    async def run() -> None:
        for _ in range(2):
            events: list[str] = []
            viewer = asyncio.create_task(view(events))
            await until(lambda events=events: len(events) == 1)
            await intervals.run()
            viewer.cancel()
            await asyncio.gather(viewer, return_exceptions=True)
            assert not broadcaster._viewers
            assert await asyncio.to_thread(intervals._waiting.acquire, timeout=120)
            intervals._go.release()
            await until(lambda: not broadcaster._running)

    asyncio.run(run())
    assert feed.polls == 2


def test_a_slow_viewer_reads_what_it_missed_from_the_database(server, stand, monkeypatch):
    monkeypatch.setattr(event_streams, "MAX_QUEUED_UPDATES", 2)
    broadcaster, feed, intervals = stand
    job = submit(server)
    numbers: list[int] = []

    async def run() -> None:
        stream = broadcaster.follow(job, 0, off_loop)
        event, _ = await anext(stream)
        numbers.append(event.number)
        for index in range(5):  # the viewer does not read meanwhile
            add_event(server, job, f"progress{index}")
            await intervals.run()
        server.services.jobs.cancel(job.id)
        await intervals.run()
        async for event, _ in stream:
            numbers.append(event.number)

    asyncio.run(run())
    assert numbers == [event.number for event in server.services.jobs.events(job=job.id)]
    assert len(numbers) == 7
    assert feed.histories == 2, "at the start, and after the overflow"


def test_a_viewer_that_comes_during_a_poll_misses_nothing(server, stand):
    broadcaster, feed, intervals = stand
    first = submit(server, "first")
    second = submit(server, "second")
    poll = feed.poll
    types: list[str] = []

    async def view(job, seen: list[str]) -> None:
        async for event, _ in broadcaster.follow(job, 0, off_loop):
            seen.append(event.type)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        viewers = [asyncio.create_task(view(first, []))]

        def late(after, ids):
            """Subscribe a viewer that reads its history; then write the event of this poll."""
            feed.poll = poll
            viewers.append(asyncio.run_coroutine_threadsafe(spawn(), loop).result())
            asyncio.run_coroutine_threadsafe(until(lambda: len(types) == 1), loop).result()
            add_event(server, second, "progress")
            return poll(after, ids)

        async def spawn():
            return asyncio.create_task(view(second, types))

        await until(lambda: len(broadcaster._viewers) == 1)
        feed.poll = late
        await intervals.run()
        await until(lambda: len(types) == 2)
        server.stopping.set()
        intervals.end()
        await asyncio.gather(*viewers)

    asyncio.run(run())
    assert types == ["video.queued", "video.progress"]


def test_streams_end_when_the_job_is_deleted_the_server_stops_or_the_database_fails(server, stand):
    broadcaster, feed, intervals = stand

    async def end_by(action: Callable[[], object]) -> list[str]:
        job = submit(server)
        types: list[str] = []

        async def view() -> None:
            async for event, _ in broadcaster.follow(job, 0, off_loop):
                types.append(event.type)

        viewer = asyncio.create_task(view())
        await until(lambda: len(types) == 1)
        action(job)
        assert await asyncio.to_thread(intervals._waiting.acquire, timeout=120)
        intervals._go.release()
        await viewer
        return types

    def fail(_after, _ids):
        raise OSError("away")

    async def run() -> None:
        assert await end_by(lambda job: server.services.jobs.delete(job.id)) == ["video.queued"]
        assert await asyncio.to_thread(intervals._waiting.acquire, timeout=120)
        intervals._go.release()
        await until(lambda: not broadcaster._running)
        feed.poll = fail
        assert await end_by(lambda _job: None) == ["video.queued"]
        assert await end_by(lambda _job: server.stopping.set()) == ["video.queued"]

    asyncio.run(run())


def test_health_and_readiness(server):
    http = server.http(None)
    assert http.get("/health").json() == {"status": "ok", "workers": 1, "restarts": 0}
    server.children[0] = WorkerHealth(expected=1, alive=0, restarts=2)
    assert http.get("/health").json() == {"status": "degraded", "workers": 0, "restarts": 2}
    assert http.get("/ready").json()["status"] == "no_workers"
    server.work()
    assert http.get("/ready").json() == {"status": "ready", "workers": 1, "queued": 0}
    server.stopping.set()
    assert http.get("/ready").status_code == 503


def test_metrics_count_responses_and_jobs_and_hold_no_client_text(server):
    http = server.http()
    id = http.post("/v1/videos", json={"prompt": "a canary cat"}).json()["id"]
    http.get(f"/v1/videos/{id}")
    text = http.get("/metrics").text
    assert 'skyloom_answers_total{call="POST /v1/videos",status="200"} 1.0' in text
    assert 'skyloom_jobs{status="queued"} 1.0' in text
    assert "canary" not in text
    assert id not in text


def test_logs_hold_no_secret_and_no_prompt(server, caplog):
    """Every text that a client can send has a canary."""
    caplog.set_level("DEBUG")
    key = server.key("alice")
    http = server.http(key)
    http.post("/v1/videos", json={"prompt": "canary prompt", "negative_prompt": "canary"})
    http.post("/v1/videos", json={"prompt": 3, "canary": "canary"})
    http.get("/v1/videos/canary?canary=1", headers={"x-canary": "canary"})
    http.post("/v1/files", files={"file": ("canary.png", b"\x89PNG\r\n\x1a\n" + bytes(9))})
    hook = {"url": "https://canary.example/", "event_types": ["video.completed"]}
    secret = http.post("/v1/webhook_endpoints", json=hook).json()["signing_secret"]
    ours = [record for record in caplog.records if record.name.startswith("skyloom")]
    assert ours
    logged = " ".join(f"{record.getMessage()} {vars(record)}" for record in ours)
    assert "canary" not in logged
    assert key not in logged
    assert secret not in logged


def test_prompts_are_logged_if_the_setting_is_on(tmp_path, make_server, caplog):
    caplog.set_level("INFO")
    server = make_server(tmp_path, log_prompts=True)
    server.http().post("/v1/videos", json={"prompt": "a canary"})
    assert any(getattr(record, "prompt", None) == "a canary" for record in caplog.records)


def test_an_unexpected_error_shows_only_the_request_id(server, monkeypatch):
    def break_down(*_):
        raise RuntimeError("/root/secret")

    monkeypatch.setattr(type(server.services.jobs), "get", break_down)
    answer = server.http().get("/v1/videos/video_1")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] in answer.json()["error"]["message"]


def test_the_openapi_document_has_every_call(server):
    document = server.http(None).get("/openapi.json").json()
    listed = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    routes = [route for resource in RESOURCES for route in resource.router.routes]
    assert listed == {(min(route.methods), route.path) for route in routes}
    references = re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document))
    assert set(references) <= set(document["components"]["schemas"])


@pytest.mark.parametrize("path", ["/v1/videos/", "/v1//videos", "/V1/videos", "/v1/videos/x/y/z"])
def test_paths_are_exact(server, path):
    assert server.http().get(path).status_code == 404
