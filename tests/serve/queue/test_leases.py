"""Leases: fencing, lost leases, attempts and fair shares."""

import dataclasses

import pytest

from skyloom.serve.queue.jobs import JobFailure, JobResult
from skyloom.serve.queue.leases import LostLeaseError
from skyloom.serve.queue.retention import delete_old_rows
from skyloom.serve.settings import Settings

DONE = JobResult({"video": "asset:v"}, {"seed": 1})


def submit(store, owner="ada", **more):
    """Submit a job."""
    return store.submit({"prompt": "a cat"}, owner=owner, **more)


def test_a_job_has_one_lease_at_a_time(store, leases):
    job = submit(store)
    lease = leases.lease("a")
    assert (lease.job.id, lease.job.status, lease.job.worker) == (job.id, "in_progress", "a")
    assert leases.lease("b") is None


def test_a_stale_worker_can_change_nothing(store, leases, clock):
    job = submit(store)
    stale = leases.lease("a")
    clock.turn(31)
    assert leases.expire() == 1
    fresh = leases.lease("b")
    assert fresh.token > stale.token
    before = store.get(job.id)
    for write in (
        lambda: leases.heartbeat(stale, progress=90),
        lambda: leases.requested_action(stale),
        lambda: leases.finish(stale, DONE),
        lambda: leases.fail(stale, JobFailure("x", "x")),
        lambda: leases.release(stale),
    ):
        with pytest.raises(LostLeaseError):
            write()
    assert store.get(job.id) == before
    assert leases.finish(fresh, DONE).result == DONE
    with pytest.raises(LostLeaseError):
        leases.heartbeat(fresh)


def test_a_forged_token_is_no_lease(store, leases):
    submit(store)
    lease = leases.lease("a")
    with pytest.raises(LostLeaseError):
        leases.finish(dataclasses.replace(lease, token=lease.token + 1), DONE)


def test_heartbeats_keep_a_lease_and_progress_never_goes_back(store, leases, clock):
    job = submit(store)
    lease = leases.lease("a")
    for percent, shown in ((10, 10), (5, 10), (100, 99)):
        clock.turn(29)
        leases.heartbeat(lease, progress=percent, phase="denoise")
        assert leases.expire() == 0
        assert store.get(job.id).progress == shown
    assert leases.finish(lease, DONE).progress == 100


def test_a_late_heartbeat_before_expiry_renews_the_lease(store, leases, clock):
    submit(store)
    lease = leases.lease("a")
    clock.turn(300)
    leases.heartbeat(lease)
    assert leases.expire() == 0


def test_the_same_result_twice_is_one_result(store, leases):
    job = submit(store)
    lease = leases.lease("a")
    assert leases.finish(lease, DONE) == leases.finish(lease, DONE) == store.get(job.id)
    assert [event.type for event in store.events(job=job.id)].count("video.completed") == 1


def test_a_job_fails_after_max_attempts(store, leases, clock):
    job = submit(store)
    for _ in range(3):
        leases.lease("a")
        clock.turn(31)
        leases.expire()
    failed = store.get(job.id)
    assert (failed.status, failed.error.code, failed.attempts) == ("failed", "worker_lost", 3)
    assert leases.lease("a") is None
    assert store.retry(job.id).attempts == 0


def test_a_new_checkpoint_resets_the_attempts(store, leases, clock):
    job = submit(store)
    for index in range(6):
        lease = leases.lease("a")
        assert lease.job.checkpoint == ({"state": f"asset:{index - 1}"} if index else {})
        leases.heartbeat(lease, checkpoint={"state": f"asset:{index}"})
        clock.turn(31)
        leases.expire()
    assert store.get(job.id).status == "queued"


def test_a_dead_workers_jobs_are_requeued_at_once(store, leases):
    job = submit(store)
    leases.lease("a")
    assert leases.requeue_worker_jobs("b") == 0
    assert leases.requeue_worker_jobs("a") == 1
    assert leases.lease("b").job.id == job.id


