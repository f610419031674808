"""A worker runs jobs to completion, failure, release or loss of the lease."""

import errno
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from skyloom.core.errors import CapacityError, DiskFullError, MediaError, RequestError
from skyloom.serve.queue.database import Database
from skyloom.serve.queue.jobs import JobStore
from skyloom.serve.queue.leases import Leases
from skyloom.serve.settings import Settings
from skyloom.serve.storage import Asset, FolderStorage
from skyloom.serve.workers.worker import Progress, Worker, explain

from ..conftest import HERE, load_beside

swarm = load_beside("swarm")
SHA = "ab" * 32


class Host:
    """A host with its own data folder; queue and storage are shared."""

    def __init__(self, shared: Path, folder: Path, clock=None, **settings) -> None:
        self.settings = Settings(
            data=folder,
            database_url=f"sqlite:///{shared / 'jobs.db'}",
            storage_url=str(shared / "assets"),
            **{"heartbeat_seconds": 0.05, "disk_reserve": 0, **settings},
        )
        self.store = JobStore(Database(self.settings.database, clock), self.settings)
        self.leases = Leases(self.store.database, self.settings)
        self.storage = FolderStorage(Path(self.settings.storage))

    def worker(self, render=swarm.fake_render) -> Worker:
        """A worker on this host."""
        return Worker(self.leases, self.storage, render, self.settings, name="w", device="none")


@pytest.fixture
def host(tmp_path) -> Iterator[Host]:
    """A single host."""
    host = Host(tmp_path, tmp_path / "here")
    yield host
    host.store.database.close()


def submit(host: Host, prompt: str = "a cat") -> str:
    """Submit a job; its id."""
    return host.store.submit({"prompt": prompt}, owner="ada").id


def content(host: Host, id: str) -> bytes:
    """Bytes of a job's video."""
    return b"".join(host.storage.read(Asset.parse(host.store.get(id).result.assets["video"])))


def stopping_at(step: int, stop: Callable[[], object]):
    """The fake renderer; calls `stop` after a step and records all steps."""
    steps = []

    def render(job, folder, *, output):
        for progress in swarm.fake_render(job, folder, output=output):
            steps.append(progress)
            if len(steps) == step:
                stop()
                time.sleep(0.2)  # long enough for a heartbeat
            yield progress

    render.steps = steps
    return render


def test_a_job_is_stored_and_its_run_folder_deleted(host):
    id = submit(host)
    host.worker().run(until_empty=True)
    job = host.store.get(id)
    assert (job.status, job.progress, job.result.receipt) == ("completed", 100, {"prompt": "a cat"})
    assert content(host, id) == swarm.frames_of("a cat")
    assert list(host.settings.runs.iterdir()) == []
    assert host.store.counts().workers == 1


@pytest.mark.parametrize("step", range(1, swarm.STEPS + 1))
def test_another_host_resumes_after_any_step_with_an_equal_result(tmp_path, step: int):
    here, there = Host(tmp_path, tmp_path / "here"), Host(tmp_path, tmp_path / "there")
    id = submit(here)
    first = here.worker()
    first.renderer = stopping_at(step, first.drain)
    first.run()
    left = here.store.get(id)
    assert (left.status, left.attempts, left.progress) == ("queued", 0, left.progress)
    assert len(left.checkpoint) == step
    second = there.worker(stopping_at(99, lambda: None))
    second.run(until_empty=True)
    assert content(there, id) == swarm.frames_of("a cat")
    assert len(second.renderer.steps) == swarm.STEPS - step + 1
    for host in (here, there):
        host.store.database.close()


def test_a_cancelled_job_stops_within_a_step_and_leaves_no_file(host):
    id = submit(host)
    render = stopping_at(2, lambda: host.store.cancel(id))
    host.worker(render).run(until_empty=True)
    assert host.store.get(id).status == "cancelled"
    assert len(render.steps) == 2
    assert list(host.settings.runs.iterdir()) == []


def test_a_paused_job_resumes_without_losing_a_step(host):
    id = submit(host)
    host.worker(stopping_at(3, lambda: host.store.pause(id))).run(until_empty=True)
    assert host.store.get(id).status == "paused"
    host.store.resume(id)
    render = stopping_at(99, lambda: None)
    host.worker(render).run(until_empty=True)
    assert content(host, id) == swarm.frames_of("a cat")
    assert len(render.steps) == swarm.STEPS - 3 + 1


