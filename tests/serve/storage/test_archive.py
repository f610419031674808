"""A backup holds all that a server needs, a restore checks it first and orphans nothing."""

import importlib
import json
import os
import shutil
import stat
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from skyloom.core.errors import ConfigError
from skyloom.safety.provenance import ProvenanceRecord, Registry
from skyloom.serve.queue.database import Database
from skyloom.serve.queue.job import JobResult
from skyloom.serve.queue.jobs import JobStore
from skyloom.serve.queue.leases import Leases
from skyloom.serve.settings import Settings
from skyloom.serve.storage.archive import back_up, restore
from skyloom.serve.storage.folder import Asset, FolderStorage
from skyloom.serve.storage.garbage import DAY, collect
from skyloom.serve.storage.installation import open_installation, read_note
from skyloom.serve.storage.inventory import Inventory


@pytest.fixture(autouse=True)
def umask():
    """What a backup changes for the process is put back."""
    mask = os.umask(0o022)
    yield
    os.umask(mask)


@pytest.fixture
def settings(tmp_path, database_url) -> Settings:
    """Everything in one data folder, but Postgres."""
    own = None if database_url.startswith("sqlite") else database_url
    return Settings(data=tmp_path / "data", database_url=own)


def make_video(settings: Settings, content: bytes) -> Asset:
    """A video that was made and handed in."""
    database, storage = open_installation(settings)
    with closing(database):
        asset = storage.put(content, "mp4")
        JobStore(database, settings).submit({"prompt": "a cat"}, owner="ada")
        leases = Leases(database, settings)
        leases.finish(leases.lease("w"), JobResult({"video": asset.reference}, {}))
    return asset


def put_beside(data: Path) -> None:
    """What lies in a data folder besides database and storage."""
    (data / "credentials").mkdir(mode=0o700)
    (data / "credentials/leaf.key").write_text("key")
    (data / "settings.toml").write_text("max_queued = 7\n")
    Registry(data / "registry.sqlite").add(ProvenanceRecord("a.mp4", "ab", "cd", "ef", {}, ()))
    (data / "runs/x").mkdir(parents=True)
    (data / "runs/x/state").write_text("work in progress")
    (data / "skyloom.db.before-2026").write_text("old")
    (data / "link").symlink_to("/etc/passwd")


def wipe(settings: Settings) -> None:
    """As a disk that died."""
    shutil.rmtree(settings.data)


def empty_postgres(url: str) -> None:
    """As a database server that died."""
    psycopg = importlib.import_module("psycopg")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")


def reload_dump(url: str, target: Path) -> None:
    """What the operator does with pg_restore."""
    empty_postgres(url)
    subprocess.run(
        ["pg_restore", "--no-owner", f"--dbname={url}", target / "database.dump"], check=True
    )


def kept_by(settings: Settings) -> set[str]:
    """What is in the storage after three weeks of sweeps."""
    time = [4_000_000_000.0]
    database, storage = open_installation(settings)
    database.close()
    with closing(Database(settings.database, lambda: time[0])) as database:
        for _ in range(4):
            collect(database, storage, settings)
            time[0] += 8 * DAY
    return {asset.key for asset, _ in storage.assets()}


def test_everything_comes_back_on_an_empty_machine(settings, tmp_path):
    videos = [make_video(settings, f"{number}".encode()) for number in range(3)]
    put_beside(settings.data)
    loose = FolderStorage(Path(settings.storage)).put(b"nobody names it", "bin")
    made = back_up(settings, tmp_path / "copy")
    assert made.missing == ()
    told = json.loads((tmp_path / "copy/manifest.json").read_text())
    assert made.files == len(told["files"]) == 3 + 1 + 3
    assert not [
        name for name in told["files"] if any(word in name for word in ("runs", "before", "link"))
    ]
    assert loose.key not in " ".join(told["files"])
    found = [tmp_path / "copy", *(tmp_path / "copy").rglob("*")]
    assert not [path for path in found if stat.S_IMODE(path.stat().st_mode) & 0o077]
    wipe(settings)
    if settings.database_url is not None:
        empty_postgres(settings.database)
        with pytest.raises(ConfigError, match="pg_restore"):
            restore(settings, tmp_path / "copy")
        reload_dump(settings.database, tmp_path / "copy")
    done = restore(settings, tmp_path / "copy")
    assert (done.put_back, done.kept, done.unnamed) == (3, (), ())
    database, storage = open_installation(settings)
    with closing(database):
        assert [b"".join(storage.read(video)) for video in videos] == [b"0", b"1", b"2"]
        assert len(JobStore(database, settings).page(limit=9)[0]) == 3
        assert read_note(storage).id == Inventory(database).identity().id == told["installation"]
    assert (settings.data / "credentials/leaf.key").read_text() == "key"
    assert len(Registry(settings.data / "registry.sqlite").find(sha256="ab")) == 1
    assert not [
        path for path in settings.data.rglob("*") if stat.S_IMODE(path.stat().st_mode) & 0o077
    ]


