"""Retention: which rows are deleted, when, and how many per transaction."""

import pytest
from sqlalchemy import event, func, insert, select, update

from skyloom.core.errors import ConfigError
from skyloom.serve.queue import retention
from skyloom.serve.queue.batches import BatchStore, Line
from skyloom.serve.queue.job import record_event
from skyloom.serve.queue.jobs import JobFailure, JobResult
from skyloom.serve.queue.library import Library
from skyloom.serve.queue.retention import delete_old_rows
from skyloom.serve.queue.tables import (
    batch_lines,
    batches,
    deliveries,
    events,
    idempotency_keys,
    jobs,
)
from skyloom.serve.queue.webhooks import EndpointStore
from skyloom.serve.settings import Settings

from ..conftest import load_beside

deliver_due = load_beside("delivering").deliver_due

DAY = 86_400


def count(database, table) -> int:
    """Rows of a table."""
    with database.read() as connection:
        return connection.execute(select(func.count()).select_from(table)).scalar_one()


def failed(store, leases):
    """Submit a job and fail it."""
    store.submit({}, owner="ada")
    return leases.fail(leases.lease("w"), JobFailure("internal", "wrong"))


def test_each_kind_of_row_has_its_own_retention(database, store, leases, settings, clock):
    EndpointStore(database).add(
        "ada", "a", "https://example.org", ["video.completed", "video.failed"]
    )
    wrong = failed(store, leases)
    cancelled = store.cancel(store.submit({}, owner="ada", key="k").id)
    store.submit({}, owner="ada")
    made = leases.finish(leases.lease("w"), JobResult({"video": "asset:x"}, {}))
    deliver_due(database, lambda *_: 200)
    waits = store.submit({}, owner="ada")
    assert delete_old_rows(database, settings) == {}
    clock.turn(DAY + 1)
    assert delete_old_rows(database, settings) == {"keys": 1}
    clock.turn(6 * DAY)
    assert delete_old_rows(database, settings) == {"events": 9, "deliveries": 2}
    assert {job.id for job in store.walk()} == {wrong.id, cancelled.id, made.id, waits.id}
    clock.turn(23 * DAY)
    assert delete_old_rows(database, settings) == {"jobs": 2}
    assert {job.id for job in store.walk()} == {made.id, waits.id}
    assert store.get(made.id).result == made.result
    assert store.counts().by_status == {"completed": 1, "queued": 1}
    assert database.check() == []


def test_a_retried_job_stays(database, store, leases, settings, clock):
    wrong = failed(store, leases)
    clock.turn(31 * DAY)
    store.retry(wrong.id)
    delete_old_rows(database, settings)
    assert store.get(wrong.id).status == "queued"


def test_pending_deliveries_stay(database, store, leases, settings, clock):
    EndpointStore(database).add("ada", "a", "https://example.org", ["video.failed"])
    failed(store, leases)
    deliver_due(database, lambda *_: 500)
    clock.turn(8 * DAY)
    delete_old_rows(database, settings)
    assert count(database, deliveries) == 1


def test_files_stay_unless_a_retention_is_set(database, settings, clock):
    library = Library(database)
    old = library.add_file("ada", "vision", "a.png", "asset:a", 1)
    clock.turn(1_000 * DAY)
    new = library.add_file("ada", "vision", "a.png", "asset:a", 1)
    assert delete_old_rows(database, settings) == {}
    assert delete_old_rows(database, Settings(data=settings.data, keep_file_seconds=DAY)) == {
        "files": 1
    }
    assert library.files("ada", purpose=None, after=None, limit=9, newest_first=True) == (
        [new],
        False,
    )
    assert old != new


def test_a_retention_of_0_deletes_nothing(database, store, leases, settings, clock):
    failed(store, leases)
    clock.turn(1_000 * DAY)
    names = ("ended", "event", "delivery", "batch", "file")
    kept = Settings(data=settings.data, **{f"keep_{name}_seconds": 0 for name in names})
    assert delete_old_rows(database, kept) == {}
    assert count(database, events) == 3


def test_a_batch_is_deleted_with_its_lines_and_files(database, store, settings, clock, monkeypatch):
    monkeypatch.setattr(retention, "ROWS", 3)
    library, all_batches = Library(database), BatchStore(database, store)
    wanted = [Line(f"l{index}", {}) for index in range(7)]
    old = all_batches.create("ada", "file-1", {}, wanted)
    output = library.add_file("ada", "batch_output", "o", "asset:a", 1)
    other = library.add_file("ada", "batch_output", "o", "asset:b", 1)
    with database.write() as write:
        done = update(batches).values(completed_at=write.now, output_file=output.id)
        write.connection.execute(done)
    waits = all_batches.create("ada", "file-1", {}, wanted)
    clock.turn(31 * DAY)
    assert delete_old_rows(database, settings) == {"batches": 9}
    assert all_batches.list("ada", after=None, limit=9) == (
        [all_batches.get(waits.id, "ada")],
        False,
    )
    assert library.files("ada", purpose=None, after=None, limit=9, newest_first=True) == (
        [other],
        False,
    )
    assert count(database, batch_lines) == 7
    assert old.id != waits.id


def test_no_transaction_deletes_more_than_a_bounded_number(
    database, store, leases, settings, clock, monkeypatch
):
    monkeypatch.setattr(retention, "ROWS", 20)
    wrong = failed(store, leases)
    with database.write() as write:
        for _ in range(90):
            record_event(write, wrong, "progress")
    kept = Settings(data=settings.data, keep_event_seconds=0)
    clock.turn(31 * DAY)
    commits, largest = [], [0]
    event.listen(database.engine, "commit", commits.append)
    event.listen(
        database.engine,
        "after_cursor_execute",
        lambda *arguments: largest.append(max(0, arguments[1].rowcount)),
    )
    assert delete_old_rows(database, kept) == {"jobs": 94}
    assert max(largest) <= 20
    assert count(database, events) == count(database, jobs) == 0


def test_one_call_runs_a_bounded_number_of_transactions(
    database, store, settings, clock, monkeypatch
):
    monkeypatch.setattr(retention, "ROWS", 10)
    monkeypatch.setattr(retention, "ROUNDS", 2)
    job = store.submit({}, owner="ada")
    with database.write() as write:
        rows = [
            {"owner": "ada", "key": str(index), "fingerprint": "", "job": job.number}
            for index in range(50)
        ]
        write.connection.execute(
            insert(idempotency_keys), [{**row, "created_at": write.now} for row in rows]
        )
    clock.turn(2 * DAY)
    assert [delete_old_rows(database, settings).get("keys", 0) for _ in range(4)] == [20, 20, 10, 0]


@pytest.mark.parametrize("name", ["ended", "event", "delivery", "batch", "file"])
@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf")])
def test_an_invalid_retention_is_rejected(name, seconds, tmp_path):
    with pytest.raises(ConfigError, match=f"keep_{name}_seconds must be >= 0"):
        Settings(data=tmp_path, **{f"keep_{name}_seconds": seconds})


@pytest.mark.parametrize("seconds", [-1, 0, float("nan"), float("inf")])
def test_keep_seconds_must_be_positive(seconds, tmp_path):
    with pytest.raises(ConfigError, match="keep_seconds must be > 0"):
        Settings(data=tmp_path, keep_seconds=seconds)
