"""Scaling of a cluster's workers, on a backend without Ray: number, placement and replacement."""

import sys
from dataclasses import replace

import pytest

from skyloom.cli.cluster import wait_for_workers, worker_rows
from skyloom.core.errors import CapacityError, ConfigError
from skyloom.serve.queue.leases import WorkerInfo
from skyloom.serve.settings import Settings
from skyloom.serve.workers.processes import remote_environment
from skyloom.serve.workers.ray_backend import (
    ActorStatus,
    Node,
    WorkerSpec,
    resolve_target,
    scale,
)

REMOTE = Settings(database_url="postgresql://ada:secret@db/jobs", storage_url="s3://videos")
GPU_NODE = Node("n0", "alpha", "10.0.0.1", 8, 2)
CPU_NODE = Node("n1", "beta", "10.0.0.2", 8, 0)
BOTH = [GPU_NODE, CPU_NODE]


class FakeBackend:
    """A cluster in memory: an actor runs as soon as it is started."""

    def __init__(self, *nodes: Node) -> None:
        self.node_list = list(nodes)
        self.rows: dict[str, ActorStatus | None] = {}
        self.calls: list[tuple[str, object]] = []

    def nodes(self):
        return self.node_list

    def actors(self):
        return self.rows

    def start(self, name, spec, node):
        self.calls.append((name, node))
        self.rows[name] = ActorStatus(spec.digest, "alpha", f"w-{name}", pid=7, restarts=0)

    def stop(self, names):
        self.calls.append(("stop", sorted(names)))
        self.rows = {name: row for name, row in self.rows.items() if name not in names}

    def scale(self, count: int, settings: Settings = REMOTE, cpus: float = 1.0):
        """Scale to `count` workers; the backend calls that this made."""
        self.calls.clear()
        environment = remote_environment(settings, with_data=False)
        scale(self, settings, WorkerSpec(cpus, 0.0, environment), count)
        return list(self.calls)


class FakeLeases:
    """The workers in the database."""

    def __init__(self, *names: str) -> None:
        self.workers = {name: WorkerInfo("cpu", 5.0, None, None) for name in names}

    def list_workers(self):
        return self.workers


@pytest.mark.parametrize(
    ("count", "cpus", "gpus", "nodes", "expected"),
    [
        (None, 1, None, BOTH, (2, 1.0)),
        (None, 1, None, [CPU_NODE], (1, 0.0)),
        ("per-gpu", 1, 0.5, BOTH, (4, 0.5)),
        ("per-gpu", 1, 0.4, BOTH, (4, 0.4)),
        ("per-gpu", 1, 2.0, [GPU_NODE, GPU_NODE], (2, 2.0)),
        (2, 1, None, BOTH, (2, 1.0)),
        (3, 1, 0.0, [GPU_NODE], (3, 0.0)),
        (3, 1, None, [CPU_NODE], (3, 0.0)),
        (16, 1, 0.0, BOTH, (16, 0.0)),
        (5, 0, 0.0, BOTH, (5, 0.0)),
    ],
)
def test_a_target_is_resolved_to_a_number_and_gpus(count, cpus, gpus, nodes, expected):
    assert resolve_target(nodes, count, cpus, gpus) == expected


@pytest.mark.parametrize(
    ("count", "cpus", "gpus", "room"),
    [
        (17, 1, 0.0, 16),
        (3, 4.0, 1.0, 2),
        (5, 1, 0.5, 4),
        (9, 2, 0.0, 8),
    ],
)
def test_more_workers_than_fit_on_the_nodes_are_refused(count, cpus, gpus, room):
    with pytest.raises(CapacityError, match=f"only {room} fit") as raised:
        resolve_target(BOTH, count, cpus, gpus)
    assert "--cpus" in str(raised.value)