def test_newer_videos_stay_are_said_and_are_never_collected(settings, tmp_path):
    old = make_video(settings, b"old")
    database, storage = open_installation(settings)
    with closing(database):
        storage.put(b"newer 0", "mp4")  # stored and recorded, and handed in after the backup
        collect(database, storage, settings)
    back_up(settings, tmp_path / "copy")
    newer = [make_video(settings, f"newer {number}".encode()) for number in range(3)]
    if settings.database_url is not None:
        reload_dump(settings.database, tmp_path / "copy")
    done = restore(settings, tmp_path / "copy")
    assert done.unnamed == tuple(sorted(asset.key for asset in newer))
    assert (done.replaced is None) == (settings.database_url is not None)
    assert kept_by(settings) == {asset.key for asset in [old, *newer]}


def test_what_was_deleted_since_comes_back_from_the_trash(tmp_path, settings):
    video = make_video(settings, b"deleted after the backup")
    back_up(settings, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy/assets")  # or it would come from there
    told = json.loads((tmp_path / "copy/manifest.json").read_text())
    told["files"] = {
        name: one for name, one in told["files"].items() if not name.startswith("assets/")
    }
    (tmp_path / "copy/manifest.json").write_text(json.dumps(told))
    database, storage = open_installation(settings)
    now = [4_000_000_000.0]
    database.close()
    with closing(Database(settings.database, lambda: now[0])) as database:
        jobs = JobStore(database, settings)
        jobs.delete(jobs.page(limit=1)[0][0].id)
        collect(database, storage, settings)
        now[0] += 8 * DAY
        assert collect(database, storage, settings).trashed == 1
    if settings.database_url is not None:
        reload_dump(settings.database, tmp_path / "copy")
    restore(settings, tmp_path / "copy")
    assert b"".join(storage.read(video)) == b"deleted after the backup"
    assert kept_by(settings) == {video.key}


@pytest.fixture
def here(tmp_path) -> Settings:
    """On SQLite alone."""
    return Settings(data=tmp_path / "data")


def test_what_is_newer_in_the_data_folder_stays(here, tmp_path):
    make_video(here, b"a")
    put_beside(here.data)
    back_up(here, tmp_path / "copy")
    (here.data / "settings.toml").write_text("max_queued = 8\n")
    Registry(here.data / "registry.sqlite").add(ProvenanceRecord("b.mp4", "cd", "cd", "ef", {}, ()))
    done = restore(here, tmp_path / "copy")
    assert done.kept == ("registry.sqlite", "settings.toml")
    assert len(Registry(here.data / "registry.sqlite").find(sha256="cd")) == 1


def change_a_byte(folder: Path) -> None:
    """In a video."""
    (video,) = (folder / "assets").rglob("*.mp4")
    video.write_bytes(b"X")


def escape(folder: Path) -> None:
    """Name a file outside."""
    told = json.loads((folder / "manifest.json").read_text())
    told["files"]["beside/../../outside"] = {"size": 0, "sha256": "e3b0"}
    (folder / "manifest.json").write_text(json.dumps(told))


def link(folder: Path) -> None:
    """Lead outside by a link."""
    (video,) = (folder / "assets").rglob("*.mp4")
    content = video.read_bytes()
    (folder.parent / "outside").write_bytes(content)
    video.unlink()
    video.symlink_to(folder.parent / "outside")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (change_a_byte, "damaged"),
        (escape, "names the file"),
        (link, "names the file"),
        (lambda folder: (folder / "database.sqlite").unlink(), "damaged"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "damaged"),
        (lambda folder: (folder / "manifest.json").unlink(), "no backup"),
        (
            lambda folder: (folder / "manifest.json").write_text('{"format": 2, "files": {}}'),
            "newer skyloom",
        ),
        (
            lambda folder: (folder / "manifest.json").write_text('{"format": 1, "files": {}}'),
            "no database",
        ),
    ],
)
def test_a_damaged_backup_changes_nothing(here, tmp_path, change, said: str):
    make_video(here, b"a")
    back_up(here, tmp_path / "copy")
    change(tmp_path / "copy")
    make_video(here, b"newer")
    before = {path: path.stat().st_mtime_ns for path in here.data.rglob("*")}
    with pytest.raises(ConfigError, match=said):
        restore(here, tmp_path / "copy")
    assert {path: path.stat().st_mtime_ns for path in here.data.rglob("*")} == before


