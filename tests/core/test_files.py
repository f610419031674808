"""Files: digests, atomic writes and media types; folders of the user."""

import errno
import hashlib
from pathlib import Path

import pytest

from skyloom.core import files
from skyloom.core.files import (
    TEMPORARY_SUFFIX,
    atomic_path,
    sha256_file,
    sniff,
    write_atomically,
)
from skyloom.core.paths import cache_folder, data_folder, state_folder


def test_sha256_file(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


def test_atomic_path_replaces_the_file_on_success(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path
        assert temporary.suffix == TEMPORARY_SUFFIX
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_path_keeps_the_old_file_on_failure(tmp_path: Path, error: type[BaseException]):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), atomic_path(path) as temporary:
        temporary.write_text("new")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_failed_sync_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", refuse)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "a", b"content")
    assert not list(tmp_path.iterdir())


def test_write_atomically_is_private(tmp_path: Path):
    write_atomically(tmp_path / "a", b"content")
    assert (tmp_path / "a").read_bytes() == b"content"
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("start", "media_type"),
    [
        (b"\x89PNG\r\n\x1a\n", "image/png"),
        (b"\xff\xd8\xff\xe0", "image/jpeg"),
        (b"GIF89a", "image/gif"),
        (b"BM", "image/bmp"),
        (b"RIFF\0\0\0\0WEBP", "image/webp"),
        (b"RIFF\0\0\0\0AVI ", "video/avi"),
        (b"RIFF\0\0\0\0WAVE", None),
        (b"\0\0\0\x20ftypisom", "video/mp4"),
        (b"\0\0\0\x14ftypqt  ", "video/quicktime"),
        (b"\0\0\0\x20ftypavif", None),
        (b"\0\0\0\x20ftypheic", None),
        (b"\0\0\0\x08wide", "video/quicktime"),
        (b"\x1a\x45\xdf\xa3\x9fB\x82\x84webm", "video/webm"),
        (b"\x1a\x45\xdf\xa3\x9fB\x82\x88matroska", "video/x-matroska"),
        (b"hello", None),
        (b"", None),
    ],
)
def test_sniff(start: bytes, media_type: str | None):
    assert sniff(start) == media_type


@pytest.mark.parametrize(
    ("function", "variable", "xdg_variable", "default"),
    [
        (data_folder, "SKYLOOM_DATA", "XDG_DATA_HOME", ".local/share"),
        (state_folder, "SKYLOOM_STATE", "XDG_STATE_HOME", ".local/state"),
        (cache_folder, "SKYLOOM_CACHE", "XDG_CACHE_HOME", ".cache"),
    ],
)
def test_folders(monkeypatch: pytest.MonkeyPatch, function, variable, xdg_variable, default):
    monkeypatch.setenv(variable, "/own")
    monkeypatch.setenv(xdg_variable, "/shared")
    assert function() == Path("/own")
    monkeypatch.delenv(variable)
    assert function() == Path("/shared/skyloom")
    monkeypatch.delenv(xdg_variable)
    assert function() == Path.home() / default / "skyloom"


def test_cache_can_be_switched_off(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SKYLOOM_CACHE", "off")
    assert cache_folder() is None
