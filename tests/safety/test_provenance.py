"""Provenance registry: records are found by file, frames, watermark id or perceptual hash."""

import stat

import pytest

from skyloom.core.errors import MediaError
from skyloom.safety.provenance import Match, ProvenanceRecord, Registry, content_sha256, phash


def record(number: int, **fields) -> ProvenanceRecord:
    """Return a complete record."""
    values = {
        "name": f"{number}.mp4",
        "sha256": f"s{number}",
        "frames": f"f{number}",
        "identity": f"{number:012x}",
    }
    return ProvenanceRecord(
        **{**values, "generation": {"seed": number}, "made_at": "2026-11-25T12:00:00Z", **fields}
    )


@pytest.fixture
def registry(tmp_path) -> Registry:
    """Return a registry with three records."""
    kept = Registry(tmp_path / "data" / "registry.sqlite")
    for number in range(3):
        kept.add(record(number))
    return kept


@pytest.mark.parametrize(
    ("criteria", "by"),
    [
        ({"sha256": "s1"}, "file"),
        ({"frames": "f1"}, "frames"),
        ({"identities": ["000000000001"]}, "watermark"),
    ],
)
def test_a_record_is_found(registry, criteria, by):
    assert registry.find(**criteria) == [Match(by, record(1))]


def test_nothing_else_is_found(registry, tmp_path):
    assert registry.find(sha256="s9", frames="", identities=["9"], hashes=["0" * 16]) == []
    assert Registry(tmp_path / "none.sqlite").find(sha256="s1") == []
    assert not (tmp_path / "none.sqlite").exists()


def test_matches_are_unique_and_the_file_is_private(registry):
    assert [match.by for match in registry.find(sha256="s2", frames="f2")] == ["file"]
    assert stat.S_IMODE(registry.path.stat().st_mode) == 0o600


def test_perceptual_hashes_survive_resizing_and_brightness(registry, scene):
    one, other = scene(1, count=1)[0], scene(2, count=1)[0]
    registry.add(record(5, hashes=(phash(one), phash(other))))
    smaller = (one[::2, ::2].float() * 0.8 + 20).byte()
    assert [match.by for match in registry.find(hashes=[phash(smaller)])] == ["look"]
    assert registry.find(hashes=[phash(scene(3, count=1)[0])]) == []


def test_invalid_database_raises_media_error(tmp_path):
    path = tmp_path / "registry.sqlite"
    path.write_text("no database, and long enough to be taken for one" * 100)
    with pytest.raises(MediaError, match="cannot be used"):
        Registry(path).find(sha256="s1")
    with pytest.raises(MediaError, match="cannot be read"):
        content_sha256(tmp_path / "gone.mp4")
