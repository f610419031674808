"""Storage of assets in a folder and in an object store: atomic writes, keys, references."""

import errno
import io
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyloom.core.errors import CapacityError, ConfigError, MediaError, RequestError
from skyloom.serve.queue.jobs import find_references
from skyloom.serve.storage import (
    Asset,
    FolderStorage,
    ObjectStorage,
    open_storage,
)
from skyloom.serve.storage import folder as module

CONTENT = bytes(range(256)) * 4_000


@pytest.fixture(params=["folder", "objects"])
def storage(request, tmp_path):
    """A folder or an object store."""
    return (
        FolderStorage(tmp_path / "assets")
        if request.param == "folder"
        else ObjectStorage("memory:///")
    )


def test_put_then_read_whole_and_by_range(storage, tmp_path):
    (tmp_path / "a.mp4").write_bytes(CONTENT)
    asset = storage.put(tmp_path / "a.mp4", "mp4")
    assert asset == storage.put(CONTENT, "mp4") == storage.put(io.BytesIO(CONTENT), "mp4")
    assert Asset.parse(asset.reference) == asset
    assert asset.media_type == "video/mp4"
    assert storage.size(asset) == len(CONTENT)
    assert b"".join(storage.read(asset)) == CONTENT
    size = len(CONTENT)
    for start, stop in (
        (0, 1),
        (5, 5),
        (700_000, 900_000),
        (size - 1, size),
        (size - 3, size + 50),
        (size, None),
    ):
        assert b"".join(storage.read(asset, start, stop)) == CONTENT[start:stop]
    assert storage.fetch(asset, tmp_path / "b.mp4").read_bytes() == CONTENT


def test_missing_assets_raise_before_the_first_chunk(storage, tmp_path):
    gone = Asset("0" * 64, "mp4")
    for look in (storage.size, storage.read, lambda asset: storage.fetch(asset, tmp_path / "x")):
        with pytest.raises(MediaError, match="gone"):
            look(gone)
    assert not (tmp_path / "x").exists()
    with pytest.raises(RequestError):
        storage.put(b"<svg/>", "svg")


def test_assets_lists_only_assets_directly_under_the_prefix(storage, tmp_path):
    """Skips deeper prefixes, the trash, the marker, other suffixes and names in a wrong folder."""
    asset = storage.put(b"one", "bin")
    storage.write_marker(b"{}", replace=False)
    for key in (
        f"deep/{asset.key}",
        f"trash/x/{asset.key}",
        f"00/{asset.sha256}.bin",
        f"{asset.key}.bak",
        "ab/x.bin",
    ):
        assert storage.move(storage.put(key.encode(), "png").key, key)
    assert [found.key for found, _ in storage.assets()] == [asset.key]
    assert [found.key for found, _ in storage.assets("trash/x/")] == [asset.key]


def test_move_and_remove(storage):
    asset = storage.put(b"one", "bin")
    assert storage.move(asset.key, "trash/a")
    assert not storage.move(asset.key, "trash/a")
    assert storage.find(asset.key) is None
    assert storage.find("trash/a").size == 3
    for _ in range(2):
        storage.remove("trash/a")
    assert storage.find("trash/a") is None


def test_write_marker_keeps_an_existing_one_unless_replace(storage):
    assert storage.read_marker() is None
    storage.write_marker(b"first", replace=False)
    storage.write_marker(b"second", replace=False)
    assert storage.read_marker() == b"first"
    storage.write_marker(b"third", replace=True)
    assert storage.read_marker() == b"third"


def test_recorder_is_called_before_an_asset_appears(storage):
    seen = []
    storage.write_marker(b"{}", replace=False)
    storage.set_recorder(lambda asset: seen.append((asset, storage.find(asset.key))))
    asset = storage.put(b"one", "bin")
    assert seen == [(asset, None)]


