"""JobStore: durability, idempotency, limits, client verbs and owners."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from skyloom.core.errors import CapacityError
from skyloom.serve.queue.database import Database
from skyloom.serve.queue.jobs import JobConflictError, JobResult, JobStore, NotFoundError
from skyloom.serve.queue.leases import Leases
from skyloom.serve.settings import Settings

CAT = {"prompt": "a cat"}


def submit(store: JobStore, owner: str = "ada", **more):
    """Submit a job."""
    return store.submit(CAT, owner=owner, **more)


def test_a_submitted_job_is_on_disk(store, settings, database_url):
    job = submit(store, metadata={"model": "sora-2"}, priority=2)
    again = Database(database_url)
    assert JobStore(again, settings).get(job.id) == job
    again.close()
    assert (job.status, job.progress, job.request, job.metadata) == (
        "queued",
        0,
        CAT,
        {"model": "sora-2"},
    )
    assert job.id.startswith("video_")


def test_owners_see_only_their_own_jobs(store):
    job = submit(store)
    for call in (store.get, store.cancel, store.pause, store.resume, store.retry, store.delete):
        with pytest.raises(NotFoundError):
            call(job.id, "eve")
    assert store.page("eve") == ([], False)
    assert store.events("eve") == []
    assert store.get(job.id, "ada").status == "queued"


def test_pages_list_every_job_once(store):
    made = [submit(store).id for _ in range(4)]
    seen, after, more = [], None, True
    while more:
        page, more = store.page("ada", after=after, limit=3, newest_first=False)
        seen += [job.id for job in page]
        after = seen[-1]
    assert seen == made
    assert [job.id for job in store.page("ada")[0]] == made[::-1]
    with pytest.raises(NotFoundError):
        store.page("ada", after="video_none")


def test_an_idempotency_key_returns_one_job_for_a_day(store, clock):
    job = submit(store, key="k", fingerprint="f")
    assert submit(store, key="k", fingerprint="f").id == job.id
    with pytest.raises(JobConflictError):
        submit(store, key="k", fingerprint="g")
    assert submit(store, owner="bob", key="k", fingerprint="g").id != job.id
    clock.turn(24 * 3600 + 1)
    assert submit(store, key="k", fingerprint="f").id != job.id


def test_a_client_retry_returns_the_newest_job_of_its_fingerprint(store, clock):
    first = submit(store, fingerprint="f")
    second = submit(store, fingerprint="f")
    assert first.id != second.id
    assert submit(store, fingerprint="f", retry_count=1).id == second.id
    assert submit(store, owner="bob", fingerprint="f", retry_count=1).owner == "bob"
    clock.turn(61)
    assert submit(store, fingerprint="f", retry_count=2).id not in (first.id, second.id)


def test_concurrent_submits_with_one_key_are_one_job(database_url, tmp_path):
    store = JobStore(Database(database_url), Settings(data=tmp_path))
    with ThreadPoolExecutor(50) as threads:
        ids = set(threads.map(lambda _: submit(store, key="k", fingerprint="f").id, range(1_000)))
    assert len(ids) == 1
    assert store.counts().by_status == {"queued": 1}
    store.database.close()


def test_the_queue_is_bounded_per_owner_and_in_total(store, leases):
    for _ in range(4):
        submit(store)
    with pytest.raises(CapacityError) as full:
        submit(store)
    assert 1 <= full.value.retry_after <= 120
    for _ in range(4):
        submit(store, owner="bob")
    with pytest.raises(CapacityError, match="queue is full"):
        submit(store, owner="cleo")
    lease = leases.lease("w")
    leases.finish(lease, JobResult({}, {}))
    assert submit(store, owner="cleo").status == "queued"


def test_queued_jobs_are_cancelled_paused_and_resumed_at_once(store):
    job = submit(store)
    assert store.pause(job.id).status == "paused"
    assert store.pause(job.id).status == "paused"
    assert store.resume(job.id).status == "queued"
    assert store.pause(job.id).status == "paused"
    cancelled = store.cancel(job.id)
    assert (cancelled.status, cancelled.done) == ("cancelled", True)
    assert store.cancel(job.id) == cancelled
    for call in (store.pause, store.resume):
        with pytest.raises(JobConflictError):
            call(job.id)
    assert store.retry(job.id).status == "queued"
    with pytest.raises(JobConflictError):
        store.retry(job.id)


def test_a_running_job_gets_a_requested_action(store, leases: Leases):
    job = submit(store)
    lease = leases.lease("w")
    assert leases.heartbeat(lease) is None
    assert store.pause(job.id).requested_action == "pause"
    assert leases.requested_action(lease) == leases.heartbeat(lease) == "pause"
    assert store.resume(job.id).requested_action is None
    assert store.cancel(job.id).requested_action == "cancel"
    with pytest.raises(JobConflictError):
        store.resume(job.id)
    assert leases.heartbeat(lease) == "cancel"
    assert leases.release(lease).status == "cancelled"


def test_a_deleted_job_is_hidden_at_once_even_while_it_runs(store, leases, database):
    waits, runs = submit(store), None
    store.delete(waits.id)
    runs = submit(store)
    lease = leases.lease("w")
    store.delete(runs.id)
    for job in (waits, runs):
        with pytest.raises(NotFoundError):
            store.get(job.id)
    assert leases.heartbeat(lease) == "cancel"
    assert leases.finish(lease, JobResult({"video": "asset:x"}, {})) is None
    assert store.counts().by_status == {}
    assert store.events() == []
    assert database.check() == []


def test_an_accepted_cancel_is_final(store, leases):
    job = submit(store)
    lease = leases.lease("w")
    store.cancel(job.id)
    assert leases.finish(lease, JobResult({"video": "asset:x"}, {})).status == "cancelled"
    assert store.get(job.id).result is None


def test_events_are_listed_in_order(store, leases):
    job = submit(store)
    lease = leases.lease("w")
    leases.heartbeat(lease, progress=40, phase="denoise")
    leases.heartbeat(lease, progress=40, phase="denoise")
    leases.finish(lease, JobResult({}, {}))
    events = store.events("ada", job=job.id)
    assert [event.type for event in events] == [
        *("video.queued", "video.in_progress", "video.progress", "video.completed")
    ]
    assert events[2].data == {"progress": 40, "phase": "denoise"}
    assert store.events("ada", after=events[1].number) == events[2:]


def test_results_expire(store, leases, settings, database, clock):
    kept = Leases(database, Settings(data=settings.data, keep_seconds=100))
    job = submit(store)
    done = kept.finish(kept.lease("w"), JobResult({"video": "asset:x"}, {}))
    assert done.expires_at == clock.now + 100
    assert store.referenced_assets() == {"asset:x"}
    clock.turn(101)
    leases.expire()
    gone = store.get(job.id)
    assert (gone.status, gone.result, gone.completed_at) == ("expired", None, done.completed_at)
    assert store.referenced_assets() == set()


def test_a_job_not_started_at_its_deadline_expires(store, leases, clock):
    late, begun = (submit(store, owner=owner, deadline=clock.now + 10) for owner in ("ada", "bob"))
    lease = leases.lease("w")
    assert lease.job.id == late.id
    clock.turn(11)
    leases.expire()
    assert store.get(begun.id).status == "expired"
    assert store.get(late.id).status == "in_progress"


def test_assets_in_requests_and_checkpoints_are_referenced(store, leases):
    store.submit(
        {"prompt": "", "cards": [{"at": "0", "image": "asset:card"}]},
        owner="ada",
        metadata={"a": ["asset:e"]},
    )
    leases.heartbeat(leases.lease("w"), checkpoint={"step": "asset:step"})
    assert store.referenced_assets() == {"asset:card", "asset:e", "asset:step"}


def test_counts(store, leases, clock):
    submit(store)
    submit(store)
    leases.register_worker("w", "cpu")
    leases.lease("w")
    clock.turn(30)
    counts = store.counts()
    assert counts.by_status == {"queued": 1, "in_progress": 1}
    assert (counts.oldest_seconds, counts.workers) == (30, 1)
    clock.turn(61)
    assert store.counts().workers == 0


def test_no_page_has_more_than_100_rows(database, tmp_path):
    store = JobStore(database, Settings(data=tmp_path, max_queued_per_owner=1_000))
    ids = [submit(store).id for _ in range(103)]
    for limit in (101, 1_999_999):
        page, more = store.page("ada", limit=limit)
        assert ([job.id for job in page], more) == (ids[:2:-1], True)
    assert store.page("ada", limit=-1) == ([], True)
    assert len(store.events("ada", limit=10**9)) == 100
    assert [job.id for job in store.walk("ada")] == ids[::-1]
    assert [job.id for job in store.walk(status="paused")] == []


def test_counts_follow_every_change_of_a_row(store, leases, database):
    """Also those that are made by another program."""
    ids = [submit(store).id for _ in range(3)]
    store.pause(ids[0])
    store.cancel(ids[1])
    with database.write() as write:
        write.connection.exec_driver_sql("UPDATE jobs SET status = 'failed'")
    assert store.counts().by_status == {"failed": 3}
    with database.write() as write:
        write.connection.exec_driver_sql("DELETE FROM jobs")
    assert store.counts().by_status == {}
