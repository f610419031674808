"""Renders that hang, in whatever way: the job is given back with the cause, and the process that renders ends."""

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
from skyloom.serve.queue.watchdog import EXIT_STUCK
from skyloom.serve.settings import Settings
from skyloom.serve.storage import Asset, FolderStorage
from skyloom.serve.workers.worker import Progress, Worker

from ..conftest import Clock, load_beside

swarm = load_beside("swarm")
LONG = 60.0  # seconds; only a broken watchdog waits for so long


class Bench:
    """A queue and a worker in this process; one clock for the database and the watchdog, `ended` are exit statuses."""

    def __init__(self, folder: Path, **settings) -> None:
        self.settings = Settings(
            data=folder, heartbeat_seconds=0.02, disk_reserve=0, max_attempts=3, **settings
        )
        self.clock, self.ended, self.free = Clock(), [], threading.Event()
        self.store = JobStore(Database(self.settings.database, self.clock), self.settings)
        self.leases = Leases(self.store.database, self.settings)
        self.storage = FolderStorage(Path(self.settings.storage))
        self.looks = 0
        self.leases.wanted = self._counted(self.leases.wanted)
        self.leases.heartbeat = self._counted(self.leases.heartbeat)
        self.id = self.store.submit({"prompt": "a cat"}, owner="ada").id

    def _counted(self, call):
        def counted(*arguments, **values):
            self.looks += 1
            return call(*arguments, **values)

        return counted

    def look_around(self) -> None:
        """Until the pulse has looked at everything that is so now."""
        seen, until = self.looks, time.monotonic() + LONG
        while self.looks < seen + 3:
            assert time.monotonic() < until, "the pulse has stopped"
            time.sleep(0.005)

    def end(self, status: int) -> None:
        """What ends a process; here the render goes on to its next step, where it is not heard any more."""
        self.ended.append(status)
        self.free.set()

    def hang(self) -> None:
        """What a stuck device does."""
        assert self.free.wait(LONG), "nobody ends the render"
        self.free.clear()

    def work(self, render) -> None:
        """Take the job once."""
        name = f"w{len(self.ended)}"
        worker = Worker(
            self.leases,
            self.storage,
            render,
            self.settings,
            name=name,
            device="none",
            end=self.end,
            clock=self.clock,
        )
        assert worker.work_one()

    @property
    def job(self):
        """The job as it is."""
        return self.store.get(self.id)

    @property
    def causes(self) -> list[str | None]:
        """Why each attempt ended."""
        return [
            attempt.error and attempt.error["code"] for attempt in self.store.attempts(self.job)
        ]


@pytest.fixture
def bench(tmp_path) -> Iterator[Bench]:
    """A queue with one job."""
    made = Bench(tmp_path)
    yield made
    made.store.database.close()


def hanging_after(bench: Bench, steps: int, stop: Callable[[], object]):
    """The fake renderer, that hangs after so many steps once it has called `stop`."""

    def render(job, folder, *, output):
        for number, told in enumerate(swarm.fake_render(job, folder, output=output)):
            if number == steps:
                stop()
                bench.hang()
            yield told

    return render


@pytest.mark.parametrize("steps", range(1, swarm.STEPS + 1))
def test_a_device_that_stops_in_the_middle_costs_an_attempt_and_no_step(bench, steps: int):
    bench.work(hanging_after(bench, steps, lambda: bench.clock.turn(301)))
    assert bench.ended == [EXIT_STUCK]
    assert (bench.job.status, bench.causes) == ("queued", ["stalled"])
    assert (
        "no progress for 300 s in the phase denoise"
        in bench.store.attempts(bench.job)[0].error["message"]
    )
    bench.work(swarm.fake_render)
    assert bench.job.status == "completed"
    assert b"".join(
        bench.storage.read(Asset.parse(bench.job.result.assets["video"]))
    ) == swarm.frames_of("a cat")
    assert bench.causes == ["stalled", None]


