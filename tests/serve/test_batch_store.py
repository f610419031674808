"""Batches in the database: a tick and a look cost the same however long a batch is, and every line
is counted once."""

import json

import pytest
from sqlalchemy import func, select

from skyloom.core.errors import RequestError
from skyloom.serve.queue.batches import LINES_PER_TICK, BatchActions, BatchStore, Line
from skyloom.serve.queue.job import end_attempt
from skyloom.serve.queue.jobs import JobFailure, JobResult
from skyloom.serve.queue.quotas import Quotas
from skyloom.serve.queue.tables import batch_jobs
from skyloom.serve.settings import Settings

from .conftest import load_beside

watched = load_beside("plans").watched
DONE = JobResult({"video": "asset:x"}, {})


class Desk:
    """Stands in for the API: submits jobs and keeps output files."""

    def __init__(self, store) -> None:
        self.store = store
        self.files: dict[str, bytes] = {}

    def submit(self, owner, body, key, deadline):
        """A job; a line that says so is wrong."""
        if "wrong" in body:
            raise RequestError("This line is wrong.")
        return self.store.submit(body, owner=owner, key=key, fingerprint="f", deadline=deadline)

    def write_file(self, _owner, name, content):
        """Keep an output file under its name."""
        self.files[name] = content
        return name[:60]

    def actions(self, submit=None) -> BatchActions:
        """The callbacks of `advance`."""
        return BatchActions(
            submit or self.submit,
            self.write_file,
            lambda job: {"id": job.id, "status": job.status},
            lambda error, _id: {"status": 400, "code": "invalid_value", "message": str(error)},
        )

    def lines(self, batch, name):
        """The lines of an output file."""
        return [json.loads(line) for line in self.files[f"{batch.id}_{name}.jsonl"].splitlines()]

    def tick(self, batches) -> None:
        """Run one maintenance tick."""
        batches.advance(self.actions())


@pytest.fixture
def batches(database, store) -> BatchStore:
    """The batches beside the queue."""
    return BatchStore(database, store, Quotas(Settings(max_batches_per_owner=0)))


@pytest.fixture
def desk(store) -> Desk:
    """The server beside them."""
    return Desk(store)


def wishes(count: int, **more) -> list[Line]:
    """Lines of a file."""
    return [Line(f"l{index}", {"prompt": f"cat {index}", **more}) for index in range(count)]


def outstanding(database) -> int:
    """Jobs of batches that are not counted yet."""
    with database.read() as connection:
        return connection.execute(select(func.count()).select_from(batch_jobs)).scalar_one()


def make_all(leases, desk, batches) -> None:
    """Work and tick until nothing waits."""
    while True:
        desk.tick(batches)
        lease = leases.lease("w")
        if lease is None:
            return
        leases.finish(lease, DONE)


def test_a_tick_and_a_look_cost_the_same_for_10_and_for_10_000_lines(
    database, store, batches, desk
):
    """As many lines as there is room for have been submitted, and the rest waits."""
    costs = []
    for count in (10, 10_000):
        made = [batches.create("ada", "file-1", {}, wishes(count)) for _ in range(5)]
        desk.tick(batches)
        desk.tick(batches)
        with watched() as tick:
            desk.tick(batches)
        with watched() as look:
            page, more = batches.list("ada", after=None, limit=100)
        assert (len(page), more, len(look.statements)) == (5, False, 1)
        assert [one.total for one in page] == [count] * 5
        assert not [scan for scan in tick.scans + look.scans if "batch_jobs" not in scan]
        costs.append((len(tick.statements), tick.work, look.work))
        for one in made:
            batches.cancel(one.id, "ada")
        desk.tick(batches)
        desk.tick(batches)
        assert {batches.get(one.id, "ada").status for one in made} == {"cancelled"}
        for job in list(store.walk()):
            store.delete(job.id)
        with database.write() as write:
            write.connection.exec_driver_sql("DELETE FROM batches")
    (statements, ticked, looked), (more_statements, more_ticked, more_looked) = costs
    assert more_statements == statements
    assert more_ticked <= ticked * 1.05 + 20
    assert more_looked <= looked * 1.05 + 20


def test_lines_are_submitted_in_order_as_there_is_room_and_counted_once(
    database, leases, batches, desk
):
    batch = batches.create("ada", "file-1", {}, wishes(11))
    desk.tick(batches)
    assert (
        batches.get(batch.id, "ada").next_line == outstanding(database) == 4
    )  # the room of an owner
    leases.finish(leases.lease("w"), DONE)
    leases.fail(leases.lease("w"), JobFailure("internal", "wrong"))
    desk.tick(batches)
    seen = batches.get(batch.id, "ada")
    assert (seen.completed, seen.failed, seen.next_line, seen.status) == (1, 1, 6, "in_progress")
    make_all(leases, desk, batches)
    seen = batches.get(batch.id, "ada")
    assert (seen.completed, seen.failed, seen.status, outstanding(database)) == (
        10,
        1,
        "completed",
        0,
    )
    assert [row["custom_id"] for row in desk.lines(batch, "output")] == [
        f"l{index}" for index in range(11)
    ]


