"""What was made is found again by its file, frames, id or look, and only then."""

import stat

import pytest

from skyloom.core.errors import MediaError
from skyloom.safety.provenance import Match, ProvenanceRecord, Registry, phash, sha256_file


def making(number: int, **fields) -> ProvenanceRecord:
    """A making with everything in it."""
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
    """Three makings."""
    kept = Registry(tmp_path / "data" / "registry.sqlite")
    for number in range(3):
        kept.add(making(number))
    return kept


@pytest.mark.parametrize(
    ("asked", "by"),
    [
        ({"sha256": "s1"}, "file"),
        ({"frames": "f1"}, "frames"),
        ({"identities": ["000000000001"]}, "watermark"),
    ],
)
def test_a_making_is_found(registry, asked, by):
    assert registry.find(**asked) == [Match(by, making(1))]


def test_nothing_else_is_found(registry, tmp_path):
    assert registry.find(sha256="s9", frames="", identities=["9"], looks=["0" * 16]) == []
    assert Registry(tmp_path / "none.sqlite").find(sha256="s1") == []
    assert not (tmp_path / "none.sqlite").exists()


def test_the_same_file_is_told_once_and_its_content_is_for_the_owner(registry):
    assert [match.by for match in registry.find(sha256="s2", frames="f2")] == ["file"]
    assert stat.S_IMODE(registry.path.stat().st_mode) == 0o600


def test_a_look_survives_what_a_mark_may_not(registry, scene):
    one, other = scene(1, count=1)[0], scene(2, count=1)[0]
    registry.add(making(5, looks=(phash(one), phash(other))))
    smaller = (one[::2, ::2].float() * 0.8 + 20).byte()
    assert [match.by for match in registry.find(looks=[phash(smaller)])] == ["look"]
    assert registry.find(looks=[phash(scene(3, count=1)[0])]) == []


def test_a_registry_that_is_none_is_told(tmp_path):
    path = tmp_path / "registry.sqlite"
    path.write_text("no database, and long enough to be taken for one" * 100)
    with pytest.raises(MediaError, match="cannot be used"):
        Registry(path).find(sha256="s1")
    with pytest.raises(MediaError, match="cannot be read"):
        sha256_file(tmp_path / "gone.mp4")