def test_anothers_backup_or_storage_is_refused(here, tmp_path):
    there = Settings(data=tmp_path / "there")
    make_video(here, b"a")
    make_video(there, b"b")
    back_up(here, tmp_path / "copy")
    with pytest.raises(ConfigError, match="is of installation"):
        restore(there, tmp_path / "copy")
    with pytest.raises(ConfigError, match="belongs to installation"):
        restore(there, tmp_path / "copy/database.sqlite")
    with pytest.raises(ConfigError, match="belongs to installation"):
        back_up(Settings(data=here.data, storage_url=there.storage), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_file_with_the_database_alone_is_fit_for_its_storage(here, tmp_path):
    old = make_video(here, b"old")
    with closing(Database(here.database)) as database:
        database.backup(tmp_path / "copy.db")
    newer = make_video(here, b"newer")
    assert kept_by(here) == {old.key, newer.key}  # and the storage was swept since the backup
    done = restore(here, tmp_path / "copy.db")
    assert done.unnamed == (newer.key,)
    assert kept_by(here) == {old.key, newer.key}


def test_a_backup_from_before_ids_goes_with_the_storage_that_has_its_files(here, tmp_path):
    make_video(here, b"old")
    with closing(Database(here.database)) as database:
        database.backup(tmp_path / "copy.db")
    with closing(Database(f"sqlite:///{tmp_path / 'copy.db'}")) as copy, copy.write() as write:
        write.connection.exec_driver_sql("DROP TABLE installation")
        write.connection.exec_driver_sql("DROP TABLE assets")
    restore(here, tmp_path / "copy.db")
    open_installation(here)[0].close()
    there = Settings(data=tmp_path / "there")
    make_video(there, b"other")
    with pytest.raises(ConfigError, match="no id"):
        restore(there, tmp_path / "copy.db")


def test_what_the_storage_has_lost_is_said(here, tmp_path):
    gone = make_video(here, b"gone")
    (Path(here.storage) / gone.key).unlink()
    assert back_up(here, tmp_path / "copy").missing == (gone.reference,)


def test_a_backup_in_the_data_folder_holds_no_other_backup(here):
    make_video(here, b"a")
    back_up(here, here.data / "one")
    assert back_up(here, here.data / "two").files == 2


def test_a_backup_that_fails_leaves_nothing(here, tmp_path, monkeypatch):
    make_video(here, b"a")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("skyloom.serve.storage.archive.shutil.copyfile", fail)
    put_beside(here.data)
    with pytest.raises(OSError, match="No space"):
        back_up(here, tmp_path / "copy")
    assert {path.name for path in tmp_path.iterdir()} == {"data"}


def test_a_linked_database_file_is_replaced_where_it_lies(here, tmp_path):
    make_video(here, b"a")
    back_up(here, tmp_path / "copy")
    real = tmp_path / "disk"
    real.mkdir()
    (here.data / "skyloom.db").rename(real / "skyloom.db")
    (here.data / "skyloom.db").symlink_to(real / "skyloom.db")
    done = restore(here, tmp_path / "copy")
    assert done.replaced.parent == real
    assert (here.data / "skyloom.db").is_symlink()
    open_installation(here)[0].close()
