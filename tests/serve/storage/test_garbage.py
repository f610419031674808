"""Garbage collection deletes recorded assets that are unreferenced long enough, nothing else."""

import logging
import os
import shutil
from contextlib import closing

import pytest

from skyloom.core.errors import CapacityError, ConfigError
from skyloom.serve.maintenance import garbage_collection_task
from skyloom.serve.queue.database import Database
from skyloom.serve.queue.jobs import JobStore, find_references
from skyloom.serve.settings import Settings
from skyloom.serve.storage import FolderStorage, ObjectStorage
from skyloom.serve.storage.garbage import DAY, SLACK_SECONDS, collect, preview, trash_key
from skyloom.serve.storage.installation import adopt_storage, check_installation, referenced_assets
from skyloom.serve.storage.inventory import Inventory

PROMPT = {"prompt": "a cat"}


class Place:
    """A database, a storage and a clock that tests set."""

    def __init__(self, storage, database: Database, settings: Settings, clock) -> None:
        self.storage = storage
        self.database = database
        self.settings = settings
        self.clock = clock
        self.inventory = Inventory(database)
        self.jobs = JobStore(database, settings)
        check_installation(self.inventory, storage, settings)
        storage.set_recorder(self.inventory.record)

    @property
    def id(self) -> str:
        """Installation id."""
        return self.inventory.identity().id

    def name(self, asset) -> str:
        """Submit a job that references an asset."""
        return self.jobs.submit({**PROMPT, "image": asset.reference}, owner="ada").id

    def sweep(self, days: float = 0.0):
        """Collect garbage after some days."""
        self.clock.turn(days * DAY)
        return collect(self.database, self.storage, self.settings)

    def keys(self) -> set[str]:
        """Keys of the assets outside the trash."""
        return {asset.key for asset, _ in self.storage.assets()}

    def trash(self) -> set[str]:
        """Keys of the assets in the trash."""
        prefix = f"trash/{self.id}/"
        return {asset.key for asset, _ in self.storage.assets(prefix)}


@pytest.fixture
def clock(clock):
    """Start later than the files, which have the machine's time."""
    clock.now = 4_000_000_000.0
    return clock


@pytest.fixture(params=["folder", "objects"])
def place(request, database, settings, clock, tmp_path) -> Place:
    """Every combination of storage and database."""
    storage = (
        FolderStorage(tmp_path / "assets")
        if request.param == "folder"
        else ObjectStorage("memory:///")
    )
    return Place(storage, database, settings, clock)


def test_unreferenced_assets_are_trashed_then_deleted(place, caplog):
    kept, gone = place.storage.put(b"kept", "bin"), place.storage.put(b"gone", "bin")
    place.name(kept)
    assert place.sweep().waiting == 1
    assert place.sweep(6.9).trashed == 0
    with caplog.at_level(logging.INFO):
        done = place.sweep(0.2)
    assert (done.trashed, done.trashed_bytes, done.deleted) == (1, 4, 0)
    assert "1 files (4 bytes) to the trash" in caplog.text
    assert (place.keys(), place.trash()) == ({kept.key}, {gone.key})
    assert place.sweep(6.9).deleted == 0
    done = place.sweep(0.2)
    assert (done.deleted, done.deleted_bytes) == (1, 4)
    assert (place.keys(), place.trash()) == ({kept.key}, set())
    assert place.inventory.references() == {kept.reference}
    assert place.sweep(30).trashed == 0


def test_preview_reports_and_changes_nothing(place):
    gone, foreign = place.storage.put(b"gone", "bin"), UnrecordedWriter(place).put(b"foreign!")
    place.sweep()
    place.clock.turn(8 * DAY)
    report, rest = preview(place.database, place.storage, place.settings)
    assert (report.trashed, report.trashed_bytes, report.deleted) == (1, 4, 0)
    assert (rest.count, rest.bytes) == (1, 8)
    assert place.keys() == {gone.key, foreign.key}
    assert place.sweep().trashed == 1
    place.clock.turn(8 * DAY)
    assert preview(place.database, place.storage, place.settings)[0].deleted == 1
    assert place.sweep().deleted == 1


