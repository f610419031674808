"""The cache of embeddings: exact values, a size limit, damaged files, privacy, the switch."""

import os
import stat
from pathlib import Path

import pytest
import torch

from skyloom.models.embedding_cache import EmbeddingCache, embedding_cache


def files(cache: EmbeddingCache) -> list[Path]:
    return sorted(path for path in cache.folder.iterdir() if path.is_file())


@pytest.fixture
def cache(tmp_path):
    return EmbeddingCache(tmp_path / "cache" / "embeddings")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embedding_comes_back_with_the_same_bits(cache, dtype):
    value = torch.randn(7, 16).to(dtype)
    assert cache.load("a") is None
    cache.save("a", value)
    found = cache.load("a")
    assert found.dtype == dtype
    assert torch.equal(found, value)
    assert cache.load("b") is None


def test_part_of_a_tensor_is_stored_alone(cache):
    cache.save("a", torch.randn(1000, 16)[:2])
    assert files(cache)[0].stat().st_size < 1000


@pytest.mark.parametrize("where", [0, 40, -1])
def test_damaged_files_are_ignored_and_written_again(cache, where):
    value = torch.randn(3, 4)
    cache.save("a", value)
    (path,) = files(cache)
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)
    assert cache.load("a") is None
    cache.save("a", value)
    assert torch.equal(cache.load("a"), value)
    path.write_bytes(content[:-5])
    assert cache.load("a") is None
    path.write_bytes(b"")
    assert cache.load("a") is None


def test_a_file_under_the_name_of_another_is_ignored(cache):
    cache.save("a", torch.ones(2, 2))
    cache.save("b", torch.zeros(2, 2))
    first, second = files(cache)
    first.replace(second)
    assert cache.load("a") is None
    assert cache.load("b") is None


def test_the_least_recently_used_are_removed(cache):
    value = torch.zeros(10, 10)
    for age, key in enumerate("abc"):
        cache.save(key, value)
        os.utime(cache._path(key), (age, age))
    size = files(cache)[0].stat().st_size
    cache.max_bytes = 3 * size
    assert cache.load("a") is not None  # a is now the latest, b the oldest
    cache.save("d", value)
    assert [cache.load(key) is not None for key in "abcd"] == [True, False, True, True]
    assert sum(path.stat().st_size for path in files(cache)) <= cache.max_bytes


def test_only_the_owner_may_read_and_no_prompt_is_stored(cache):
    cache.save("a secret prompt", torch.ones(2, 2))
    (path,) = files(cache)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(cache.folder.stat().st_mode) == 0o700
    assert b"secret" not in path.read_bytes()
    assert "secret" not in path.name


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    cache = EmbeddingCache(tmp_path / "file" / "embeddings")
    cache.save("a", torch.ones(2, 2))
    assert cache.load("a") is None


def test_the_switch_turns_it_off(monkeypatch, tmp_path):
    monkeypatch.setenv("SKYLOOM_CACHE", str(tmp_path))
    found = embedding_cache()
    assert found is not None
    assert found.folder == tmp_path / "embeddings"
    monkeypatch.setenv("SKYLOOM_CACHE", "off")
    assert embedding_cache() is None