@pytest.mark.parametrize(("count", "gpus"), [("per-gpu", None), (None, 1.0), ("per-gpu", 0.5)])
def test_gpus_that_the_cluster_lacks_are_refused(count, gpus):
    with pytest.raises(CapacityError, match="only 0 fit"):
        resolve_target([CPU_NODE], count, 1, gpus)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "1.5"], "--gpus must be at most 1 or a whole number, got 1.5."),
        (["--workers", "per-gpu", "--gpus", "0"], "--workers per-gpu needs --gpus > 0."),
        (["--workers", "0"], "--workers must be 1 to 10000 or per-gpu, got 0."),
        (["--workers", "many"], "--workers must be 1 to 10000 or per-gpu, got many."),
    ],
)
def test_wrong_options_are_refused_before_a_connection(options, message, tmp_path, capsys):
    from skyloom.cli.app import main

    with pytest.raises(SystemExit) as stop:
        main(["cluster", "up", *options, "--data", str(tmp_path)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_workers_are_started_and_surplus_ones_stopped():
    backend = FakeBackend(*BOTH)
    assert backend.scale(3) == [(f"skyloom-worker-{index}", None) for index in range(3)]
    assert backend.scale(3) == []
    assert backend.scale(2) == [("stop", ["skyloom-worker-2"])]
    del backend.rows["skyloom-worker-0"]
    assert backend.scale(2) == [("skyloom-worker-0", None)]


def test_workers_with_another_spec_or_version_are_replaced(monkeypatch):
    backend = FakeBackend(*BOTH)
    backend.scale(2)
    names = ["skyloom-worker-0", "skyloom-worker-1"]
    replaced = [("stop", names), *[(name, None) for name in names]]
    assert backend.scale(2, cpus=0.5) == replaced
    other = replace(REMOTE, database_url="postgresql://ada:new@db/jobs")
    assert backend.scale(2, other, cpus=0.5) == replaced
    monkeypatch.setattr("skyloom.serve.workers.ray_backend.__version__", "next")
    assert backend.scale(2, other, cpus=0.5) == replaced


def test_an_actor_that_does_not_reply_is_replaced():
    backend = FakeBackend(GPU_NODE)
    backend.scale(1)
    backend.rows["skyloom-worker-0"] = None
    assert backend.scale(1) == [("stop", ["skyloom-worker-0"]), ("skyloom-worker-0", None)]


@pytest.mark.parametrize(
    ("settings", "local"),
    [
        (REMOTE, None),
        (Settings(storage_url="s3://videos"), "database"),
        (replace(REMOTE, database_url="postgresql:///jobs?host=/run/postgresql"), "database"),
        (replace(REMOTE, database_url="postgresql://ada@localhost/jobs"), "database"),
        (replace(REMOTE, database_url="postgresql://ada@127.0.0.1:5432/jobs"), "database"),
        (replace(REMOTE, storage_url="/srv/videos"), "storage"),
        (replace(REMOTE, storage_url="file:///srv/videos"), "storage"),
    ],
)
def test_several_hosts_need_a_database_and_a_storage_that_all_reach(settings, local):
    assert settings.local_only == local
    backend = FakeBackend(*BOTH)
    if local is None:
        assert backend.scale(1, settings) == [("skyloom-worker-0", None)]
        return
    with pytest.raises(ConfigError, match=f"The {local} must be reachable") as raised:
        backend.scale(1, settings)
    assert "postgresql://user@host/name" in str(raised.value)
    assert backend.rows == {}
    pinned = [("skyloom-worker-0", "n0")]
    assert FakeBackend(GPU_NODE).scale(1, settings) == pinned, "on the only node"


def test_a_worker_that_does_not_start_is_an_error_with_its_host():
    backend = FakeBackend(GPU_NODE)
    backend.scale(2)
    names = list(backend.rows)
    with pytest.raises(CapacityError, match=r"1 of 2 workers did not start .* \(on alpha\)"):
        wait_for_workers(backend, FakeLeases("w-skyloom-worker-0"), names, timeout=0.0)
    leases = FakeLeases("w-skyloom-worker-0", "w-skyloom-worker-1")
    wait_for_workers(backend, leases, names, timeout=0.0)


def test_secrets_are_forwarded_by_environment_and_never_shown(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "store-key")
    monkeypatch.setenv("PGPASSWORD", "database-password")
    monkeypatch.setenv("HOME_OF_OTHERS", "no")
    environment = remote_environment(REMOTE, with_data=False)
    assert environment["SKYLOOM_DATABASE_URL"] == REMOTE.database_url
    assert environment["AWS_SECRET_ACCESS_KEY"] == "store-key"
    assert environment["PGPASSWORD"] == "database-password"
    assert not {"SKYLOOM_DATA", "HOME_OF_OTHERS"} & set(environment)
    assert remote_environment(REMOTE, with_data=True)["SKYLOOM_DATA"]
    spec = WorkerSpec(1, 0, environment)
    shown = repr(spec) + spec.digest
    assert not [text for text in ("secret", "store-key", "database-password") if text in shown]


def test_status_joins_actors_with_the_database():
    backend = FakeBackend(GPU_NODE)
    backend.scale(4)
    backend.rows["skyloom-worker-3"] = None
    registered = {
        "w-skyloom-worker-0": WorkerInfo("cuda:0", 5.0, "video_1", 6.0),
        "w-skyloom-worker-1": WorkerInfo("cuda:0", 5.0, None, None),
    }
    rows = worker_rows(backend, registered)
    assert [(row["state"], row["host"], row["job"]) for row in rows] == [
        ("working", "alpha", "video_1"),
        ("idle", "alpha", None),
        ("starting", "alpha", None),
        ("lost", None, None),
    ]


def test_workers_in_the_database_are_listed_with_their_jobs(leases, store, clock):
    assert leases.list_workers() == {}
    leases.register_worker("w1", "cpu")
    job = store.submit({"prompt": "x"}, owner="ada")
    assert leases.list_workers() == {"w1": WorkerInfo("cpu", clock.now, None, None)}
    clock.turn(3)
    leases.lease("w1")
    assert leases.list_workers() == {"w1": WorkerInfo("cpu", clock.now - 3, job.id, clock.now)}


@pytest.mark.parametrize("verb", ["up", "status", "down"])
def test_without_ray_the_error_names_the_package_to_install(verb, tmp_path, monkeypatch, capsys):
    from skyloom.cli.app import main

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit) as stop:
        main(["cluster", verb, "--data", str(tmp_path)])
    assert stop.value.code == 2
    message = "skyloom: A cluster needs Ray. Run pip install 'skyloom[ray]'.\n"
    assert capsys.readouterr().err == message