def test_requested_actions_are_applied_when_the_worker_dies(store, leases, clock):
    cancelled, paused, deleted = (submit(store) for _ in range(3))
    for _ in range(3):
        leases.lease("a")
    store.cancel(cancelled.id)
    store.pause(paused.id)
    store.delete(deleted.id)
    clock.turn(31)
    assert leases.expire() == 3
    assert store.get(cancelled.id).status == "cancelled"
    assert store.get(paused.id).status == "paused"
    assert store.counts().by_status == {"cancelled": 1, "paused": 1}


def test_release_counts_no_attempt_and_keeps_the_checkpoint(store, leases):
    job = submit(store)
    for _ in range(5):
        lease = leases.lease("a")
        assert leases.release(lease, {"state": "asset:s"}).status == "queued"
    assert (store.get(job.id).attempts, store.get(job.id).checkpoint) == (0, {"state": "asset:s"})


def test_failures_are_final_or_retried_later(store, leases, clock):
    job = submit(store)
    full = JobFailure("disk_full", "The disk is full.")
    for _ in range(2):
        assert leases.fail(leases.lease("a"), full, retry_in=60).status == "queued"
        assert leases.lease("a") is None
        clock.turn(61)
    failed = leases.fail(leases.lease("a"), full, retry_in=60)
    assert (failed.status, failed.error) == ("failed", full)
    other = submit(store)
    assert leases.fail(leases.lease("a"), JobFailure("request", "no")).status == "failed"
    assert store.get(other.id).error.code == "request"
    assert job.id != other.id


def test_priority_then_age_orders_an_owners_jobs(store, leases):
    ids = [submit(store, priority=priority).id for priority in (0, 0, 5, 0)]
    order = [leases.lease("a").job.id for _ in range(4)]
    assert order == [ids[2], ids[0], ids[1], ids[3]]


def test_owners_take_turns_however_many_jobs_they_have(store, leases):
    for owner in ("ada", "ada", "ada", "bob", "cleo"):
        submit(store, owner)
    assert [leases.lease("a").job.owner for _ in range(5)] == ["ada", "bob", "cleo", "ada", "ada"]


def test_a_returning_owner_has_no_credit(store, leases):
    for _ in range(3):
        submit(store, "ada")
        leases.finish(leases.lease("a"), DONE)
    for owner in ("ada", "bob", "ada", "bob"):
        submit(store, owner)
    assert sorted(leases.lease("a").job.owner for _ in range(2)) == ["ada", "bob"]


def test_usage_is_weighted_by_cost(store, leases):
    submit(store, "ada", cost=3.0)
    submit(store, "ada")
    for _ in range(3):
        submit(store, "bob")
    assert [leases.lease("a").job.owner for _ in range(5)] == ["ada", "bob", "bob", "bob", "ada"]


def test_four_owners_get_equal_shares_of_one_worker(store, leases, database, tmp_path):
    roomy = type(store)(database, Settings(data=tmp_path))
    for owner, count in (("ada", 40), ("bob", 20), ("cleo", 20), ("dan", 10)):
        for _ in range(count):
            submit(roomy, owner)
    served = []
    for _ in range(40):
        lease = leases.lease("a")
        served.append(lease.job.owner)
        leases.finish(lease, DONE)
        counts = [served.count(owner) for owner in ("ada", "bob", "cleo", "dan")]
        assert max(counts) - min(counts) <= 1


def test_old_events_and_keys_are_deleted(store, leases, clock):
    job = submit(store, key="k", fingerprint="f")
    leases.finish(leases.lease("a"), DONE)
    clock.turn(8 * 86_400)
    delete_old_rows(store.database, store.settings)
    assert store.events() == []
    assert store.get(job.id).status == "completed"
    assert leases.unfinished([job.id]) == set()
