"""Wrong settings never delete or orphan videos: database and storage hold the same id."""

import logging
import os
import stat
from contextlib import closing
from pathlib import Path

import pytest

from skyloom.core.errors import ConfigError
from skyloom.serve.queue.database import Database
from skyloom.serve.queue.job import JobResult
from skyloom.serve.queue.jobs import JobStore
from skyloom.serve.queue.leases import Leases
from skyloom.serve.settings import Settings
from skyloom.serve.storage import FolderStorage, ObjectStorage
from skyloom.serve.storage import installation as module
from skyloom.serve.storage.garbage import collect
from skyloom.serve.storage.installation import (
    _refuse_new_database,
    check_ids,
    check_installation,
    examine_installation,
    open_database,
    open_installation,
    read_marker,
)
from skyloom.serve.storage.inventory import Inventory


@pytest.fixture(autouse=True)
def umask():
    """Restore the process's umask after each test."""
    mask = os.umask(0o022)
    yield
    os.umask(mask)


@pytest.fixture(params=["folder", "objects"])
def places(request, tmp_path, monkeypatch):
    """Create settings by names of a database and a storage, for both kinds of storage."""
    stores: dict[str, ObjectStorage] = {}

    def opened(place: str) -> FolderStorage | ObjectStorage:
        if request.param == "folder":
            return FolderStorage(Path(place))
        return stores.setdefault(place, ObjectStorage("memory:///"))

    monkeypatch.setattr("skyloom.serve.storage.installation.open_storage", opened)

    def make(database: str, storage: str) -> Settings:
        url = f"sqlite:///{tmp_path / database}.db"
        return Settings(
            data=tmp_path / "data", database_url=url, storage_url=str(tmp_path / storage)
        )

    return make


def make_video(settings: Settings, content: bytes) -> str:
    """Store a video as the result of a completed job. Returns its reference."""
    database, storage = open_installation(settings)
    with closing(database):
        asset = storage.put(content, "mp4")
        JobStore(database, settings).submit({"prompt": "a cat"}, owner="ada")
        leases = Leases(database, settings)
        leases.finish(leases.lease("w"), JobResult({"video": asset.reference}, {}))
    return asset.reference


def before_ids(settings: Settings) -> None:
    """Remove the ids, as in a database migrated from a version without ids."""
    database, storage = open_installation(settings)
    with closing(database), database.write() as write:
        for table in ("installation", "assets"):
            write.connection.exec_driver_sql(f"DELETE FROM {table}")
    storage.remove("skyloom-installation.json")


def ids(settings: Settings) -> set[str | None]:
    """Open database and storage together and read both ids."""
    database, storage = open_installation(settings)
    with closing(database):
        return {Inventory(database).identity().id, read_marker(storage).id}


def test_a_new_database_and_a_new_storage_get_one_id(places):
    (first,) = ids(places("a", "s"))
    assert {first} == ids(places("a", "s"))
    assert first.startswith("inst_")


def test_storage_of_another_installation_is_refused_with_both_ids(places):
    (one,), (two,) = ids(places("a", "s")), ids(places("b", "t"))
    make_video(places("a", "s"), b"a")
    with pytest.raises(ConfigError, match=one) as refused:
        open_installation(places("b", "s"))
    assert two in str(refused.value)
    assert "--adopt-storage" in str(refused.value)


@pytest.mark.parametrize("left", ["nothing", "an empty file", "empty tables"])
def test_lost_database_is_an_error_and_is_not_created(places, tmp_path, left: str):
    settings = places("a", "s")
    (id,) = ids(settings)
    make_video(settings, b"a")
    for path in tmp_path.glob("a.db*"):
        path.unlink()
    if left == "an empty file":
        (tmp_path / "a.db").touch()
    elif left == "empty tables":
        Database(settings.database).close()
    for opened in (open_installation, open_database)[: 1 if left == "empty tables" else 2]:
        with pytest.raises(
            ConfigError, match=f"belongs to installation {id}.*missing or empty.*restore a backup"
        ):
            opened(settings)
    assert (tmp_path / "a.db").exists() == (left != "nothing")


def test_a_mistyped_database_url_is_an_error_and_makes_no_file(places, tmp_path):
    make_video(places("a", "s"), b"a")
    with pytest.raises(ConfigError, match="missing or empty"):
        open_installation(places("typo", "s"))
    assert not (tmp_path / "typo.db").exists()
    with pytest.raises(ConfigError, match="There is no database"):
        open_database(places("typo", "new"), create=False)
    assert not (tmp_path / "typo.db").exists()


def test_unmounted_storage_is_an_error_and_stays_empty(places, tmp_path):
    settings = places("a", "s")
    make_video(settings, b"a")
    away = places("a", "mount")
    with pytest.raises(ConfigError, match=r"no installation id.*mounted"):
        open_installation(away)
    with pytest.raises(ConfigError, match="mounted"):
        examine_installation(away)
    assert not (tmp_path / "mount").exists()


def test_new_database_refuses_a_storage_with_files(places):
    settings = places("a", "s")
    make_video(settings, b"a")
    before_ids(settings)
    with pytest.raises(ConfigError, match="holds files"):
        open_installation(places("b", "s"))


def test_database_and_storage_without_ids_get_one_together(places, caplog):
    settings = places("a", "s")
    make_video(settings, b"a")
    before_ids(settings)
    with caplog.at_level(logging.WARNING):
        database, storage = open_installation(settings)
    with closing(database):
        inventory = Inventory(database)
        assert inventory.references() == JobStore(database, settings).referenced_assets() != set()
        assert read_marker(storage).id == inventory.identity().id
    assert inventory.identity().id in caplog.text


