"""Deliveries in turns: one owner's tarpit holds up nobody else, a stop waits for nobody, nothing is lost."""

import json
import threading

import pytest
from sqlalchemy.exc import OperationalError

from skyloom.serve.queue.database import Database
from skyloom.serve.queue.job import announce
from skyloom.serve.queue.slots import Slots
from skyloom.serve.queue.tables import deliveries
from skyloom.serve.queue.webhook_delivery import GIVE_UP_SECONDS, PAUSE_AFTER, PER_OWNER, Courier
from skyloom.serve.queue.webhooks import EVENT_TYPES, EndpointStore

PATIENCE = 60  # seconds; only a test that fails takes them


class Outside:
    """Endpoints by URL: a "tarpit" does not answer before it is let go, a "dead" one not before all are alive."""

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
def courier_to(database, outside):
    """Makes couriers; in the end all is let go of, so that none uses a database that is closed."""
    made = []

    def make(post=outside, **limits) -> Courier:
        made.append(Courier(database, post, **limits))
        return made[-1]

    yield make
    outside.open.set()
    for courier in made:
        if courier._thread.ident is not None:
            courier.stop()
        assert courier.settle(PATIENCE)


def endpoint(database: Database, owner: str, name: str) -> str:
    """A new endpoint of an owner."""
    return (
        EndpointStore(database)
        .add(owner, name, f"https://{owner}.example.org/{name}", EVENT_TYPES)
        .id
    )


def tell(database: Database, owner: str, events: int = 1) -> None:
    """Something for all endpoints of an owner."""
    for index in range(events):
        with database.write() as write:
            announce(write, owner, "video.completed", f"video_{owner}_{index}")


def rows(database: Database) -> list:
    """All deliveries."""
    with database.read() as connection:
        return connection.execute(deliveries.select().order_by(deliveries.c.number)).all()


def test_a_tarpit_holds_up_nobody_else(database, outside, courier_to):
    for name in ("tarpit1", "tarpit2", "tarpit3"):
        endpoint(database, "eve", name)
    endpoint(database, "ada", "good")
    tell(database, "eve", 20)
    tell(database, "ada", 5)
    courier = courier_to(total=4)
    courier.start()
    outside.wait_for(lambda: outside.sent.count("https://ada.example.org/good") == 5)
    assert sum("eve" in url for url in outside.sent) == PER_OWNER
    courier.stop()


def test_her_own_good_endpoint_is_not_held_up_by_one_tarpit(database, outside, courier_to):
    endpoint(database, "ada", "tarpit")
    endpoint(database, "ada", "good")
    tell(database, "ada", 5)
    courier = courier_to()
    courier.start()
    outside.wait_for(lambda: outside.sent.count("https://ada.example.org/good") == 5)
    assert outside.sent.count("https://ada.example.org/tarpit") == 1
    courier.stop()


def test_owners_take_turns_however_much_waits_and_however_old_it_is(
    database, outside, courier_to, clock
):
    for owner, events in (("ada", 6), ("bob", 2), ("cy", 1)):
        endpoint(database, owner, "good")
        tell(database, owner, events)
        clock.turn(1)
    courier = courier_to(total=1)
    while courier.start_due():
        assert courier.settle(PATIENCE)
    order = "".join(url.removeprefix("https://")[0] for url in outside.sent)
    assert order == "abcabaaaa"


def test_many_owners_with_tarpits_do_not_keep_the_slots(database, outside, courier_to, clock):
    """With all slots full of tarpits, the one that comes free is for who has nothing in hand."""
    for index in range(4):
        for name in ("tarpit1", "tarpit2"):
            endpoint(database, f"eve{index}", name)
        tell(database, f"eve{index}", 10)
    clock.turn(1)
    endpoint(database, "ada", "good")
    tell(database, "ada")
    courier = courier_to(total=4)
    courier.start_due()
    assert sorted(url.split(".")[0] for url in outside.sent[:4]) == [
        f"https://eve{index}" for index in range(4)
    ]
    outside.open.set()
    assert courier.settle(PATIENCE)
    courier.start_due()
    assert courier.settle(PATIENCE)
    assert "https://ada.example.org/good" in outside.sent[:8]


