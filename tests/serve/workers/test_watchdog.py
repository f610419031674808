"""Stuck renders: the job returns to the queue with the cause and the worker process exits."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from skyloom.serve.queue.database import Database
from skyloom.serve.queue.job import JobFailure
from skyloom.serve.queue.jobs import JobStore
from skyloom.serve.queue.leases import Leases
from skyloom.serve.queue.tables import attempts
from skyloom.serve.settings import Settings
from skyloom.serve.storage import Asset, FolderStorage
from skyloom.serve.workers.watchdog import EXIT_STUCK
from skyloom.serve.workers.worker import Progress, Worker

from ..conftest import Clock, load_beside

swarm = load_beside("swarm")
LONG = 60.0  # seconds; reached only by a broken watchdog


class Bench:
    """A queue and a worker in this process, one clock for both; `ended` holds exit statuses."""

    def __init__(self, folder: Path, **settings) -> None:
        self.settings = Settings(
            data=folder, heartbeat_seconds=0.02, disk_reserve=0, max_attempts=3, **settings
        )
        self.clock, self.ended, self.free = Clock(), [], threading.Event()
        self.store = JobStore(Database(self.settings.database, self.clock), self.settings)
        self.leases = Leases(self.store.database, self.settings)
        self.storage = FolderStorage(Path(self.settings.storage))
        self.beats = 0
        self.leases.requested_action = self._counted(self.leases.requested_action)
        self.leases.heartbeat = self._counted(self.leases.heartbeat)
        self.id = self.store.submit({"prompt": "a cat"}, owner="ada").id

    def _counted(self, call):
        def counted(*arguments, **values):
            self.beats += 1
            return call(*arguments, **values)

        return counted

    def wait_for_heartbeat(self) -> None:
        """Wait until the heartbeat thread has checked the current state."""
        seen, until = self.beats, time.monotonic() + LONG
        while self.beats < seen + 3:
            assert time.monotonic() < until, "the heartbeat has stopped"
            time.sleep(0.005)

    def end(self, status: int) -> None:
        """Record the exit status; the render continues, and its next report raises."""
        self.ended.append(status)
        self.free.set()

    def hang(self) -> None:
        """Block as a stuck device does, until the worker exits."""
        assert self.free.wait(LONG), "the render was not ended"
        self.free.clear()

    def work(self, render) -> None:
        """Lease and run the job once."""
        name = f"w{len(self.ended)}"
        worker = Worker(
            self.leases,
            self.storage,
            render,
            self.settings,
            name=name,
            device="none",
            exit_process=self.end,
            clock=self.clock,
        )
        assert worker.work_one()

    @property
    def job(self):
        """The job's current row."""
        return self.store.get(self.id)

    @property
    def causes(self) -> list[str | None]:
        """Error code of each attempt."""
        return [attempt.error and attempt.error.code for attempt in self.store.attempts(self.job)]


@pytest.fixture
def bench(tmp_path) -> Iterator[Bench]:
    """A queue with one job."""
    made = Bench(tmp_path)
    yield made
    made.store.database.close()


def hanging_after(bench: Bench, steps: int, stop: Callable[[], object]):
    """The fake renderer; after `steps` steps it calls `stop` and hangs."""

    def render(job, folder, *, output):
        for number, step in enumerate(swarm.fake_render(job, folder, output=output)):
            if number == steps:
                stop()
                bench.hang()
            yield step

    return render


@pytest.mark.parametrize("steps", range(1, swarm.STEPS + 1))
def test_a_render_stuck_between_steps_resumes_after_the_last_step(bench, steps: int):
    bench.work(hanging_after(bench, steps, lambda: bench.clock.turn(301)))
    assert bench.ended == [EXIT_STUCK]
    assert (bench.job.status, bench.causes) == ("queued", ["stalled"])
    assert (
        "no progress for 300 s in the phase denoise"
        in bench.store.attempts(bench.job)[0].error.message
    )
    bench.work(swarm.fake_render)
    assert bench.job.status == "completed"
    assert b"".join(
        bench.storage.read(Asset.parse(bench.job.result.assets["video"]))
    ) == swarm.frames_of("a cat")
    assert bench.causes == ["stalled", None]


def test_a_render_that_is_always_stuck_fails_after_max_attempts(bench):
    for number in range(3):
        assert bench.job.attempts == number
        bench.work(hanging_after(bench, 1, lambda: bench.clock.turn(301)))
    assert bench.ended == [EXIT_STUCK] * 3
    assert (bench.job.status, bench.job.error.code, bench.causes) == (
        "failed",
        "stalled",
        ["stalled"] * 3,
    )


