"""What a cluster is asked for, on a plane without Ray: how many workers, where, and what is let go first."""

import sys
from dataclasses import replace

import pytest
from skyloom.serve.workers.cluster import (
    Keeper,
    Node,
    Orders,
    Wish,
    bring_up,
    environment_of,
    is_local,
    report,
    take_down,
)

from skyloom.core.errors import CapacityError, ConfigError
from skyloom.serve.queue.leases import Hand
from skyloom.serve.settings import Settings

FAR = Settings(database_url="postgresql://ada:secret@db/jobs", storage_url="s3://videos")
ONE = Node("n0", "alpha", "10.0.0.1", 8, 2, 8, 2)
TWO = Node("n1", "beta", "10.0.0.2", 8, 0, 3, 0)


class Board:
    """A plane where a keeper is a row, and its worker is in the database as soon as it is placed, unless `dead`."""

    def __init__(self, *nodes: Node, dead: bool = False) -> None:
        self.there, self.rows, self.dead = nodes, {}, dead
        self.orders: dict[str, Orders] = {}
        self.told: list[tuple[str, object]] = []

    def nodes(self):
        """Those that live."""
        return self.there

    def keepers(self):
        """All rows."""
        return self.rows

    def place(self, name, orders, node):
        """A row on the first node."""
        self.told.append((name, node))
        self.orders[name] = orders
        self.rows[name] = Keeper(
            orders.stamp, orders.cpus, orders.gpus, "n0", "alpha", f"w-{name}", 7, True, 0
        )

    def dismiss(self, names):
        """No row."""
        self.told.append(("dismiss", sorted(names)))
        self.rows = {name: row for name, row in self.rows.items() if name not in names}

    def hands(self):
        """What the database says of workers."""
        return (
            {} if self.dead else {f"w-{name}": Hand("cpu", 5.0, None, None) for name in self.rows}
        )

    def up(self, wish: Wish, settings: Settings = FAR, **more) -> list[tuple[str, object]]:
        """Bring up a wish; what was done."""
        self.told.clear()
        bring_up(self, settings, wish, self.hands, **more)
        return list(self.told)


@pytest.mark.parametrize(
    ("wish", "nodes", "settled"),
    [
        (Wish(), [ONE, TWO], (2, 1.0)),
        (Wish(), [TWO], (1, 0.0)),
        (Wish("per-gpu", gpus=0.5), [ONE, TWO], (4, 0.5)),
        (Wish("per-gpu", gpus=0.4), [ONE, TWO], (4, 0.4)),
        (Wish("per-gpu", gpus=2.0), [ONE, ONE], (2, 2.0)),
        (Wish(3), [ONE, TWO], (3, 1.0)),
        (Wish(3, gpus=0.0), [ONE], (3, 0.0)),
        (Wish(3), [TWO], (3, 0.0)),
    ],
)
def test_a_wish_comes_to_a_number_and_a_share(wish, nodes, settled):
    assert wish.settle(nodes) == settled


def test_parts_of_several_gpus_are_not_wished_for():
    with pytest.raises(ConfigError, match="cannot be shared out"):
        Wish("per-gpu", gpus=1.5).settle([ONE])


@pytest.mark.parametrize("wish", [Wish("per-gpu"), Wish(gpus=1.0), Wish("per-gpu", gpus=0.0)])
def test_gpus_that_are_not_there_are_not_wished_for(wish):
    with pytest.raises(ConfigError, match="no GPU"):
        wish.settle([TWO])


def test_what_is_missing_is_placed_and_what_is_too_much_goes():
    board = Board(ONE, TWO)
    assert board.up(Wish(3, gpus=0.0)) == [(f"skyloom-worker-{index}", None) for index in range(3)]
    assert board.up(Wish(3, gpus=0.0)) == []
    assert board.up(Wish(2, gpus=0.0)) == [("dismiss", ["skyloom-worker-2"])]
    del board.rows["skyloom-worker-0"]
    assert board.up(Wish(2, gpus=0.0)) == [("skyloom-worker-0", None)]
    assert take_down(board) == 2
    assert take_down(board) == 0
    assert board.rows == {}


def test_workers_with_other_orders_are_replaced(monkeypatch):
    board = Board(ONE, TWO)
    board.up(Wish(2, gpus=0.0))
    both = ["skyloom-worker-0", "skyloom-worker-1"]
    again = [("dismiss", both), *[(name, None) for name in both]]
    assert board.up(Wish(2, cpus=0.5, gpus=0.0)) == again
    assert (
        board.up(
            Wish(2, cpus=0.5, gpus=0.0), replace(FAR, database_url="postgresql://ada:new@db/jobs")
        )
        == again
    )
    monkeypatch.setattr("skyloom.serve.workers.cluster.__version__", "next")
    assert (
        board.up(
            Wish(2, cpus=0.5, gpus=0.0), replace(FAR, database_url="postgresql://ada:new@db/jobs")
        )
        == again
    )


