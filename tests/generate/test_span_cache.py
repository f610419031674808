"""The cache of made spans: found by what they hang on, never in the way when it fails."""

import os
from dataclasses import replace

import pytest
import torch
from skyloom.generate.span_cache import SpanIdentity, SpanStore

from skyloom.core.paths import cache_folder
from skyloom.generate.timeline import Generate, SourceClip

SPAN = Generate(4, "a cat", "retake", before=SourceClip(0, 0, 4), after=SourceClip(0, 8, 12))
LATENT = torch.arange(24.0).reshape(1, 2, 3, 2, 2)


def test_what_was_kept_is_found_by_all_that_it_hangs_on(tmp_path):
    store = SpanStore(tmp_path, SpanIdentity({"seed": 1}, ["cat.mp4"]))
    assert store.load(SPAN) is None
    store.save(SPAN, LATENT)
    assert torch.equal(
        SpanStore(tmp_path, SpanIdentity({"seed": 1}, ["cat.mp4"])).load(SPAN), LATENT
    )
    for other in (
        SpanStore(tmp_path, SpanIdentity({"seed": 2}, ["cat.mp4"])),
        SpanStore(tmp_path, SpanIdentity({"seed": 1}, ["dog.mp4"])),
    ):
        assert other.load(SPAN) is None
    for changed in (
        replace(SPAN, prompt="a dog"),
        replace(SPAN, after=SourceClip(0, 8, 13)),
        replace(SPAN, strength=0.5),
    ):
        assert store.load(changed) is None


@pytest.mark.parametrize("damage", [b"", b"not tensors", None])
def test_a_damaged_file_is_passed_over(tmp_path, damage):
    store = SpanStore(tmp_path, SpanIdentity({}, ["cat.mp4"]))
    store.save(SPAN, LATENT)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-8] if damage is None else damage)
    assert store.load(SPAN) is None
    store.save(SPAN, LATENT)
    assert torch.equal(store.load(SPAN), LATENT)


def test_the_oldest_go_when_there_are_too_many(tmp_path):
    store = SpanStore(tmp_path, SpanIdentity({}, ["cat.mp4"]))
    spans = [replace(SPAN, name=str(number)) for number in range(3)]
    for number, span in enumerate(spans):
        store.save(span, LATENT)
        newest = max(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, (number, number))
    size = next(tmp_path.iterdir()).stat().st_size
    bounded = SpanStore(tmp_path, SpanIdentity({}, ["cat.mp4"]), max_bytes=3 * size)
    bounded.save(replace(SPAN, name="3"), LATENT)
    assert [bounded.load(span) is None for span in spans] == [True, False, False]


def test_a_folder_that_cannot_be_made_stops_nobody(tmp_path):
    (tmp_path / "file").write_text("")
    store = SpanStore(tmp_path / "file" / "spans", SpanIdentity({}, ["cat.mp4"]))
    store.save(SPAN, LATENT)
    assert store.load(SPAN) is None


def test_where_the_cache_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("SKYLOOM_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv("SKYLOOM_CACHE", "off")
    assert cache_folder() is None
    monkeypatch.delenv("SKYLOOM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "skyloom"