def test_loading_is_limited_by_load_seconds(bench):
    def stop() -> None:
        bench.clock.turn(1_799)
        bench.wait_for_heartbeat()
        assert bench.ended == []
        bench.clock.turn(2)

    bench.work(hanging_after(bench, 0, stop))
    assert bench.ended == [EXIT_STUCK]
    assert "1800 s while the model was loaded" in bench.store.attempts(bench.job)[0].error.message


def test_storing_is_limited_by_load_seconds(bench, monkeypatch):
    put = bench.storage.put

    def slow(source, suffix):
        if suffix == "mp4":
            bench.clock.turn(1_799)
            bench.wait_for_heartbeat()
        return put(source, suffix)

    monkeypatch.setattr(bench.storage, "put", slow)
    bench.work(swarm.fake_render)
    assert (bench.ended, bench.job.status) == ([], "completed")


def test_a_stuck_storage_ends_the_worker(bench, monkeypatch):
    def hang(source, suffix):
        bench.clock.turn(1_801)
        bench.hang()
        raise OSError("gone")

    monkeypatch.setattr(bench.storage, "put", hang)
    bench.work(lambda job, folder, *, output: at_once(job, output))
    assert (bench.ended, bench.causes) == ([EXIT_STUCK], ["stalled"])


def at_once(job, output: Path) -> Iterator[Progress]:
    """Render in one step, without state."""
    made = output / "video.mp4"
    made.write_bytes(b"x")
    yield Progress(99, "decode", {"video": made}, {})


@pytest.mark.parametrize(("verb", "status"), [("cancel", "cancelled"), ("delete", None)])
def test_a_stuck_render_can_be_cancelled(bench, verb: str, status: str | None):
    def stop() -> None:
        getattr(bench.store, verb)(bench.id)
        bench.clock.turn(59)
        bench.wait_for_heartbeat()
        bench.clock.turn(59)  # counted from when the cancel was heard
        bench.wait_for_heartbeat()
        assert bench.ended == []
        bench.clock.turn(2)

    bench.work(hanging_after(bench, 2, stop))
    assert bench.ended == [EXIT_STUCK]
    assert bench.store.counts().by_status == ({} if status is None else {status: 1})


def test_a_stuck_render_can_be_paused(bench):
    def stop() -> None:
        bench.store.pause(bench.id)
        bench.wait_for_heartbeat()
        bench.clock.turn(301)

    bench.work(hanging_after(bench, 2, stop))
    assert (bench.job.status, bench.job.attempts, bench.causes) == ("paused", 1, ["stalled"])


def test_a_slow_render_with_steps_is_not_ended(bench):
    def slow(job, folder, *, output):
        for step in swarm.fake_render(job, folder, output=output):
            bench.clock.turn(299)
            bench.wait_for_heartbeat()
            yield step

    bench.work(slow)
    assert (bench.ended, bench.job.status) == ([], "completed")


def test_limits_of_zero_end_nothing(tmp_path):
    bench = Bench(
        tmp_path,
        stall_seconds=0,
        load_seconds=0,
        cancel_seconds=0,
        max_attempt_seconds=0,
        max_job_seconds=0,
    )

    def slow(job, folder, *, output):
        bench.clock.turn(1e6)
        bench.wait_for_heartbeat()
        for step in swarm.fake_render(job, folder, output=output):
            bench.clock.turn(1e6)
            bench.wait_for_heartbeat()
            yield step

    bench.work(slow)
    assert (bench.ended, bench.job.status) == ([], "completed")
    bench.store.database.close()


def test_a_stuck_render_with_a_lost_lease_exits_without_changing_the_job(bench):
    def stop() -> None:
        bench.leases.requeue_worker_jobs("w0")
        bench.clock.turn(59)
        threading.Thread(target=turn_on, daemon=True).start()

    def turn_on() -> None:
        # the heartbeat makes no more calls, so the clock is turned until the worker exits
        while not bench.ended:
            bench.clock.turn(1)
            time.sleep(0.02)

    bench.work(hanging_after(bench, 2, stop))
    assert bench.ended == [EXIT_STUCK]
    assert (bench.job.status, bench.causes) == ("queued", ["worker_lost"])


def test_a_stuck_worker_exits_without_a_database_too(bench, monkeypatch):
    def away(*_, **__):
        raise OperationalError("COMMIT", {}, Exception("gone"))

    monkeypatch.setattr(bench.leases, "fail", away)
    bench.work(hanging_after(bench, 1, lambda: bench.clock.turn(301)))
    assert (bench.ended, bench.job.status) == ([EXIT_STUCK], "in_progress")
    bench.leases.requeue_worker_jobs("w0")
    assert (bench.job.status, bench.causes) == ("queued", ["worker_lost"])