def test_a_stop_waits_for_no_delivery_and_it_is_sent_again_under_its_id(
    database, outside, courier_to, clock
):
    endpoint(database, "ada", "tarpit")
    tell(database, "ada")
    courier = courier_to()
    courier.start()
    outside.wait_for(lambda: outside.sent)
    stopped = threading.Thread(target=courier.stop, daemon=True)
    stopped.start()
    stopped.join(PATIENCE)
    assert not stopped.is_alive()
    assert not courier.settle(0), "it still hangs"
    assert rows(database)[0].next_at is not None
    again = Outside()
    again.open.set()
    other = courier_to(again)
    assert other.start_due() == 0, "another process may still be at it"
    clock.turn(61)
    assert other.start_due() == 1
    assert other.settle(PATIENCE)
    assert again.ids == outside.ids
    assert rows(database)[0].next_at is None


def test_two_processes_send_each_once(database, outside, courier_to):
    endpoint(database, "ada", "good")
    endpoint(database, "bob", "good")
    tell(database, "ada", 10)
    tell(database, "bob", 10)
    couriers = [courier_to() for _ in range(2)]
    for courier in couriers:
        courier.start()
    outside.wait_for(lambda: len(outside.sent) == 20)
    for courier in couriers:
        courier.stop()
        assert courier.settle(PATIENCE)
    assert len(set(outside.ids)) == len(outside.ids) == 20


def test_what_waits_for_an_endpoint_that_fails_is_put_off(database, outside, courier_to, clock):
    endpoint(database, "ada", "dead")
    tell(database, "ada", PAUSE_AFTER + 20)
    courier = courier_to()
    while courier.start_due():
        assert courier.settle(PATIENCE)
    assert len(outside.sent) == PAUSE_AFTER
    clock.turn(61)
    while courier.start_due():
        assert courier.settle(PATIENCE)
    assert len(outside.sent) == PAUSE_AFTER + 1, "one call a pause"
    clock.turn(61)
    assert courier.start_due() == 0, "the pauses grow"
    clock.turn(60)
    outside.alive = True
    count = 0
    while courier.start_due():
        assert courier.settle(PATIENCE)
        count += 1
    assert count >= 20, "one that is heard ends the pause"


def test_after_three_days_nothing_is_tried_again_however_rarely_it_was(
    database, outside, courier_to, clock
):
    endpoint(database, "ada", "dead")
    tell(database, "ada")
    clock.turn(GIVE_UP_SECONDS)
    courier = courier_to()
    assert courier.start_due() == 1
    assert courier.settle(PATIENCE)
    assert [(row.attempts, row.next_at) for row in rows(database)] == [(1, None)]


def test_a_database_that_is_away_costs_no_slot(database, outside, courier_to, monkeypatch):
    endpoint(database, "ada", "good")
    tell(database, "ada")
    courier = courier_to(total=1)

    def away(*_):
        raise OperationalError("BEGIN", {}, Exception("gone"))

    with monkeypatch.context() as patch:
        patch.setattr(database, "write", away)
        for _ in range(3):
            with pytest.raises(OperationalError):
                courier.start_due()
    assert courier.start_due() == 1
    assert courier.settle(PATIENCE)
    assert json.loads(json.dumps(rows(database)[0].payload))["type"] == "video.completed"


def test_a_thread_that_cannot_begin_costs_no_slot(
    database, outside, courier_to, monkeypatch, clock
):
    endpoint(database, "ada", "good")
    tell(database, "ada")
    courier = courier_to(total=1)

    def none_left(self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        with pytest.raises(RuntimeError):
            courier.start_due()
    clock.turn(61)
    assert courier.start_due() == 1
    assert courier.settle(PATIENCE)


def test_slots_keep_no_row_for_who_has_nothing_in_hand():
    slots = Slots(2, 1)
    assert slots.take("ada", "x")
    assert not slots.take("ada", "y")
    assert not slots.take("bob", "x")
    assert slots.take("bob", "y")
    assert not slots.take("cy", "z")
    assert (slots.free, slots.things, slots.of_owner("ada"), slots.of_owner("cy")) == (
        0,
        ["x", "y"],
        1,
        0,
    )
    slots.give_back("ada", "x")
    slots.give_back("bob", "y")
    assert slots.settle(0)
    assert not slots._owners
