"""Queues on both databases, a clock that tests turn, and the programs beside these tests as
modules."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from skyloom.serve.queue.database import Database
from skyloom.serve.queue.jobs import JobStore
from skyloom.serve.queue.leases import Leases
from skyloom.serve.settings import Settings

HERE = Path(__file__).parent


def load_beside(name: str) -> ModuleType:
    """A program of this folder, as a module."""
    place = importlib.util.spec_from_file_location(f"serve_{name}", HERE / f"{name}.py")
    assert place
    assert place.loader
    module = importlib.util.module_from_spec(place)
    sys.modules[place.name] = module
    place.loader.exec_module(module)
    return module


class Clock:
    """A clock that stands until it is turned."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now

    def turn(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    """The queue's clock."""
    return Clock()


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A Postgres that the tests have started."""
    postgres = load_beside("postgres")
    if reason := postgres.why_not():
        pytest.skip(reason)
    with postgres.running() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request, tmp_path) -> str:
    """An empty database of either kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'jobs.db'}"
    url = request.getfixturevalue("postgres_url")
    psycopg = importlib.import_module("psycopg")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    return url


@pytest.fixture
def database(database_url, clock) -> Iterator[Database]:
    """The database, with the tests' clock."""
    database = Database(database_url, clock)
    yield database
    database.close()


@pytest.fixture
def settings(tmp_path) -> Settings:
    """Small bounds."""
    return Settings(data=tmp_path, max_queued=8, max_queued_per_owner=4, max_attempts=3)


@pytest.fixture
def store(database, settings) -> JobStore:
    """The clients' side."""
    return JobStore(database, settings)


@pytest.fixture
def leases(database, settings) -> Leases:
    """The workers' side."""
    return Leases(database, settings)