def test_a_render_that_always_hangs_fails_with_the_cause(bench):
    for number in range(3):
        assert bench.job.attempts == number
        bench.work(hanging_after(bench, 1, lambda: bench.clock.turn(301)))
    assert bench.ended == [EXIT_STUCK] * 3
    assert (bench.job.status, bench.job.error.code, bench.causes) == (
        "failed",
        "stalled",
        ["stalled"] * 3,
    )


def test_loading_has_a_longer_limit_of_its_own(bench):
    def stop() -> None:
        bench.clock.turn(1_799)
        bench.look_around()
        assert bench.ended == []
        bench.clock.turn(2)

    bench.work(hanging_after(bench, 0, stop))
    assert bench.ended == [EXIT_STUCK]
    assert "1800 s while it was loaded" in bench.store.attempts(bench.job)[0].error["message"]


def test_storing_has_the_longer_limit_too(bench, monkeypatch):
    put = bench.storage.put

    def slow(source, suffix):
        if suffix == "mp4":
            bench.clock.turn(1_799)
            bench.look_around()
        return put(source, suffix)

    monkeypatch.setattr(bench.storage, "put", slow)
    bench.work(swarm.fake_render)
    assert (bench.ended, bench.job.status) == ([], "completed")


def test_a_storage_that_hangs_is_heard_too(bench, monkeypatch):
    def hang(source, suffix):
        bench.clock.turn(1_801)
        bench.hang()
        raise OSError("gone")

    monkeypatch.setattr(bench.storage, "put", hang)
    bench.work(lambda job, folder, *, output: at_once(job, output))
    assert (bench.ended, bench.causes) == ([EXIT_STUCK], ["stalled"])


def at_once(job, output: Path) -> Iterator[Progress]:
    """A render of one step that leaves no state."""
    made = output / "video.mp4"
    made.write_bytes(b"x")
    yield Progress(99, "decode", {"video": made}, {})


@pytest.mark.parametrize(("verb", "status"), [("cancel", "cancelled"), ("delete", None)])
def test_a_cancel_of_a_stuck_render_is_heard(bench, verb: str, status: str | None):
    def stop() -> None:
        getattr(bench.store, verb)(bench.id)
        bench.clock.turn(59)
        bench.look_around()
        bench.clock.turn(59)  # counted from when the cancel was heard
        bench.look_around()
        assert bench.ended == []
        bench.clock.turn(2)

    bench.work(hanging_after(bench, 2, stop))
    assert bench.ended == [EXIT_STUCK]
    assert bench.store.counts().by_status == ({} if status is None else {status: 1})


def test_a_pause_of_a_stuck_render_holds_it_with_the_cause(bench):
    def stop() -> None:
        bench.store.pause(bench.id)
        bench.look_around()
        bench.clock.turn(301)

    bench.work(hanging_after(bench, 2, stop))
    assert (bench.job.status, bench.job.attempts, bench.causes) == ("paused", 1, ["stalled"])


def test_a_slow_render_that_goes_on_is_left_alone(bench):
    def slow(job, folder, *, output):
        for told in swarm.fake_render(job, folder, output=output):
            bench.clock.turn(299)
            bench.look_around()
            yield told

    bench.work(slow)
    assert (bench.ended, bench.job.status) == ([], "completed")


def test_without_limits_nothing_is_ended(tmp_path):
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
        bench.look_around()
        for told in swarm.fake_render(job, folder, output=output):
            bench.clock.turn(1e6)
            bench.look_around()
            yield told

    bench.work(slow)
    assert (bench.ended, bench.job.status) == ([], "completed")
    bench.store.database.close()


def test_a_stuck_render_whose_lease_is_lost_ends_and_touches_nothing(bench):
    def stop() -> None:
        bench.leases.forget("w0")
        bench.clock.turn(59)
        threading.Thread(target=turn_on, daemon=True).start()

    def turn_on() -> None:
        while (
            not bench.ended
        ):  # the pulse no longer asks for what is wanted, so nothing else tells that it looked
            bench.clock.turn(1)
            time.sleep(0.02)

    bench.work(hanging_after(bench, 2, stop))
    assert bench.ended == [EXIT_STUCK]
    assert (bench.job.status, bench.causes) == ("queued", ["worker_lost"])


