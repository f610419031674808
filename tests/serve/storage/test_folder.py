"""Files by their content: whole or not at all, only under their own names, in a folder or an object store."""

import errno
import io
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyloom.core.errors import CapacityError, ConfigError, MediaError, RequestError
from skyloom.serve.storage import folder as module
from skyloom.serve.storage.folder import (
    Asset,
    FolderStorage,
    ObjectStorage,
    find_references,
    open_storage,
)

CONTENT = bytes(range(256)) * 4_000


@pytest.fixture(params=["folder", "objects"])
def storage(request, tmp_path):
    """Either kind."""
    return (
        FolderStorage(tmp_path / "assets")
        if request.param == "folder"
        else ObjectStorage("memory:///")
    )


def test_what_was_put_is_read_whole_and_in_parts(storage, tmp_path):
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


def test_what_is_not_there_is_a_sentence_before_the_first_byte(storage, tmp_path):
    gone = Asset("0" * 64, "mp4")
    for look in (storage.size, storage.read, lambda asset: storage.fetch(asset, tmp_path / "x")):
        with pytest.raises(MediaError, match="gone"):
            look(gone)
    assert not (tmp_path / "x").exists()
    with pytest.raises(RequestError):
        storage.put(b"<svg/>", "svg")


def test_only_what_has_the_form_of_an_asset_is_listed(storage, tmp_path):
    """Not a prefix in the prefix, nor the trash, the note, another kind or a name in the wrong folder."""
    asset = storage.put(b"one", "bin")
    storage.write_note(b"{}", replace=False)
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


def test_an_object_is_moved_and_removed_or_was_not_there(storage):
    asset = storage.put(b"one", "bin")
    assert storage.move(asset.key, "trash/a")
    assert not storage.move(asset.key, "trash/a")
    assert storage.find(asset.key) is None
    assert storage.find("trash/a").size == 3
    for _ in range(2):
        storage.remove("trash/a")
    assert storage.find("trash/a") is None


def test_the_first_note_stays_unless_it_is_replaced(storage):
    assert storage.read_note() is None
    storage.write_note(b"first", replace=False)
    storage.write_note(b"second", replace=False)
    assert storage.read_note() == b"first"
    storage.write_note(b"third", replace=True)
    assert storage.read_note() == b"third"


def test_what_is_stored_is_recorded_before_it_appears(storage):
    seen = []
    storage.write_note(b"{}", replace=False)
    storage.own(lambda asset: seen.append((asset, storage.find(asset.key))))
    asset = storage.put(b"one", "bin")
    assert seen == [(asset, None)]


def test_a_folder_that_is_not_mounted_any_more_takes_nothing(tmp_path):
    storage = FolderStorage(tmp_path / "assets")
    storage.write_note(b"{}", replace=False)
    storage.own(lambda asset: None)
    (tmp_path / "assets").rename(tmp_path / "elsewhere")
    (tmp_path / "assets").mkdir()
    with pytest.raises(CapacityError, match="note is gone"):
        storage.put(b"one", "bin")
    assert not list((tmp_path / "assets").iterdir())


@given(st.text(max_size=120))
def test_no_text_but_a_reference_names_a_file(text: str):
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
def test_near_misses_are_no_references(text: str):
    with pytest.raises(RequestError):
        Asset.parse(text)


def test_a_link_is_no_asset(tmp_path):
    storage = FolderStorage(tmp_path / "assets")
    asset = storage.put(b"x", "bin")
    (tmp_path / "secret").write_text("secret")
    path = storage.folder / asset.key
    path.unlink()
    path.symlink_to(tmp_path / "secret")
    with pytest.raises(MediaError, match="link"):
        storage.read(asset)


def test_a_changed_file_is_not_fetched(tmp_path):
    storage = FolderStorage(tmp_path / "assets")
    asset = storage.put(CONTENT, "bin")
    path = storage.folder / asset.key
    path.write_bytes(CONTENT[:-1] + b"!")
    with pytest.raises(MediaError, match="damaged"):
        storage.fetch(asset, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_disk_that_fills_up_at_any_byte_leaves_nothing_behind(tmp_path, monkeypatch):
    storage = FolderStorage(tmp_path / "assets")
    for offset in range(0, len(CONTENT), len(CONTENT) // 200):

        def fill(_source, target, offset=offset):
            target.write(CONTENT[:offset])
            target.flush()
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(module, "copy_hashed", fill)
        with pytest.raises(CapacityError, match="full"):
            storage.put(CONTENT, "bin")
        assert [path for path in storage.folder.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_full_or_broken_disk_leaves_nothing_behind(tmp_path, monkeypatch, call: str, number: int):
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


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    storage, order = FolderStorage(tmp_path / "assets"), []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(module.os, "fsync", lambda number: (order.append("fsync"), fsync(number)))
    monkeypatch.setattr(
        Path, "replace", lambda self, to: (order.append("replace"), replace(self, to))[1]
    )
    storage.put(b"first in its folder", "bin")
    assert order == ["fsync", "fsync", "replace", "fsync"]


def test_references_are_found_however_deep():
    values = {
        "a": ["asset:1", {"b": "asset:2", "c": (1, None, "x")}],
        "d": "asset:3",
        "e": "an asset:4",
    }
    assert find_references(values) == {"asset:1", "asset:2", "asset:3"}


def test_places_are_folders_or_urls(tmp_path):
    assert isinstance(open_storage(str(tmp_path / "a")), FolderStorage)
    assert isinstance(open_storage(f"file://{tmp_path / 'b'}"), FolderStorage)
    assert isinstance(open_storage("memory:///"), ObjectStorage)
    with pytest.raises(ConfigError):
        open_storage("nothing://x")