def slowly(bench: Bench, seconds: float):
    """The fake renderer; each step takes `seconds`."""

    def render(job, folder, *, output):
        for step in swarm.fake_render(job, folder, output=output):
            bench.clock.turn(seconds)
            bench.wait_for_heartbeat()
            yield step

    return render


def test_an_attempt_over_its_limit_is_followed_by_one_that_resumes(tmp_path):
    bench = Bench(tmp_path, max_attempt_seconds=250)
    bench.work(slowly(bench, 100))
    assert (bench.job.status, bench.job.attempts, bench.causes) == (
        "queued",
        1,
        ["attempt_time_limit"],
    )
    assert len(bench.job.checkpoint) == 3
    for _ in range(2):
        bench.work(slowly(bench, 100))
    assert (bench.job.status, bench.ended) == ("completed", [])
    bench.store.database.close()


def test_a_job_over_its_total_limit_fails(tmp_path):
    bench = Bench(tmp_path, max_job_seconds=700)
    bench.work(hanging_after(bench, 2, lambda: bench.clock.turn(301)))
    bench.clock.turn(10_000)  # waiting does not count
    bench.work(slowly(bench, 100))
    assert (bench.job.status, bench.job.error.code) == ("failed", "time_limit")
    assert "700 s of work" in bench.job.error.message
    assert bench.causes == ["stalled", "time_limit"]
    bench.store.retry(bench.id)
    bench.work(swarm.fake_render)
    assert (bench.job.status, bench.causes) == ("completed", [None])
    bench.store.database.close()


def test_a_step_that_runs_past_the_total_limit_is_ended(tmp_path):
    bench = Bench(tmp_path, max_job_seconds=100)

    def stop() -> None:
        bench.clock.turn(101)
        bench.wait_for_heartbeat()
        bench.clock.turn(61)

    bench.work(hanging_after(bench, 2, stop))
    assert (bench.ended, bench.job.status, bench.job.error.code) == (
        [EXIT_STUCK],
        "failed",
        "time_limit",
    )
    bench.store.database.close()


def test_lost_attempts_count_toward_the_total_limit(database, tmp_path, clock):
    settings = Settings(data=tmp_path, max_job_seconds=100, max_attempts=1_000)
    store, leases = JobStore(database, settings), Leases(database, settings)
    id = store.submit({"prompt": "x"}, owner="ada").id
    for number in range(1, 5):
        lease = leases.lease("w")
        assert lease is not None
        assert lease.seconds_used == (number - 1) * 31
        clock.turn(31)
        leases.expire()
    assert (store.get(id).status, store.get(id).error.code) == ("failed", "time_limit")
    assert [attempt.outcome for attempt in store.attempts(store.get(id))] == ["queued"] * 3 + [
        "failed"
    ]


def test_a_job_leased_by_an_older_version_is_retried(bench):
    lease = bench.leases.lease("old")
    with bench.store.database.write() as write:
        write.connection.execute(attempts.delete())  # that version wrote none
    bench.store.database.close()
    again = Database(bench.settings.database, bench.clock)
    bench.store, bench.leases = JobStore(again, bench.settings), Leases(again, bench.settings)
    bench.leases.heartbeat(lease, progress=5)
    bench.leases.requeue_worker_jobs("old")
    assert (bench.job.status, bench.job.attempts, bench.causes) == ("queued", 1, [])
    bench.work(swarm.fake_render)
    assert bench.job.status == "completed"


def test_a_refusal_keeps_its_code_past_the_time_limit(database, tmp_path, clock):
    settings = Settings(data=tmp_path, max_job_seconds=10)
    store, leases = JobStore(database, settings), Leases(database, settings)
    store.submit({"prompt": "x"}, owner="ada")
    lease = leases.lease("w")
    clock.turn(20)
    assert leases.fail(lease, JobFailure("request", "No such size.")).error.code == "request"


def test_the_heartbeat_disarms_the_hard_limit(bench, monkeypatch):
    limits = []
    heartbeat = "skyloom.serve.workers.heartbeat"
    monkeypatch.setattr(f"{heartbeat}.arm_hard_limit", limits.append)
    monkeypatch.setattr(f"{heartbeat}.disarm_hard_limit", lambda: limits.append(None))
    bench.work(slowly(bench, 1))
    assert limits[0] == 1_800
    assert 300 in limits
    assert limits[-1] is None
