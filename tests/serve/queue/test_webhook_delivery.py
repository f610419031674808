"""Webhook delivery: fairness between owners, stopping, pauses and claims."""

import json
import threading

import pytest
from sqlalchemy.exc import OperationalError

from skyloom.serve.queue.database import Database
from skyloom.serve.queue.slots import Slots
from skyloom.serve.queue.tables import deliveries
from skyloom.serve.queue.webhook_delivery import (
    GIVE_UP_SECONDS,
    MAX_PER_OWNER,
    PAUSE_AFTER,
    WebhookSender,
)
from skyloom.serve.queue.webhooks import EVENT_TYPES, EndpointStore, enqueue_deliveries

PATIENCE = 60  # seconds; only a test that fails takes them


class Outside:
    """Endpoints by URL: a "tarpit" does not answer before it is let go, a "dead" one not before all
    are alive."""

    def __init__(self) -> None:
        self.sent, self.ids, self.open = [], [], threading.Event()
        self.begun, self.alive = threading.Condition(), False

    def __call__(self, url, headers, body) -> int:
        with self.begun:
            self.sent.append(url)
            self.ids.append(headers["webhook-id"])
            self.begun.notify_all()
        if "tarpit" in url:
            self.open.wait(PATIENCE)
        if "dead" in url and not self.alive:
            raise OSError("no route")
        return 200

    def wait_for(self, wanted) -> None:
        with self.begun:
            assert self.begun.wait_for(wanted, PATIENCE), self.sent


@pytest.fixture
def outside():
    """The other side."""
    return Outside()


@pytest.fixture
def make_sender(database, outside):
    """Makes senders; in the end all is let go of, so that none uses a database that is closed."""
    made = []

    def make(post=outside, **limits) -> WebhookSender:
        made.append(WebhookSender(database, post, **limits))
        return made[-1]

    yield make
    outside.open.set()
    for sender in made:
        if sender._thread.ident is not None:
            sender.stop()
        assert sender.wait_until_idle(PATIENCE)


def endpoint(database: Database, owner: str, name: str) -> str:
    """A new endpoint of an owner."""
    return (
        EndpointStore(database)
        .add(owner, name, f"https://{owner}.example.org/{name}", EVENT_TYPES)
        .id
    )


def add_deliveries(database: Database, owner: str, events: int = 1) -> None:
    """Add deliveries for all endpoints of an owner."""
    for index in range(events):
        with database.write() as write:
            enqueue_deliveries(write, owner, "video.completed", f"video_{owner}_{index}")


def rows(database: Database) -> list:
    """All deliveries."""
    with database.read() as connection:
        return connection.execute(deliveries.select().order_by(deliveries.c.number)).all()


def test_a_slow_endpoint_does_not_delay_other_owners(database, outside, make_sender):
    for name in ("tarpit1", "tarpit2", "tarpit3"):
        endpoint(database, "eve", name)
    endpoint(database, "ada", "good")
    add_deliveries(database, "eve", 20)
    add_deliveries(database, "ada", 5)
    sender = make_sender(total=4)
    sender.start()
    outside.wait_for(lambda: outside.sent.count("https://ada.example.org/good") == 5)
    assert sum("eve" in url for url in outside.sent) == MAX_PER_OWNER
    sender.stop()


def test_a_slow_endpoint_does_not_delay_the_owners_other_endpoint(database, outside, make_sender):
    endpoint(database, "ada", "tarpit")
    endpoint(database, "ada", "good")
    add_deliveries(database, "ada", 5)
    sender = make_sender()
    sender.start()
    outside.wait_for(lambda: outside.sent.count("https://ada.example.org/good") == 5)
    assert outside.sent.count("https://ada.example.org/tarpit") == 1
    sender.stop()


def test_owners_take_turns(database, outside, make_sender, clock):
    for owner, events in (("ada", 6), ("bob", 2), ("cy", 1)):
        endpoint(database, owner, "good")
        add_deliveries(database, owner, events)
        clock.turn(1)
    sender = make_sender(total=1)
    while sender.send_due():
        assert sender.wait_until_idle(PATIENCE)
    order = "".join(url.removeprefix("https://")[0] for url in outside.sent)
    assert order == "abcabaaaa"


def test_slow_endpoints_of_many_owners_do_not_keep_all_slots(database, outside, make_sender, clock):
    """With all slots full of tarpits, the one that comes free is for who has nothing in hand."""
    for index in range(4):
        for name in ("tarpit1", "tarpit2"):
            endpoint(database, f"eve{index}", name)
        add_deliveries(database, f"eve{index}", 10)
    clock.turn(1)
    endpoint(database, "ada", "good")
    add_deliveries(database, "ada")
    sender = make_sender(total=4)
    sender.send_due()
    assert sorted(url.split(".")[0] for url in outside.sent[:4]) == [
        f"https://eve{index}" for index in range(4)
    ]
    outside.open.set()
    assert sender.wait_until_idle(PATIENCE)
    sender.send_due()
    assert sender.wait_until_idle(PATIENCE)
    assert "https://ada.example.org/good" in outside.sent[:8]