def test_database_without_id_refuses_a_storage_without_its_files(places):
    settings = places("a", "s")
    make_video(settings, b"a")
    before_ids(settings)
    with pytest.raises(ConfigError, match="mounted"):
        open_installation(places("a", "mount"))


def test_database_without_id_takes_the_id_of_the_storage_with_its_files(places):
    settings = places("a", "s")
    make_video(settings, b"a")
    (id,) = ids(settings)
    database = Database(settings.database)
    with closing(database), database.write() as write:
        write.connection.exec_driver_sql("DELETE FROM installation")
    assert ids(settings) == {id}


def test_crash_between_writing_the_two_ids_is_repaired(places):
    settings = places("a", "s")
    with closing(open_database(settings)) as database:
        id = Inventory(database).ensure_identity().id
    assert ids(settings) == {id}


def test_adopting_takes_the_storage_and_refuses_the_installation_before(places):
    make_video(places("a", "s"), b"a")
    database, storage = open_installation(places("b", "s"), adopt=True)
    with closing(database):
        assert collect(database, storage, places("b", "s")).trashed == 0
        assert len(list(storage.assets())) == 1
    with pytest.raises(ConfigError, match="belongs to"):
        open_installation(places("a", "s"))
    (id,) = ids(places("b", "s"))
    open_installation(places("b", "s"), adopt=True)[0].close()
    assert ids(places("b", "s")) == {id}, "once is enough"


def test_processes_that_start_at_once_agree_on_an_id(places):
    """Another process opens both between reading and writing the ids."""
    settings = places("a", "s")
    database, storage = Database(settings.database), module.open_storage(settings.storage)
    with closing(database):
        inventory = Inventory(database)
        real, seen = inventory.identity, []

        def identity():
            if not seen:
                seen.append(None)
                open_installation(settings)[0].close()
                return None
            return real()

        inventory.identity = identity
        assert check_installation(inventory, storage, settings).id == read_marker(storage).id


def test_damaged_marker_is_an_error(places):
    _, storage = open_installation(places("a", "s"))
    for content in (b"", b"{}", b"[1]", b"\xff"):
        storage.write_marker(content, replace=True)
        with pytest.raises(ConfigError, match="damaged"):
            open_installation(places("a", "s"))
    open_installation(places("a", "s"), adopt=True)[0].close()
    assert len(ids(places("a", "s"))) == 1


def test_check_ids_compares_only_known_ids(places):
    database, storage = open_installation(places("a", "s"))
    with closing(database):
        check_ids(Inventory(database), storage, places("a", "s"))
        storage.write_marker(b'{"id": "inst_x", "sweep": ""}', replace=True)
        with pytest.raises(ConfigError, match="inst_x"):
            check_ids(Inventory(database), storage, places("a", "s"))


def test_empty_database_beside_a_storage_with_an_id_is_refused(database_url, tmp_path):
    """No table is created in it, neither in SQLite nor in Postgres."""
    first = Settings(data=tmp_path, database_url=f"sqlite:///{tmp_path / 'first.db'}")
    open_installation(first)[0].close()
    second = Settings(data=tmp_path, database_url=database_url)
    for _ in range(2):
        with pytest.raises(ConfigError, match="missing or empty"):
            open_installation(second)


def test_errors_do_not_contain_the_database_password(tmp_path):
    FolderStorage(tmp_path / "assets").put(b"x", "bin")
    settings = Settings(data=tmp_path, database_url="postgresql://ada:secret@host/jobs")
    with pytest.raises(ConfigError) as refused:
        _refuse_new_database(settings, FolderStorage(tmp_path / "assets"), None)
    assert "secret" not in str(refused.value)
    assert "ada" in str(refused.value)


def modes(folder: Path) -> dict[str, int]:
    """Permission bits of all files below a folder."""
    return {
        path.relative_to(folder).as_posix(): stat.S_IMODE(path.stat().st_mode)
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("linked", [False, True])
def test_other_users_can_read_nothing_in_an_existing_data_folder(tmp_path, linked: bool):
    real, data = tmp_path / "real", tmp_path / "data"
    real.mkdir(mode=0o755)
    data = real
    if linked:
        data = tmp_path / "link"
        data.symlink_to(real)
    settings = Settings(data=data)
    Database(settings.database).close()
    (real / "settings.toml").write_text("")
    (real / "skyloom.db.before-2026").write_text("")
    assert modes(real)["skyloom.db"] == 0o644
    database, storage = open_installation(settings)
    with closing(database):
        storage.put(b"x", "bin")
        settings.runs.mkdir(parents=True)
        (settings.runs / "input.png").write_bytes(b"x")
        found = modes(real)
        assert {
            "skyloom.db-wal",
            "skyloom.db-shm",
            "assets/skyloom-installation.json",
        } <= found.keys()
        assert not {name: oct(mode) for name, mode in found.items() if mode & 0o077}
    assert stat.S_IMODE(real.stat().st_mode) == 0o700


def test_shared_data_folder_is_unchanged_and_logged(tmp_path, caplog):
    shared = tmp_path / "tmp"
    shared.mkdir()
    shared.chmod(0o1777)
    open_database(Settings(data=shared)).close()
    assert stat.S_IMODE(shared.stat().st_mode) == 0o1777
    assert str(shared) in caplog.text
    assert stat.S_IMODE((shared / "skyloom.db").stat().st_mode) == 0o600
