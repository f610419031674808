"""The cache of finished windows: keyed by all that determines them, optional at any time."""

import os
from dataclasses import replace

import pytest
import torch

import skyloom
from skyloom.core.paths import cache_folder
from skyloom.generate.cards import Card
from skyloom.generate.denoiser import Denoiser
from skyloom.generate.latent_store import FinishedWindow, WindowCache
from skyloom.generate.request import Request
from skyloom.generate.window_keys import window_keys

WINDOW = FinishedWindow(torch.arange(24.0).reshape(1, 2, 3, 2, 2), 1, [{"score": 0.5}])
CARDS = (
    Card("0", "a red cat"),
    Card("1.5", "a dog on the beach"),
    Card("3", "a red dog", cut=True),
)
BOARD = Request("", seed=7, seconds=4, num_steps=1, cards=CARDS)


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    return skyloom.load(str(tiny_model), dtype="float32")


def keys(pipeline, request):
    """The key of every window, with the index of its card."""
    (run,) = (plan := pipeline.plan(request)).runs
    found = window_keys(plan, run, pipeline.info, pipeline.device, pipeline.dtype)
    return [(window.span, key) for window, key in zip(run.windows, found, strict=True)]


def test_a_window_is_found_by_its_key(tmp_path):
    WindowCache(tmp_path).save("one", WINDOW)
    found = WindowCache(tmp_path).load("one")
    assert torch.equal(found.latent, WINDOW.latent)
    assert (found.take, found.scores) == (1, [{"score": 0.5}])
    assert WindowCache(tmp_path).load("two") is None


@pytest.mark.parametrize("damage", [b"", b"not tensors", None])
def test_a_damaged_file_counts_as_missing(tmp_path, damage):
    cache = WindowCache(tmp_path)
    cache.save("one", WINDOW)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-8] if damage is None else damage)
    assert cache.load("one") is None
    cache.save("one", WINDOW)
    assert torch.equal(cache.load("one").latent, WINDOW.latent)


def test_the_least_recently_used_windows_are_removed_above_the_limit(tmp_path):
    cache = WindowCache(tmp_path)
    for number in range(3):
        cache.save(str(number), WINDOW)
        newest = max(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, (number, number))
    size = next(tmp_path.iterdir()).stat().st_size
    bounded = WindowCache(tmp_path, max_bytes=3 * size)
    bounded.save("3", WINDOW)
    assert [bounded.load(str(number)) is None for number in range(3)] == [True, False, False]


def test_a_folder_that_cannot_be_made_is_ignored(tmp_path):
    (tmp_path / "file").write_text("")
    cache = WindowCache(tmp_path / "file" / "spans")
    cache.save("one", WINDOW)
    assert cache.load("one") is None


def test_the_folder_of_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SKYLOOM_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv("SKYLOOM_CACHE", "off")
    assert cache_folder() is None
    monkeypatch.delenv("SKYLOOM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "skyloom"


def test_a_changed_card_changes_its_own_keys_and_those_that_continue_from_it(pipeline):
    before = keys(pipeline, BOARD)
    for changed, same in ((0, {2}), (1, {0, 2}), (2, {0, 1})):
        cards = list(CARDS)
        cards[changed] = replace(CARDS[changed], prompt="a boat")
        after = keys(pipeline, replace(BOARD, cards=tuple(cards)))
        kept = {span for (span, key), (_, other) in zip(before, after, strict=True) if key == other}
        lost = {span for (span, key), (_, other) in zip(before, after, strict=True) if key != other}
        assert (kept, lost) == (same, {0, 1, 2} - same)
    for fields in ({"seed": 8}, {"num_steps": 2}, {"negative_prompt": "a boat"}):
        others = {key for _, key in keys(pipeline, replace(BOARD, **fields))}
        assert not others & {key for _, key in before}


def test_a_changed_storyboard_generates_only_what_changed(pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv("SKYLOOM_CACHE", "off")
    cards = (*CARDS[:1], replace(CARDS[1], prompt="a boat"), *CARDS[2:])
    changed = replace(BOARD, cards=cards)
    expected = pipeline.generate(changed).frames
    calls = []
    velocity = Denoiser.velocity
    monkeypatch.setattr(Denoiser, "velocity", lambda *given: calls.append(1) or velocity(*given))
    monkeypatch.setenv("SKYLOOM_CACHE", str(tmp_path))
    pipeline.generate(BOARD)
    assert len(calls) == len(pipeline.plan(BOARD).windows)
    calls.clear()
    assert torch.equal(pipeline.generate(changed).frames, expected)
    assert len(calls) == sum(window.span == 1 for window in pipeline.plan(changed).windows)
    calls.clear()
    assert torch.equal(pipeline.generate(changed).frames, expected)
    assert not calls