def test_wrong_and_deleted_lines_fail_alone(leases, store, batches, desk):
    lines = [*wishes(2), Line("bad", {"wrong": True}), *wishes(1)]
    batch = batches.create(
        "ada", "file-1", {}, [Line(f"{index}", line.body) for index, line in enumerate(lines)]
    )
    desk.tick(batches)
    store.delete(next(store.walk()).id)
    make_all(leases, desk, batches)
    seen = batches.get(batch.id, "ada")
    assert (seen.total, seen.completed, seen.failed, seen.status) == (4, 2, 2, "completed")
    responses = {row["custom_id"]: row["response"] for row in desk.lines(batch, "error")}
    assert {id: one["status_code"] for id, one in responses.items()} == {"2": 400, "3": 404}


def test_a_cancel_stops_what_runs_and_what_has_not_begun(leases, store, batches, desk):
    batch = batches.create("ada", "file-1", {}, wishes(10))
    desk.tick(batches)
    lease = leases.lease("w")
    seen = batches.cancel(batch.id, "ada")
    assert (seen.status, seen.failed, seen.next_line) == ("cancelling", 6, 10)
    desk.tick(batches)
    assert batches.get(batch.id, "ada").status == "cancelling"  # one still runs
    assert leases.release(lease).status == "cancelled"
    desk.tick(batches)
    seen = batches.get(batch.id, "ada")
    assert (seen.status, seen.completed, seen.failed) == ("cancelled", 0, 10)
    codes = [row["response"]["body"]["error"]["code"] for row in desk.lines(batch, "error")]
    assert codes == ["batch_cancelled"] * 6
    assert store.counts().by_status == {"cancelled": 4}
    assert batches.cancel(batch.id, "ada") == seen


def test_a_job_that_was_submitted_while_its_batch_was_cancelled_is_cancelled_too(
    leases, store, batches, desk
):
    batch = batches.create("ada", "file-1", {}, wishes(2))

    def submit(owner, body, key, deadline):
        job = desk.submit(owner, body, key, deadline)
        batches.cancel(batch.id, "ada")
        return job

    batches.advance(desk.actions(submit))
    make_all(leases, desk, batches)
    seen = batches.get(batch.id, "ada")
    assert (seen.status, seen.completed, seen.failed) == ("cancelled", 0, 2)
    assert not {"queued", "completed"} & set(store.counts().by_status)


def test_an_expired_batch_ends(leases, batches, desk, clock):
    batch = batches.create("ada", "file-1", {}, wishes(6))
    desk.tick(batches)
    clock.turn(24 * 3600 + 1)
    leases.expire()
    for _ in range(2):
        desk.tick(batches)
    seen = batches.get(batch.id, "ada")
    assert (seen.status, seen.completed, seen.failed) == ("completed", 0, 6)
    codes = [row["response"]["body"]["error"]["code"] for row in desk.lines(batch, "error")]
    assert codes == ["batch_expired"] * 2


def test_two_servers_submit_no_line_twice(database, leases, store, batches, desk):
    batch = batches.create("ada", "file-1", {}, wishes(3))
    other = BatchStore(database, store)

    def slow(owner, body, key, deadline):
        job = desk.submit(owner, body, key, deadline)
        desk.tick(other)  # the other one does it all meanwhile
        return job

    batches.advance(desk.actions(slow))
    assert store.counts().by_status == {"queued": 3}
    make_all(leases, desk, batches)
    seen = batches.get(batch.id, "ada")
    assert (seen.completed, seen.failed, seen.status) == (3, 0, "completed")


def test_owners_have_their_ticks_side_by_side(leases, store, batches, desk):
    for _ in range(3):
        batches.create("ada", "file-1", {}, wishes(LINES_PER_TICK))
    mine = batches.create("bob", "file-1", {}, wishes(1))
    desk.tick(batches)
    assert batches.get(mine.id, "bob").next_line == 1
    with store.database.write() as write:
        end_attempt(write, store.get(next(store.walk("bob")).id), "completed")
    desk.tick(batches)
    assert batches.get(mine.id, "bob").status == "completed"


def test_a_page_is_bounded_whatever_is_asked(batches):
    for _ in range(103):
        batches.create("ada", "file-1", {}, wishes(1))
    for limit, size in ((1_999_999, 100), (100, 100), (-1, 0), (0, 0)):
        page, more = batches.list("ada", after=None, limit=limit)
        assert (len(page), more) == (size, True)
