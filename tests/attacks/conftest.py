"""Fixtures: one real server for all attacks, with clients of the attacker and of other owners."""

import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import attack_cases
import attack_server

MAX_QUEUED = 1_000_000


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Allow connections to this machine only."""
    connect = socket.socket.connect

    def reach(self, address):
        assert str(address[0]).startswith("127."), f"a test tried to reach {address}"
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", reach)


@dataclass(frozen=True)
class Stand:
    """The server and its clients; `third` has no queued jobs."""

    data: Path
    server: Any
    attacker: attack_cases.Client
    other: attack_cases.Client
    third: attack_cases.Client


@pytest.fixture(scope="session")
def stand(tmp_path_factory) -> Iterator[Stand]:
    """Run a server for the whole session; stop it at the end if no test did."""
    data = tmp_path_factory.mktemp("attacked")
    limits = {"max_queued": MAX_QUEUED, "max_queued_per_owner": MAX_QUEUED, "disk_reserve": 0}
    limits |= {
        "webhooks_to_loopback": "true",
        "stall_seconds": 3,
        "max_attempts": 2,
        "max_queued_cost_per_owner": 0,
    }
    server = attack_server.start(data, held=True, **limits)
    keys = [attack_server.make_key(data, owner) for owner in ("mallory", "alice", "bob")]
    clients = [attack_cases.Client(server.url, key) for key in keys]
    try:
        yield Stand(data, server, *clients)
    finally:
        (data / attack_server.HELD).unlink(missing_ok=True)
        if server.process.poll() is None:
            server.stop()
        server.process.stdout.close()
