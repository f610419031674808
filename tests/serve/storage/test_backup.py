"""Backups are complete; a restore verifies them first and loses no newer file."""

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
from skyloom.serve.storage import Asset, FolderStorage
from skyloom.serve.storage.backup import create_backup, restore_backup
from skyloom.serve.storage.garbage import DAY, collect
from skyloom.serve.storage.installation import open_installation, read_marker
from skyloom.serve.storage.inventory import Inventory


@pytest.fixture(autouse=True)
def umask():
    """Restore the process's umask after each test."""
    mask = os.umask(0o022)
    yield
    os.umask(mask)


@pytest.fixture
def settings(tmp_path, database_url) -> Settings:
    """One data folder for everything except Postgres."""
    own = None if database_url.startswith("sqlite") else database_url
    return Settings(data=tmp_path / "data", database_url=own)


def make_video(settings: Settings, content: bytes) -> Asset:
    """Store a video as the result of a completed job."""
    database, storage = open_installation(settings)
    with closing(database):
        asset = storage.put(content, "mp4")
        JobStore(database, settings).submit({"prompt": "a cat"}, owner="ada")
        leases = Leases(database, settings)
        leases.finish(leases.lease("w"), JobResult({"video": asset.reference}, {}))
    return asset


def put_beside(data: Path) -> None:
    """Add the other files of a data folder: keys, settings, registry, and files to leave out."""
    (data / "credentials").mkdir(mode=0o700)
    (data / "credentials/leaf.key").write_text("key")
    (data / "settings.toml").write_text("max_queued = 7\n")
    Registry(data / "registry.sqlite").add(ProvenanceRecord("a.mp4", "ab", "cd", "ef", {}, ()))
    (data / "runs/x").mkdir(parents=True)
    (data / "runs/x/state").write_text("work in progress")
    (data / "skyloom.db.before-2026").write_text("old")
    (data / "link").symlink_to("/etc/passwd")


def wipe(settings: Settings) -> None:
    """Delete the data folder."""
    shutil.rmtree(settings.data)


def empty_postgres(url: str) -> None:
    """Drop all tables."""
    psycopg = importlib.import_module("psycopg")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")


def reload_dump(url: str, target: Path) -> None:
    """Restore a dump by pg_restore, as the operator does."""
    empty_postgres(url)
    subprocess.run(
        ["pg_restore", "--no-owner", f"--dbname={url}", target / "database.dump"], check=True
    )


def keys_after_collections(settings: Settings) -> set[str]:
    """Keys in the storage after four collections in 32 days."""
    time = [4_000_000_000.0]
    database, storage = open_installation(settings)
    database.close()
    with closing(Database(settings.database, lambda: time[0])) as database:
        for _ in range(4):
            collect(database, storage, settings)
            time[0] += 8 * DAY
    return {asset.key for asset, _ in storage.assets()}


def test_restore_on_an_empty_machine_brings_everything_back(settings, tmp_path):
    videos = [make_video(settings, f"{number}".encode()) for number in range(3)]
    put_beside(settings.data)
    loose = FolderStorage(Path(settings.storage)).put(b"nobody names it", "bin")
    made = create_backup(settings, tmp_path / "copy")
    assert made.missing == ()
    manifest = json.loads((tmp_path / "copy/manifest.json").read_text())
    assert made.files == len(manifest["files"]) == 3 + 1 + 3
    assert not [
        name
        for name in manifest["files"]
        if any(word in name for word in ("runs", "before", "link"))
    ]
    assert loose.key not in " ".join(manifest["files"])
    found = [tmp_path / "copy", *(tmp_path / "copy").rglob("*")]
    assert not [path for path in found if stat.S_IMODE(path.stat().st_mode) & 0o077]
    wipe(settings)
    if settings.database_url is not None:
        empty_postgres(settings.database)
        with pytest.raises(ConfigError, match="pg_restore"):
            restore_backup(settings, tmp_path / "copy")
        reload_dump(settings.database, tmp_path / "copy")
    done = restore_backup(settings, tmp_path / "copy")
    assert (done.put_back, done.kept, done.unnamed) == (3, (), ())
    database, storage = open_installation(settings)
    with closing(database):
        assert [b"".join(storage.read(video)) for video in videos] == [b"0", b"1", b"2"]
        assert len(JobStore(database, settings).page(limit=9)[0]) == 3
        assert (
            read_marker(storage).id == Inventory(database).identity().id == manifest["installation"]
        )
    assert (settings.data / "credentials/leaf.key").read_text() == "key"
    assert len(Registry(settings.data / "registry.sqlite").find(sha256="ab")) == 1
    assert not [
        path for path in settings.data.rglob("*") if stat.S_IMODE(path.stat().st_mode) & 0o077
    ]