class UnrecordedWriter:
    """Stores without a record, as another program or a newer database does."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def put(self, content: bytes):
        """Store content."""
        self.place.storage.set_recorder(lambda asset: None)
        asset = self.place.storage.put(content, "bin")
        self.place.storage.set_recorder(self.place.inventory.record)
        return asset


def test_unrecorded_files_under_the_prefix_are_never_touched(place):
    asset = UnrecordedWriter(place).put(b"somebody's")
    moved = [f"notes/{number}.txt" for number in range(3)] + [
        f"b/{asset.key}",
        f"trash/b/{asset.key}",
        "ab/x.bin",
    ]
    for name in moved:
        place.storage.move(UnrecordedWriter(place).put(name.encode()).key, name)
    for _ in range(4):
        place.sweep(30)
    assert asset.key in place.keys()  # noqa: SIM118
    assert all(place.storage.find(name) for name in moved)


def test_two_installations_in_one_bucket_at_nested_prefixes(tmp_path, settings, clock):
    """One at the root of a folder, two below it with prefixes that the first uses itself."""
    places = []
    for number, folder in enumerate(("bucket", "bucket/trash", "bucket/ab")):
        database = Database(f"sqlite:///{tmp_path}/{number}.db", clock)
        places.append(Place(FolderStorage(tmp_path / folder), database, settings, clock))
    kept = [place.storage.put(b"the same", "bin") for place in places]
    for place, asset in zip(places[1:], kept[1:], strict=True):
        place.name(asset)
    for _ in range(4):
        for place in places:
            place.sweep(8)
    assert [place.keys() for place in places] == [set(), {kept[1].key}, {kept[2].key}]
    for place in places:
        place.database.close()


def test_a_restored_older_database_deletes_no_newer_video(tmp_path, settings, clock, caplog):
    """Restored by other means than skyloom restore: nothing is collected before an adoption."""
    path, storage = tmp_path / "jobs.db", FolderStorage(tmp_path / "assets")
    with closing(Database(f"sqlite:///{path}", clock)) as database:
        place = Place(storage, database, settings, clock)
        about_to_be_named = storage.put(b"its job is handed in after the backup", "mp4")
        place.sweep()
        database.backup(tmp_path / "old.db")
        place.name(about_to_be_named)
        newer = [storage.put(f"video {number}".encode(), "mp4") for number in range(20)]
        for asset in newer:
            add_library_file(place, asset)
        place.sweep(1)
    for left in tmp_path.glob("jobs.db*"):
        left.unlink()
    shutil.copy(tmp_path / "old.db", path)
    with closing(Database(f"sqlite:///{path}", clock)) as database:
        place = Place(storage, database, settings, clock)
        for _ in range(4):
            with pytest.raises(ConfigError, match="Another copy"):
                place.sweep(8)
        _, task = garbage_collection_task(place.jobs, storage, lambda: False)
        task()
        assert "nothing is collected" in caplog.text
        adopt_storage(place.inventory, storage, settings)
        for _ in range(4):
            place.sweep(8)
        assert place.keys() >= {asset.key for asset in [*newer, about_to_be_named]}


def add_library_file(place: Place, asset) -> None:
    """Add a library file that references an asset."""
    from skyloom.serve.queue.library import Library

    Library(place.database).add_file("ada", "vision", "a.png", asset.reference, 1)


def test_an_older_database_within_one_sweep_deletes_nothing_that_it_has_not_recorded(
    tmp_path, settings, clock
):
    storage, path = FolderStorage(tmp_path / "assets"), tmp_path / "jobs.db"
    with closing(Database(f"sqlite:///{path}", clock)) as database:
        place = Place(storage, database, settings, clock)
        place.sweep()
        database.backup(tmp_path / "old.db")
        newer = storage.put(b"newer", "mp4")
        add_library_file(place, newer)
    with closing(Database(f"sqlite:///{tmp_path / 'old.db'}", clock)) as database:
        place = Place(storage, database, settings, clock)
        for _ in range(4):
            place.sweep(8)
        assert place.keys() == {newer.key}


def test_two_copies_of_a_database_do_not_both_collect(tmp_path, settings, clock):
    """A copy of the production's database for trying out, with the production's bucket."""
    storage = FolderStorage(tmp_path / "assets")
    with closing(Database(f"sqlite:///{tmp_path / 'a.db'}", clock)) as first:
        production = Place(storage, first, settings, clock)
        video = storage.put(b"video", "mp4")
        id = production.name(video)
        production.sweep()
        first.backup(tmp_path / "b.db")
        with closing(Database(f"sqlite:///{tmp_path / 'b.db'}", clock)) as second:
            trial = Place(storage, second, settings, clock)
            trial.jobs.delete(id)
            production.sweep(1)
            with pytest.raises(ConfigError, match="Another copy"):
                trial.sweep(8)
        storage.set_recorder(production.inventory.record)
        production.sweep(8)
        assert production.keys() == {video.key}


def test_two_servers_of_one_database_sweep_in_turn(place):
    place.storage.put(b"gone", "bin")
    other = Place(place.storage, place.database, place.settings, place.clock)
    for _ in range(3):
        assert place.sweep(8) is not None
        assert other.sweep() is not None
    assert not place.keys()
    assert collect(place.database, place.storage, place.settings, pause=1_800) is None
    place.clock.turn(1_801)
    assert collect(place.database, place.storage, place.settings, pause=1_800) is not None


def test_marker_that_cannot_be_written_is_written_by_a_later_collection(place, monkeypatch):
    place.storage.put(b"gone", "bin")

    def fail(*_, **__):
        raise CapacityError("The storage does not answer.")

    for _ in range(3):
        with monkeypatch.context() as patched:
            patched.setattr(type(place.storage), "write_marker", fail)
            with pytest.raises(CapacityError):
                place.sweep(8)
    place.sweep()
    assert place.sweep(8).trashed == 1


def test_of_two_collections_at_once_one_continues(place):
    mine = place.inventory.identity()
    assert place.inventory.begin_collection(mine, mine.sweep) is not None
    assert place.inventory.begin_collection(mine, mine.sweep) is None


def test_asset_stored_again_while_it_is_trashed_stays(place, monkeypatch):
    asset = place.storage.put(b"again", "bin")
    place.sweep()
    move = type(place.storage).move

    def move_late(storage, key, target):
        if target.startswith("trash/"):
            monkeypatch.undo()
            place.name(place.storage.put(b"again", "bin"))
        return move(storage, key, target)

    monkeypatch.setattr(type(place.storage), "move", move_late)
    assert place.sweep(8).trashed == 0
    assert (place.keys(), place.trash()) == ({asset.key}, set())
    for _ in range(3):
        place.sweep(8)
    assert place.keys() == {asset.key}


@pytest.mark.parametrize(
    "when", ["before it is moved", "after it is moved", "before it is deleted"]
)
def test_killed_collection_is_completed_by_the_next(place, monkeypatch, when: str):
    """The next collections keep referenced files and delete unreferenced ones with their rows."""
    kept, gone = place.storage.put(b"kept", "bin"), place.storage.put(b"gone", "bin")
    place.name(kept)
    place.sweep()
    kind, calls = type(place.storage), {"before it is moved": "move", "after it is moved": "move"}
    real = getattr(kind, calls.get(when, "remove"))

    def die(storage, *arguments):
        if when == "after it is moved":
            real(storage, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(kind, calls.get(when, "remove"), die)
    place.clock.turn(8 * DAY)
    with pytest.raises(KeyboardInterrupt):
        for _ in range(2):
            place.sweep(8)
    monkeypatch.undo()
    for _ in range(2):
        place.sweep(8)
    assert (place.keys(), place.trash()) == ({kept.key}, set())
    assert place.inventory.references() == {kept.reference}
    assert place.storage.find(gone.key) is None


def test_asset_referenced_again_returns_from_the_trash(place):
    asset = place.storage.put(b"deleted, then its database was restored", "mp4")
    place.sweep()
    place.sweep(8)
    assert place.trash() == {asset.key}
    place.name(asset)
    done = place.sweep(8)
    assert (done.returned, done.deleted) == (1, 0)
    assert (place.keys(), place.trash()) == ({asset.key}, set())
    for _ in range(3):
        place.sweep(8)
    assert place.keys() == {asset.key}


def test_asset_written_by_somebody_else_since_is_kept(tmp_path, settings, clock):
    database = Database(f"sqlite:///{tmp_path / 'jobs.db'}", clock)
    place = Place(FolderStorage(tmp_path / "assets"), database, settings, clock)
    asset = place.storage.put(b"both make this", "bin")
    place.sweep()
    late = clock.now + SLACK_SECONDS + 60
    os.utime(place.storage.folder / asset.key, (late, late))
    for _ in range(4):
        place.sweep(8)
    assert place.keys() == {asset.key}
    database.close()


@pytest.mark.parametrize("lost", ["the marker", "another installation's marker"])
def test_nothing_is_collected_without_the_right_marker(place, lost: str):
    """The storage was unmounted or replaced while the server ran; rows stay too."""
    place.storage.put(b"gone", "bin")
    place.sweep()
    if lost == "the marker":
        place.storage.remove("skyloom-installation.json")
    else:
        place.storage.write_marker(b'{"id": "inst_other", "sweep": "x"}', replace=True)
    for look in (place.sweep, lambda: preview(place.database, place.storage, place.settings)):
        with pytest.raises(ConfigError):
            look()
    assert len(place.keys()) == len(place.inventory.references()) == 1


def test_unreachable_database_does_not_prevent_storing(
    tmp_path, settings, clock, monkeypatch, caplog
):
    from sqlalchemy.exc import OperationalError

    database = Database(f"sqlite:///{tmp_path / 'jobs.db'}", clock)
    place = Place(FolderStorage(tmp_path / "assets"), database, settings, clock)

    def fail(*_):
        raise OperationalError("", None, Exception())

    monkeypatch.setattr(database, "write", fail)
    asset = place.storage.put(b"made while it was away", "mp4")
    monkeypatch.undo()
    assert "not recorded" in caplog.text
    for _ in range(3):
        place.sweep(8)
    assert place.keys() == {asset.key}
    database.close()


def test_prompt_that_looks_like_a_reference_is_ignored(place):
    gone = place.storage.put(b"gone", "bin")
    place.jobs.submit({"prompt": "asset:of a cat"}, owner="ada")
    assert "asset:of a cat" in referenced_assets(place.database, place.settings)
    for _ in range(3):
        place.sweep(8)
    assert gone.key not in place.keys() | place.trash()


def test_collection_stops_with_the_server(place):
    for number in range(3):
        place.storage.put(f"{number}".encode(), "bin")
    place.sweep()
    place.clock.turn(8 * DAY)
    done = collect(place.database, place.storage, place.settings, stopping=lambda: True)
    assert done.trashed == 0
    assert len(place.keys()) == 3


def test_assets_of_jobs_and_files_are_kept(place):
    named = [place.storage.put(f"{number}".encode(), "bin") for number in range(2)]
    place.name(named[0])
    add_library_file(place, named[1])
    assert find_references(sorted(referenced_assets(place.database, place.settings))) == {
        one.reference for one in named
    }
    for _ in range(3):
        place.sweep(8)
    assert place.keys() == {one.key for one in named}
    assert place.storage.find(trash_key(place.id, named[0])) is None