def test_put_refuses_a_folder_without_marker(tmp_path):
    storage = FolderStorage(tmp_path / "assets")
    storage.write_marker(b"{}", replace=False)
    storage.set_recorder(lambda asset: None)
    (tmp_path / "assets").rename(tmp_path / "elsewhere")
    (tmp_path / "assets").mkdir()
    with pytest.raises(CapacityError, match="marker is gone"):
        storage.put(b"one", "bin")
    assert not list((tmp_path / "assets").iterdir())


@given(st.text(max_size=120))
def test_parse_refuses_arbitrary_text(text: str):
    with pytest.raises(RequestError):
        Asset.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "asset:../../etc/passwd",
            "asset:" + "0" * 64,
            "asset:" + "0" * 64 + ".svg",
            "asset:" + "G" * 64 + ".mp4",
        ),
        *(
            "asset:" + "0" * 64 + ".mp4\n",
            "/asset:" + "0" * 64 + ".mp4",
            "asset:" + "0" * 63 + "/.mp4",
        ),
    ],
)
def test_parse_refuses_near_misses(text: str):
    with pytest.raises(RequestError):
        Asset.parse(text)


def test_read_refuses_symbolic_links(tmp_path):
    storage = FolderStorage(tmp_path / "assets")
    asset = storage.put(b"x", "bin")
    (tmp_path / "secret").write_text("secret")
    path = storage.folder / asset.key
    path.unlink()
    path.symlink_to(tmp_path / "secret")
    with pytest.raises(MediaError, match="link"):
        storage.read(asset)


def test_fetch_refuses_changed_content(tmp_path):
    storage = FolderStorage(tmp_path / "assets")
    asset = storage.put(CONTENT, "bin")
    path = storage.folder / asset.key
    path.write_bytes(CONTENT[:-1] + b"!")
    with pytest.raises(MediaError, match="damaged"):
        storage.fetch(asset, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_put_on_a_disk_that_fills_up_leaves_no_files(tmp_path, monkeypatch):
    storage = FolderStorage(tmp_path / "assets")
    for offset in range(0, len(CONTENT), len(CONTENT) // 200):

        def fill(_source, target, offset=offset):
            target.write(CONTENT[:offset])
            target.flush()
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(module, "copy_and_hash", fill)
        with pytest.raises(CapacityError, match="full"):
            storage.put(CONTENT, "bin")
        assert [path for path in storage.folder.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_put_on_a_failing_disk_leaves_no_files(tmp_path, monkeypatch, call: str, number: int):
    storage = FolderStorage(tmp_path / "assets")

    def fail(*_):
        raise OSError(number, os.strerror(number))

    if call == "replace":
        monkeypatch.setattr(Path, "replace", fail)
    else:
        monkeypatch.setattr(module.os, "fsync", fail)
    with pytest.raises(CapacityError) as full:
        storage.put(CONTENT, "bin")
    assert str(tmp_path) not in str(full.value)
    assert full.value.retry_after
    assert [path for path in storage.folder.rglob("*") if path.is_file()] == []


def test_put_syncs_content_before_rename(tmp_path, monkeypatch):
    storage, order = FolderStorage(tmp_path / "assets"), []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(module.os, "fsync", lambda number: (order.append("fsync"), fsync(number)))
    monkeypatch.setattr(
        Path, "replace", lambda self, to: (order.append("replace"), replace(self, to))[1]
    )
    storage.put(b"first in its folder", "bin")
    assert order == ["fsync", "fsync", "replace", "fsync"]


def test_find_references_in_nested_values():
    values = {
        "a": ["asset:1", {"b": "asset:2", "c": (1, None, "x")}],
        "d": "asset:3",
        "e": "an asset:4",
    }
    assert find_references(values) == {"asset:1", "asset:2", "asset:3"}


def test_open_storage_by_folder_or_url(tmp_path):
    assert isinstance(open_storage(str(tmp_path / "a")), FolderStorage)
    assert isinstance(open_storage(f"file://{tmp_path / 'b'}"), FolderStorage)
    assert isinstance(open_storage("memory:///"), ObjectStorage)
    with pytest.raises(ConfigError):
        open_storage("nothing://x")