def test_a_database_that_is_away_keeps_no_stuck_process_alive(bench, monkeypatch):
    def away(*_, **__):
        raise OperationalError("COMMIT", {}, Exception("gone"))

    monkeypatch.setattr(bench.leases, "fail", away)
    bench.work(hanging_after(bench, 1, lambda: bench.clock.turn(301)))
    assert (bench.ended, bench.job.status) == ([EXIT_STUCK], "in_progress")
    bench.leases.forget("w0")
    assert (bench.job.status, bench.causes) == ("queued", ["worker_lost"])


def slowly(bench: Bench, seconds: float):
    """The fake renderer; each of its steps takes so many seconds."""

    def render(job, folder, *, output):
        for told in swarm.fake_render(job, folder, output=output):
            bench.clock.turn(seconds)
            bench.look_around()
            yield told

    return render


def test_an_attempt_past_its_time_is_followed_by_another_that_goes_on(tmp_path):
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


def test_a_job_past_its_time_over_all_attempts_fails(tmp_path):
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


def test_a_step_that_outlives_the_jobs_time_is_ended(tmp_path):
    bench = Bench(tmp_path, max_job_seconds=100)

    def stop() -> None:
        bench.clock.turn(101)
        bench.look_around()
        bench.clock.turn(61)

    bench.work(hanging_after(bench, 2, stop))
    assert (bench.ended, bench.job.status, bench.job.error.code) == (
        [EXIT_STUCK],
        "failed",
        "time_limit",
    )
    bench.store.database.close()


def test_workers_that_die_again_and_again_use_up_the_jobs_time_too(database, tmp_path, clock):
    settings = Settings(data=tmp_path, max_job_seconds=100, max_attempts=1_000)
    store, leases = JobStore(database, settings), Leases(database, settings)
    id = store.submit({"prompt": "x"}, owner="ada").id
    for number in range(1, 5):
        lease = leases.lease("w")
        assert lease is not None
        assert lease.used == (number - 1) * 31
        clock.turn(31)
        leases.expire()
    assert (store.get(id).status, store.get(id).error.code) == ("failed", "time_limit")
    assert [attempt.outcome for attempt in store.attempts(store.get(id))] == ["queued"] * 3 + [
        "failed"
    ]


def test_a_job_that_an_older_version_had_in_hand_goes_on(bench):
    lease = bench.leases.lease("old")
    with bench.store.database.write() as write:
        attempts.drop(write.connection)  # as that version's database is
    bench.store.database.close()
    again = Database(bench.settings.database, bench.clock)
    bench.store, bench.leases = JobStore(again, bench.settings), Leases(again, bench.settings)
    bench.leases.heartbeat(lease, progress=5)
    bench.leases.forget("old")
    assert (bench.job.status, bench.job.attempts, bench.causes) == ("queued", 1, [])
    bench.work(swarm.fake_render)
    assert bench.job.status == "completed"


def test_a_refusal_keeps_its_code_when_the_time_is_over(database, tmp_path, clock):
    settings = Settings(data=tmp_path, max_job_seconds=10)
    store, leases = JobStore(database, settings), Leases(database, settings)
    store.submit({"prompt": "x"}, owner="ada")
    lease = leases.lease("w")
    clock.turn(20)
    assert leases.fail(lease, JobFailure("request", "No such size.")).error.code == "request"


def test_the_pulse_leaves_no_alarm_behind(bench, monkeypatch):
    told = []
    monkeypatch.setattr("skyloom.serve.workers.heartbeat.arm", told.append)
    monkeypatch.setattr("skyloom.serve.workers.heartbeat.disarm", lambda: told.append(None))
    bench.work(slowly(bench, 1))
    assert told[0] == 1_800
    assert 300 in told
    assert told[-1] is None