def test_a_job_deleted_while_it_runs_leaves_nothing(host):
    id = submit(host)
    host.worker(stopping_at(2, lambda: host.store.delete(id))).run(until_empty=True)
    assert host.store.counts().by_status == {}
    assert list(host.settings.runs.iterdir()) == []


def test_a_worker_that_lost_its_lease_stops_without_changing_the_job(host):
    id = submit(host)
    render = stopping_at(2, lambda: host.leases.requeue_worker_jobs("w"))
    first = host.worker(render)
    assert first.work_one()
    assert len(render.steps) == 2
    assert host.store.get(id).status == "queued"
    assert (host.settings.runs / id / "state").is_dir()
    host.worker().run(until_empty=True)
    assert content(host, id) == swarm.frames_of("a cat")


@pytest.mark.parametrize(
    ("error", "code", "tries"),
    [
        (MemoryError(), "out_of_memory", True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "out_of_memory", True),
        (OSError(errno.ENOSPC, "No space left on device"), "disk_full", True),
        (DiskFullError("The disk of /root/path is full."), "disk_full", True),
        (CapacityError("The storage does not answer.", retry_after=10), "capacity", True),
        (CapacityError("Too large for this machine."), "capacity", False),
        (RequestError("No such size."), "request", False),
        (ValueError("secret /root/path"), "internal", False),
    ],
)
def test_errors_have_a_code_and_only_some_are_retried(
    host, error: Exception, code: str, tries: bool
):
    id = submit(host)

    def render(job, folder, *, output):
        yield Progress(1, "text")
        raise error

    host.worker(render).run(until_empty=True)
    job = host.store.get(id)
    assert job.status == ("queued" if tries else "failed")
    failure, _ = explain(error, host.settings.data, {})
    assert failure.code == code
    assert "secret" not in failure.message
    assert job.error == (None if tries else failure)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        ({"prompt": "a cat", "image": f"asset:{SHA}.png"}, "input_reference"),
        (
            {"prompt": "", "cards": [{"at": "0", "image": f"asset:{SHA}.png", "strength": 0.5}]},
            "input_reference",
        ),
        ({"cards": [{"at": "0"}, {"at": "1", "image": f"asset:{SHA}.png"}]}, "storyboard[1].image"),
        ({"edit": {"verb": "remix", "videos": [f"asset:{SHA}.mp4"]}}, "video"),
        ({"edit": {"verb": "stitch", "videos": ["asset:x", f"asset:{SHA}.mp4"]}}, "videos[1]"),
        ({"edit": {"verb": "inpaint", "mask": f"asset:{SHA}.png"}}, "mask"),
        ({"prompt": "a cat"}, "A file"),
    ],
)
def test_errors_name_a_file_by_its_api_field(tmp_path, request_, field):
    for path in (
        f"video_1/inputs/{SHA}.png",
        f"/srv/runs/video_1/inputs/{SHA}.mp4",
        f"{tmp_path}/runs/x/{SHA}.png",
    ):
        failure, _ = explain(
            MediaError(f"{path} cannot be read.", hint="Use a PNG."), tmp_path, request_
        )
        assert failure.message == f"{field} cannot be read. Use a PNG."


def test_errors_contain_no_local_folders(tmp_path):
    rest = "no 1/2 of https://example.org/a/b and/or c."
    text = f"{tmp_path / 'runs' / 'x'} or /usr/lib/model/dit.safetensors: {rest}"
    failure, _ = explain(RequestError(text), tmp_path, {})
    assert failure.message == f"x or dit.safetensors: {rest}"


def test_a_nearly_full_disk_delays_the_job(tmp_path):
    host = Host(tmp_path, tmp_path, disk_reserve=2**60)
    id = submit(host)
    host.worker().run(until_empty=True)
    assert host.store.get(id).status == "queued"
    assert host.store.get(id).attempts == 1
    host.store.database.close()


def test_a_finished_job_waits_for_an_unavailable_database(host, monkeypatch):
    id = submit(host)
    finish, calls = host.leases.finish, []

    def away(lease, result):
        calls.append(lease)
        if len(calls) == 2:  # written, but the confirmation was lost
            finish(lease, result)
        if len(calls) < 4:
            raise OperationalError("COMMIT", {}, Exception("gone"))
        return finish(lease, result)

    monkeypatch.setattr(host.leases, "finish", away)
    monkeypatch.setattr("skyloom.serve.workers.worker.RETRY_SECONDS", 0.01)
    host.worker().run(until_empty=True)
    assert len(calls) == 4
    assert host.store.get(id).status == "completed"
    assert [event.type for event in host.store.events(job=id)].count("video.completed") == 1