def test_restore_reports_newer_videos_and_they_are_never_collected(settings, tmp_path):
    old = make_video(settings, b"old")
    database, storage = open_installation(settings)
    with closing(database):
        storage.put(b"newer 0", "mp4")  # stored and recorded, and handed in after the backup
        collect(database, storage, settings)
    create_backup(settings, tmp_path / "copy")
    newer = [make_video(settings, f"newer {number}".encode()) for number in range(3)]
    if settings.database_url is not None:
        reload_dump(settings.database, tmp_path / "copy")
    done = restore_backup(settings, tmp_path / "copy")
    assert done.unnamed == tuple(sorted(asset.key for asset in newer))
    assert (done.replaced is None) == (settings.database_url is not None)
    assert keys_after_collections(settings) == {asset.key for asset in [old, *newer]}


def test_restore_returns_assets_from_the_trash(tmp_path, settings):
    video = make_video(settings, b"deleted after the backup")
    create_backup(settings, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy/assets")  # or it would come from there
    manifest = json.loads((tmp_path / "copy/manifest.json").read_text())
    manifest["files"] = {
        name: one for name, one in manifest["files"].items() if not name.startswith("assets/")
    }
    (tmp_path / "copy/manifest.json").write_text(json.dumps(manifest))
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
    restore_backup(settings, tmp_path / "copy")
    assert b"".join(storage.read(video)) == b"deleted after the backup"
    assert keys_after_collections(settings) == {video.key}


@pytest.fixture
def here(tmp_path) -> Settings:
    """Settings with SQLite."""
    return Settings(data=tmp_path / "data")


def test_restore_keeps_newer_files_of_the_data_folder(here, tmp_path):
    make_video(here, b"a")
    put_beside(here.data)
    create_backup(here, tmp_path / "copy")
    (here.data / "settings.toml").write_text("max_queued = 8\n")
    Registry(here.data / "registry.sqlite").add(ProvenanceRecord("b.mp4", "cd", "cd", "ef", {}, ()))
    done = restore_backup(here, tmp_path / "copy")
    assert done.kept == ("registry.sqlite", "settings.toml")
    assert len(Registry(here.data / "registry.sqlite").find(sha256="cd")) == 1


def change_a_byte(folder: Path) -> None:
    """Change the content of a video."""
    (video,) = (folder / "assets").rglob("*.mp4")
    video.write_bytes(b"X")


def escape(folder: Path) -> None:
    """Name a file outside the backup in the manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["beside/../../outside"] = {"size": 0, "sha256": "e3b0"}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def link(folder: Path) -> None:
    """Replace a video by a symbolic link to a file outside."""
    (video,) = (folder / "assets").rglob("*.mp4")
    content = video.read_bytes()
    (folder.parent / "outside").write_bytes(content)
    video.unlink()
    video.symlink_to(folder.parent / "outside")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_a_byte, "damaged"),
        (escape, "file name in the backup is invalid"),
        (link, "file name in the backup is invalid"),
        (lambda folder: (folder / "database.sqlite").unlink(), "damaged"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "damaged"),
        (lambda folder: (folder / "manifest.json").unlink(), "is not a backup"),
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
def test_restore_of_a_damaged_backup_changes_nothing(here, tmp_path, change, message: str):
    make_video(here, b"a")
    create_backup(here, tmp_path / "copy")
    change(tmp_path / "copy")
    make_video(here, b"newer")
    before = {path: path.stat().st_mtime_ns for path in here.data.rglob("*")}
    with pytest.raises(ConfigError, match=message):
        restore_backup(here, tmp_path / "copy")
    assert {path: path.stat().st_mtime_ns for path in here.data.rglob("*")} == before


def test_restore_refuses_the_backup_of_another_installation(here, tmp_path):
    there = Settings(data=tmp_path / "there")
    make_video(here, b"a")
    make_video(there, b"b")
    create_backup(here, tmp_path / "copy")
    with pytest.raises(ConfigError, match="backup belongs to installation"):
        restore_backup(there, tmp_path / "copy")
    with pytest.raises(ConfigError, match="belongs to installation"):
        restore_backup(there, tmp_path / "copy/database.sqlite")
    with pytest.raises(ConfigError, match="belongs to installation"):
        create_backup(Settings(data=here.data, storage_url=there.storage), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_restore_of_the_database_alone_keeps_newer_assets(here, tmp_path):
    old = make_video(here, b"old")
    with closing(Database(here.database)) as database:
        database.backup(tmp_path / "copy.db")
    newer = make_video(here, b"newer")
    assert keys_after_collections(here) == {
        old.key,
        newer.key,
    }  # and the storage was swept since the backup
    done = restore_backup(here, tmp_path / "copy.db")
    assert done.unnamed == (newer.key,)
    assert keys_after_collections(here) == {old.key, newer.key}


def test_restore_of_a_backup_without_id_requires_the_storage_with_its_files(here, tmp_path):
    make_video(here, b"old")
    with closing(Database(here.database)) as database:
        database.backup(tmp_path / "copy.db")
    with closing(Database(f"sqlite:///{tmp_path / 'copy.db'}")) as copy, copy.write() as write:
        write.connection.exec_driver_sql("DELETE FROM installation")
        write.connection.exec_driver_sql("DELETE FROM assets")
    restore_backup(here, tmp_path / "copy.db")
    open_installation(here)[0].close()
    there = Settings(data=tmp_path / "there")
    make_video(there, b"other")
    with pytest.raises(ConfigError, match="no id"):
        restore_backup(there, tmp_path / "copy.db")


def test_backup_reports_assets_that_the_storage_has_lost(here, tmp_path):
    gone = make_video(here, b"gone")
    (Path(here.storage) / gone.key).unlink()
    assert create_backup(here, tmp_path / "copy").missing == (gone.reference,)


def test_backup_in_the_data_folder_excludes_other_backups(here):
    make_video(here, b"a")
    create_backup(here, here.data / "one")
    assert create_backup(here, here.data / "two").files == 2


def test_failed_backup_leaves_no_files(here, tmp_path, monkeypatch):
    make_video(here, b"a")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("skyloom.serve.storage.backup.shutil.copyfile", fail)
    put_beside(here.data)
    with pytest.raises(OSError, match="No space"):
        create_backup(here, tmp_path / "copy")
    assert {path.name for path in tmp_path.iterdir()} == {"data"}


def test_restore_follows_a_symbolic_link_to_the_database(here, tmp_path):
    make_video(here, b"a")
    create_backup(here, tmp_path / "copy")
    real = tmp_path / "disk"
    real.mkdir()
    (here.data / "skyloom.db").rename(real / "skyloom.db")
    (here.data / "skyloom.db").symlink_to(real / "skyloom.db")
    done = restore_backup(here, tmp_path / "copy")
    assert done.replaced.parent == real
    assert (here.data / "skyloom.db").is_symlink()
    open_installation(here)[0].close()