def test_a_stop_does_not_wait_and_the_delivery_is_resent_under_its_id(
    database, outside, make_sender, clock
):
    endpoint(database, "ada", "tarpit")
    add_deliveries(database, "ada")
    sender = make_sender()
    sender.start()
    outside.wait_for(lambda: outside.sent)
    stopped = threading.Thread(target=sender.stop, daemon=True)
    stopped.start()
    stopped.join(PATIENCE)
    assert not stopped.is_alive()
    assert not sender.wait_until_idle(0), "it still hangs"
    assert rows(database)[0].next_at is not None
    again = Outside()
    again.open.set()
    other = make_sender(again)
    assert other.send_due() == 0, "another process may still be at it"
    clock.turn(61)
    assert other.send_due() == 1
    assert other.wait_until_idle(PATIENCE)
    assert again.ids == outside.ids
    assert rows(database)[0].next_at is None


def test_two_processes_send_each_once(database, outside, make_sender):
    endpoint(database, "ada", "good")
    endpoint(database, "bob", "good")
    add_deliveries(database, "ada", 10)
    add_deliveries(database, "bob", 10)
    senders = [make_sender() for _ in range(2)]
    for sender in senders:
        sender.start()
    outside.wait_for(lambda: len(outside.sent) == 20)
    for sender in senders:
        sender.stop()
        assert sender.wait_until_idle(PATIENCE)
    assert len(set(outside.ids)) == len(outside.ids) == 20


def test_deliveries_to_a_failing_endpoint_are_postponed(database, outside, make_sender, clock):
    endpoint(database, "ada", "dead")
    add_deliveries(database, "ada", PAUSE_AFTER + 20)
    sender = make_sender()
    while sender.send_due():
        assert sender.wait_until_idle(PATIENCE)
    assert len(outside.sent) == PAUSE_AFTER
    clock.turn(61)
    while sender.send_due():
        assert sender.wait_until_idle(PATIENCE)
    assert len(outside.sent) == PAUSE_AFTER + 1, "one call a pause"
    clock.turn(61)
    assert sender.send_due() == 0, "the pauses grow"
    clock.turn(60)
    outside.alive = True
    count = 0
    while sender.send_due():
        assert sender.wait_until_idle(PATIENCE)
        count += 1
    assert count >= 20, "one that is heard ends the pause"


def test_nothing_is_retried_after_three_days(database, outside, make_sender, clock):
    endpoint(database, "ada", "dead")
    add_deliveries(database, "ada")
    clock.turn(GIVE_UP_SECONDS)
    sender = make_sender()
    assert sender.send_due() == 1
    assert sender.wait_until_idle(PATIENCE)
    assert [(row.attempts, row.next_at) for row in rows(database)] == [(1, None)]


def test_an_unreachable_database_leaks_no_slot(database, outside, make_sender, monkeypatch):
    endpoint(database, "ada", "good")
    add_deliveries(database, "ada")
    sender = make_sender(total=1)

    def away(*_):
        raise OperationalError("BEGIN", {}, Exception("gone"))

    with monkeypatch.context() as patch:
        patch.setattr(database, "write", away)
        for _ in range(3):
            with pytest.raises(OperationalError):
                sender.send_due()
    assert sender.send_due() == 1
    assert sender.wait_until_idle(PATIENCE)
    assert json.loads(json.dumps(rows(database)[0].payload))["type"] == "video.completed"


def test_a_thread_that_cannot_start_leaks_no_slot(
    database, outside, make_sender, monkeypatch, clock
):
    endpoint(database, "ada", "good")
    add_deliveries(database, "ada")
    sender = make_sender(total=1)

    def none_left(self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        with pytest.raises(RuntimeError):
            sender.send_due()
    clock.turn(61)
    assert sender.send_due() == 1
    assert sender.wait_until_idle(PATIENCE)


def test_slots_keep_no_entry_for_an_idle_owner():
    slots = Slots(2, 1)
    assert slots.acquire("ada", "x")
    assert not slots.acquire("ada", "y")
    assert not slots.acquire("bob", "x")
    assert slots.acquire("bob", "y")
    assert not slots.acquire("cy", "z")
    assert (slots.free, slots.resources, slots.count("ada"), slots.count("cy")) == (
        0,
        ["x", "y"],
        1,
        0,
    )
    slots.release("ada", "x")
    slots.release("bob", "y")
    assert slots.wait_until_idle(0)
    assert not slots._owners
