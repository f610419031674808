"""Jobs are leased by workers that have their model, LoRAs and memory; others wait."""

import pytest
from sqlalchemy import select

from skyloom.generate.request import Request
from skyloom.serve.queue.capabilities import Capabilities, needs_of
from skyloom.serve.queue.errors import ModelNotHeldError
from skyloom.serve.queue.jobs import JobResult, JobStore
from skyloom.serve.queue.leases import WARM_SECONDS
from skyloom.serve.queue.tables import jobs

from .old_databases import execute, make_version_1

DONE = JobResult({"video": "asset:v"}, {"seed": 1})
BOTH = Capabilities({"diorama": 10, "wan": 10})


def submit(store, model=None, owner="ada", **more):
    """Submit a job for a model."""
    request = {"prompt": "a cat", "model": model, **more.pop("request", {})}
    return store.submit(request, owner=owner, **more)


def lease_ids(leases, worker, count, warm=()):
    """Lease some jobs; their ids."""
    return [leases.lease(worker, warm).job.id for _ in range(count)]


@pytest.fixture
def two_workers(leases):
    """Worker "a" with the default model and "b" with another one."""
    leases.register_worker("a", "cpu", Capabilities({"diorama": 10}))
    leases.register_worker("b", "cuda:0", Capabilities({"wan": 10}, ("felt", "ink"), 20))
    return leases


def test_a_job_waits_for_the_worker_that_has_its_model(store, two_workers):
    wan = submit(store, "wan")
    assert two_workers.lease("a") is None
    assert store.get(wan.id).status == "queued"
    diorama = submit(store)
    assert two_workers.lease("a").job.id == diorama.id, "the job that waits blocks no other"
    assert two_workers.lease("a") is None
    assert two_workers.lease("b").job.id == wan.id
    assert two_workers.lease("b") is None


def test_a_waiting_job_of_the_next_owner_blocks_nobody(store, two_workers):
    submit(store, "wan", "ada")
    for owner in ("bob", "bob", "cleo"):
        submit(store, "diorama", owner)
    owners = [two_workers.lease("a").job.owner for _ in range(3)]
    assert owners == ["bob", "cleo", "bob"]
    assert two_workers.lease("b").job.owner == "ada"


def test_a_worker_that_announced_nothing_takes_the_default_model_only(store, leases):
    wan = submit(store, "wan")
    style = submit(store, request={"loras": [{"name": "felt", "weight": 1.0}]})
    diorama = submit(store, "diorama")
    leases.register_worker("old", "cpu")
    assert leases.lease("old").job.id == diorama.id
    assert leases.lease("old") is leases.lease("unregistered") is None
    assert {store.get(job.id).status for job in (wan, style)} == {"queued"}


def test_a_job_needs_the_loras_that_its_request_names(store, two_workers):
    request = Request("a cat", model="wan", loras=["felt:0.5"])
    job = store.submit(request.to_dict(), owner="ada")
    two_workers.register_worker("c", "cuda:1", Capabilities({"wan": 10}))
    assert two_workers.lease("c") is None
    assert two_workers.lease("b").job.id == job.id


def test_needs_do_not_depend_on_the_order_of_loras():
    requests = [Request("x", model="wän", loras=names) for names in (["b", "a:0.5"], ["a", "b:2"])]
    assert {needs_of(request.to_dict()) for request in requests} == {'["wän","a","b"]'}
    assert needs_of({"prompt": "x"}) == needs_of({"model": None, "loras": []}) == '["diorama"]'


def test_a_model_that_does_not_fit_into_the_memory_is_not_leased(store, leases):
    job = submit(store, "wan")
    leases.register_worker("small", "cpu", Capabilities({"wan": 11}, memory_bytes=10))
    assert leases.lease("small") is None
    leases.register_worker("large", "cpu", Capabilities({"wan": 11}, memory_bytes=11))
    assert leases.lease("large").job.id == job.id


def test_a_restarted_worker_announces_other_models(store, two_workers):
    job = submit(store, "wan")
    two_workers.register_worker("a", "cpu", Capabilities({"wan": 10}))
    assert two_workers.list_workers()["a"].capabilities == Capabilities({"wan": 10})
    assert two_workers.lease("a").job.id == job.id
    two_workers.register_worker("b", "cpu", Capabilities({"diorama": 10}))
    with pytest.raises(ModelNotHeldError, match="'felt'"):
        submit(store, "wan", request={"loras": [{"name": "felt", "weight": 1.0}]})