def test_heartbeats_keep_the_lease_of_a_slow_step(tmp_path, monkeypatch, clock):
    host = Host(tmp_path, tmp_path, clock, lease_seconds=30.0)
    id = submit(host)
    renewed = threading.Semaphore(0)
    heartbeat = host.leases.heartbeat

    def counted(*arguments, **values):
        action = heartbeat(*arguments, **values)
        renewed.release()
        return action

    monkeypatch.setattr(host.leases, "heartbeat", counted)

    def slow(job, folder, *, output):
        yield Progress(1, "text")
        for _ in range(6):
            clock.turn(20)
            for _ in range(2):  # the first may have begun before the clock was turned
                assert renewed.acquire(timeout=60)
            assert host.leases.expire() == 0
        yield from swarm.fake_render(job, folder, output=output)

    host.worker(slow).run(until_empty=True)
    assert host.store.get(id).status == "completed"
    host.store.database.close()


def test_a_run_folder_is_deleted_once_another_worker_completed_the_job(tmp_path):
    here, there = Host(tmp_path, tmp_path / "here"), Host(tmp_path, tmp_path / "there")
    id = submit(here)

    def taken_over() -> None:
        here.leases.requeue_worker_jobs("w")
        there.worker().run(until_empty=True)

    first = here.worker(stopping_at(3, taken_over))
    first.work_one()
    assert (here.settings.runs / id).is_dir()
    first.run(until_empty=True)
    assert list(here.settings.runs.iterdir()) == []
    for host in (here, there):
        host.store.database.close()


def test_clean_up_deletes_only_folders_of_ended_jobs(host):
    kept, done = submit(host), submit(host)
    host.store.cancel(done)
    for name in (kept, done, "video_gone"):
        (host.settings.runs / name / "state").mkdir(parents=True)
    host.worker().clean_up()
    assert [path.name for path in host.settings.runs.iterdir()] == [kept]


WILD = (
    "../../evil",
    "/tmp/evil",
    ".hidden",
    "span-000/../../../evil",
    "a/b/evil",
    "../evil",
    "span-000/..",
)


def test_checkpoint_names_outside_the_state_folder_are_ignored(host):
    id = submit(host)
    lease = host.leases.lease("w")
    stored = host.storage.put(b"x", "bin").reference
    host.leases.release(lease, {name: stored for name in WILD})
    host.worker().run(until_empty=True)
    assert content(host, id) == swarm.frames_of("a cat")
    assert not (host.settings.runs.parent / "evil").exists()


SLOW_WORKER = f"""
import importlib.util, sys
from pathlib import Path
place = importlib.util.spec_from_file_location("swarm", {str(HERE / "swarm.py")!r})
swarm = importlib.util.module_from_spec(place)
place.loader.exec_module(swarm)
swarm.uniform = lambda low, high: 0.3
swarm.worker(swarm.settings_of(Path(sys.argv[1]), sys.argv[2]))
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_sigterm_releases_the_job_and_sigkill_loses_it(tmp_path, how: int):
    host = Host(tmp_path, tmp_path)
    id = submit(host)
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_WORKER, str(tmp_path), host.settings.database]
    )
    while host.store.get(id).progress < 10:
        time.sleep(0.05)
    process.send_signal(how)
    process.wait(timeout=120)
    job = host.store.get(id)
    if how == signal.SIGTERM:
        assert (process.returncode, job.status, job.attempts) == (0, "queued", 0)
        assert job.checkpoint
    else:
        assert (process.returncode, job.status) == (-signal.SIGKILL, "in_progress")
        host.leases.requeue_worker_jobs(job.worker)
    host.worker().run(until_empty=True)
    assert content(host, id) == swarm.frames_of("a cat")
    host.store.database.close()


def test_queue_and_worker_modules_import_no_heavy_library():
    program = (
        "import sys\n"
        "import skyloom.serve.queue.jobs, skyloom.serve.queue.leases\n"
        "import skyloom.serve.maintenance, skyloom.serve.workers.processes\n"
        "import skyloom.serve.workers.worker\n"
        "heavy = ('torch', 'numpy', 'av', 'ray', 'obstore', 'psycopg')\n"
        "sys.exit(any(name in sys.modules for name in heavy))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