def test_one_that_does_not_answer_is_replaced():
    board = Board(ONE)
    board.up(Wish(1, gpus=0.0))
    board.rows["skyloom-worker-0"] = None
    assert board.up(Wish(1, gpus=0.0)) == [
        ("dismiss", ["skyloom-worker-0"]),
        ("skyloom-worker-0", None),
    ]


def test_without_room_nothing_is_touched():
    board = Board(ONE, TWO)
    board.up(Wish(2, cpus=2, gpus=0.0))
    before = dict(board.rows)
    board.there = (
        replace(ONE, free_cpus=4),
        TWO,
    )  # and four more once the two of other orders have gone
    with pytest.raises(
        CapacityError, match="12 more workers of 1 CPUs and 0 GPUs are wished, 11 fit"
    ) as raised:
        board.up(Wish(12, gpus=0.0))
    assert "--cpus" in str(raised.value)
    assert board.rows == before
    assert len(board.up(Wish(11, gpus=0.0))) == 12


@pytest.mark.parametrize(
    ("settings", "local"),
    [
        (FAR, None),
        (Settings(storage_url="s3://videos"), "database"),
        (replace(FAR, database_url="postgresql:///jobs?host=/run/postgresql"), "database"),
        (replace(FAR, database_url="postgresql://ada@localhost/jobs"), "database"),
        (replace(FAR, database_url="postgresql://ada@127.0.0.1:5432/jobs"), "database"),
        (replace(FAR, storage_url="/srv/videos"), "storage"),
        (replace(FAR, storage_url="file:///srv/videos"), "storage"),
    ],
)
def test_several_hosts_need_what_all_can_reach(settings, local):
    assert is_local(settings) == local
    board = Board(ONE, TWO)
    if local:
        with pytest.raises(ConfigError, match=f"the {local} is on this one only") as raised:
            board.up(Wish(1), settings)
        assert "postgresql://user@host/name" in str(raised.value)
        assert board.rows == {}
        assert Board(ONE).up(Wish(1), settings) == [("skyloom-worker-0", "n0")], (
            "pinned to the only host"
        )
    else:
        assert board.up(Wish(1), settings) == [("skyloom-worker-0", None)]


def test_a_worker_that_does_not_come_up_is_an_error_that_says_where():
    with pytest.raises(CapacityError, match=r"2 of 2 workers were not seen .* \(on alpha\)"):
        Board(ONE, dead=True).up(Wish(2), wait=0.0)


def test_secrets_go_by_environment_and_show_nowhere(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "key-of-the-store")
    monkeypatch.setenv("PGPASSWORD", "word-of-the-base")
    monkeypatch.setenv("HOME_OF_OTHERS", "no")
    told = environment_of(FAR, data=False)
    assert told["SKYLOOM_DATABASE_URL"] == FAR.database_url
    assert (told["AWS_SECRET_ACCESS_KEY"], told["PGPASSWORD"]) == (
        "key-of-the-store",
        "word-of-the-base",
    )
    assert not {"SKYLOOM_DATA", "HOME_OF_OTHERS"} & set(told)
    assert environment_of(FAR, data=True)["SKYLOOM_DATA"]
    shown = repr(Orders(1, 0, told)) + Orders(1, 0, told).stamp
    assert not [secret for secret in ("secret", "key-of", "word-of") if secret in shown]


def test_a_report_joins_the_plane_with_the_database():
    board = Board(ONE)
    board.up(Wish(4, gpus=0.0))
    board.rows["skyloom-worker-3"] = None
    hands = {
        "w-skyloom-worker-0": Hand("cuda:0", 5.0, "video_1", 6.0),
        "w-skyloom-worker-1": Hand("cuda:0", 5.0, None, None),
    }
    told = report(board, hands)
    assert [node["host"] for node in told["nodes"]] == ["alpha"]
    assert [(row["state"], row["host"], row["job"]) for row in told["workers"]] == [
        ("working", "alpha", "video_1"), ("idle", "alpha", None), ("starting", "alpha", None), ("lost", None, None)
    ]  # fmt: skip


def test_hands_are_what_the_database_says(leases, store, clock):
    assert leases.hands() == {}
    leases.greet("w1", "cpu")
    job = store.submit({"prompt": "x"}, owner="ada")
    assert leases.hands() == {"w1": Hand("cpu", clock.now, None, None)}
    clock.turn(3)
    leases.lease("w1")
    assert leases.hands() == {"w1": Hand("cpu", clock.now - 3, job.id, clock.now)}


@pytest.mark.parametrize("verb", ["up", "status", "down"])
def test_without_ray_one_sentence_says_what_to_install(verb, tmp_path, monkeypatch, capsys):
    from skyloom.cli.app import main

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit) as stop:
        main(["cluster", verb, "--data", str(tmp_path)])
    assert (stop.value.code, capsys.readouterr().err) == (
        2, "skyloom: A cluster needs Ray. Run pip install 'skyloom[ray]'.\n"
    )  # fmt: skip
    assert not (tmp_path / "cluster.json").exists()