def test_a_lost_job_is_resumed_by_a_worker_that_has_its_model(store, two_workers, clock):
    job = submit(store, "wan")
    lease = two_workers.lease("b")
    two_workers.heartbeat(lease, checkpoint={"state": "asset:1"})
    two_workers.requeue_worker_jobs("b")
    assert two_workers.lease("a") is None
    two_workers.register_worker("b2", "cuda:0", BOTH)
    resumed = two_workers.lease("b2")
    assert (resumed.job.id, resumed.job.checkpoint) == (job.id, {"state": "asset:1"})
    clock.turn(31)
    assert two_workers.expire() == 1
    assert two_workers.lease("a") is None
    assert two_workers.lease("b2").job.id == job.id


def test_a_model_that_no_live_worker_has_is_refused(store, two_workers, clock):
    with pytest.raises(ModelNotHeldError) as refused:
        submit(store, "other")
    assert str(refused.value) == (
        "model must be held by a running worker, got 'other'. Held: diorama, wan."
    )
    assert refused.value.field == "model"
    with pytest.raises(ModelNotHeldError) as refused:
        submit(store, "wan", request={"loras": [{"name": "felt"}, {"name": "oil"}]})
    assert str(refused.value) == (
        "loras must be held by a running worker, got 'felt, oil'. Held: felt, ink."
    )
    assert store.counts().by_status == {}
    clock.turn(61)
    two_workers.register_worker("a", "cpu", Capabilities({"diorama": 10}))
    with pytest.raises(ModelNotHeldError, match="Held: diorama"):
        submit(store, "wan")
    clock.turn(61)
    assert submit(store, "wan").status == "queued", "no worker is live, so none is known to lack it"


def test_a_repeated_call_returns_its_job_although_the_worker_is_gone(store, two_workers):
    job = submit(store, "wan", key="k", fingerprint="f")
    two_workers.requeue_worker_jobs("b")
    assert submit(store, "wan", key="k", fingerprint="f").id == job.id
    with pytest.raises(ModelNotHeldError):
        submit(store, "wan", key="k2", fingerprint="f")


def test_a_model_is_accepted_while_a_worker_of_the_server_starts(database, settings, leases):
    store = JobStore(database, settings, lambda: ["own"])
    leases.register_worker("remote", "cpu", Capabilities({"diorama": 10}))
    assert submit(store, "wan").status == "queued"
    leases.register_worker("own", "cpu", Capabilities({"diorama": 10}))
    with pytest.raises(ModelNotHeldError):
        submit(store, "wan")


def test_workers_are_counted_by_model(store, two_workers):
    two_workers.register_worker("c", "cpu", BOTH)
    two_workers.register_worker("small", "cpu", Capabilities({"wan": 10}, memory_bytes=1))
    counts = store.counts()
    assert (counts.workers, counts.models) == (4, {"diorama": 2, "wan": 2})


def test_jobs_of_a_loaded_model_are_preferred_among_equal_priorities(store, leases):
    leases.register_worker("a", "cpu", BOTH)
    cold, warm, warm2 = (submit(store, model).id for model in ("wan", "diorama", "diorama"))
    urgent = submit(store, "wan", priority=1).id
    assert lease_ids(leases, "a", 4, ["diorama"]) == [urgent, warm, warm2, cold]


def test_a_loaded_model_is_preferred_among_owners_of_equal_usage_only(store, leases):
    leases.register_worker("a", "cpu", BOTH)
    for owner, model in (("ada", "wan"), ("bob", "diorama"), ("bob", "diorama")):
        submit(store, model, owner)
    order = [leases.lease("a", ["diorama"]).job.owner for _ in range(3)]
    assert order == ["bob", "ada", "bob"], "after one job, bob has more usage than ada"


def test_no_stream_of_jobs_of_a_loaded_model_starves_another(store, leases, clock):
    leases.register_worker("a", "cpu", BOTH)
    cold = submit(store, "wan").id
    served = []
    while cold not in served:
        submit(store, "diorama")
        lease = leases.lease("a", ["diorama"])
        served.append(lease.job.id)
        leases.finish(lease, DONE)
        clock.turn(WARM_SECONDS / 4)
    assert len(served) == 5, "four jobs overtake it in WARM_SECONDS"


def test_old_jobs_need_the_model_of_their_request(database_url, tmp_path, settings):
    make_version_1(database_url)
    changed = """UPDATE jobs SET request = '{"model": "wan"}' WHERE id = 'video_0'"""
    execute(database_url, [changed])
    from skyloom.serve.queue.database import Database

    database = Database(database_url)
    with database.read() as connection:
        rows = connection.execute(select(jobs.c.id, jobs.c.needs)).all()
    database.close()
    needs = dict(map(tuple, rows))
    assert needs.pop("video_0") == '["wan"]'
    assert set(needs.values()) == {'["diorama"]'}
