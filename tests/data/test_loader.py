"""Batches depend on (seed, step) alone, and captions find their contexts."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from skyloom.core.errors import ConfigError
from skyloom.data.encode import to_pixels
from skyloom.data.loader import (
    CaptionTable,
    LatentLoader,
    LatentSource,
    PixelLoader,
    excerpt_frame_indices,
    rollout_frame_indices,
)

CAPTIONS = ["", "a cat", "a dog on the beach"]


@pytest.fixture
def table(tmp_path) -> CaptionTable:
    """Three captions of 2, 3 and 5 tokens; every value says which caption it belongs to."""
    lengths = torch.tensor([2, 3, 5])
    tokens = torch.repeat_interleave(torch.arange(3.0), lengths)[:, None].expand(-1, 4)
    pooled = torch.arange(3.0)[:, None].expand(-1, 4)
    path = tmp_path / "captions.safetensors"
    tensors = {"tokens": tokens.contiguous(), "lengths": lengths, "pooled": pooled.contiguous()}
    save_file(tensors, path, metadata={"captions": json.dumps(CAPTIONS)})
    return CaptionTable(path)


@pytest.fixture
def folder(tmp_path):
    """Ten clips whose latent value is their index; even ones show a cat, odd ones a dog."""
    out = tmp_path / "clips"
    out.mkdir()
    frames = np.arange(10, dtype=np.uint8)[:, None, None, None, None] * np.ones(
        (1, 5, 8, 8, 3), np.uint8
    )
    np.save(out / "clips-00000.npy", frames)
    lengths = ("short", "medium", "long")
    rows = [
        {"seed": index, "captions": dict.fromkeys(lengths, CAPTIONS[1 + index % 2])}
        for index in range(10)
    ]
    (out / "clips-00000.json").write_text(json.dumps(rows))
    latent = torch.arange(10.0)[:, None, None, None, None].expand(10, 2, 2, 1, 1).contiguous()
    save_file({"latent": latent.bfloat16()}, out / "clips-00000.latents.safetensors")
    return out


def test_contexts_are_padded_and_masked(table):
    context, mask, pooled = table.gather([2, 1])
    assert context.shape == (2, 8, 4)
    assert mask.sum(1).tolist() == [5, 3]
    assert torch.equal(context[0, :5], torch.full((5, 4), 2.0))
    assert not context[~mask].any()
    assert pooled[:, 0].tolist() == [2.0, 1.0]


def test_latents_come_with_their_own_captions(table, folder):
    batch = LatentLoader((LatentSource(str(folder), batch=32),), table, seed=0)(5)
    for value, row in zip(batch.latent[:, 0, 0, 0, 0].tolist(), batch.rows, strict=True):
        assert CAPTIONS[row] == CAPTIONS[1 + int(value) % 2]


def test_dropped_captions_become_the_empty_one(table, folder):
    batch = LatentLoader((LatentSource(str(folder), batch=2),), table, seed=0)(0)
    context, mask, _ = batch.captions(torch.tensor([True, False]))
    assert mask[0].sum() == 2
    assert not context[0].any()
    assert context[1].any()


def test_hidden_words_lose_their_own_vectors(table, folder):
    batch = LatentLoader([LatentSource(str(folder), batch=2)], table, seed=0)(0)
    keep = torch.tensor([False, False])
    context, _, pooled = batch.captions(keep)
    less, _, bare = batch.captions(keep, torch.tensor([True, False]))
    half = context.shape[-1] // 2
    assert torch.equal(less[:, :, :half], context[:, :, :half])
    assert torch.equal(less[1], context[1])
    assert torch.equal(bare[1], pooled[1])
    assert not less[0, :, half:].any()
    assert not bare[0, half : 2 * half].any()
    assert context[0, :, half:].any()


def test_a_step_always_gives_the_same_batch(table, folder):
    first, second = (LatentLoader((LatentSource(str(folder)),), table, seed=4) for _ in range(2))
    first(0)
    assert torch.equal(first(7).latent, second(7).latent)
    assert not torch.equal(first(7).latent, first(8).latent)


def test_sources_are_drawn_by_share(table, folder):
    sources = (
        LatentSource(str(folder), share=3, batch=1),
        LatentSource(str(folder), share=1, batch=2),
    )
    loader = LatentLoader(sources, table, seed=0)
    small = sum(len(loader(step).latent) == 1 for step in range(400))
    assert 260 < small < 340


def test_crops_are_pixels_of_the_clips(folder):
    loader = PixelLoader([folder], batch=6, frames=3, crop=4, seed=1)
    batch = loader(2)
    assert batch.shape == (6, 3, 3, 4, 4)
    values = {round(float(value)) for value in (batch + 1) * 127.5 for value in value.unique()}
    assert values <= set(range(10))
    assert torch.equal(batch, loader(2))


def test_frames_become_floats_between_minus_one_and_one():
    frames = torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 2, 1, 1, 1).expand(1, 2, 1, 1, 3)
    assert to_pixels(frames).shape == (1, 3, 2, 1, 1)
    assert to_pixels(frames)[0, 0, :, 0, 0].tolist() == [-1.0, 1.0]


def test_unencoded_clips_are_refused(table, folder):
    (folder / "clips-00000.latents.safetensors").unlink()
    with pytest.raises(ConfigError, match="not encoded"):
        LatentLoader((LatentSource(str(folder)),), table, seed=0)


@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 20),
    st.integers(0, 10**6),
)
def test_a_window_of_a_rollout_sees_the_first_frames_and_those_before_it(
    sink, recent, window, more, seed
):
    frames = sink + recent + window + more
    numbers = rollout_frame_indices(
        frames, (sink, recent, window), np.random.default_rng(seed)
    ).tolist()
    assert numbers[:sink] == list(range(sink))
    assert numbers[sink:] == list(range(numbers[sink], numbers[sink] + recent + window))
    assert sink <= numbers[sink]
    assert numbers[-1] < frames
    assert (numbers[-1] + 1 - sink - recent) % window == 0


def test_a_rollout_needs_videos_long_enough(table, folder):
    batch = LatentLoader((LatentSource(str(folder), batch=4, rollout=(1, 1, 1)),), table, seed=0)
    with pytest.raises(ConfigError, match="must have >= 3 latent frames"):
        batch(0)
    with pytest.raises(ConfigError, match="must be sink, recent and window"):
        LatentSource(str(folder), rollout=(1, 2))


def test_a_rollout_batch_is_cut_from_its_videos(table, folder):
    latent = torch.arange(12.0)[None, None, :, None, None].expand(10, 2, 12, 1, 1).contiguous()
    save_file({"latent": latent.bfloat16()}, folder / "clips-00000.latents.safetensors")
    loader = LatentLoader((LatentSource(str(folder), batch=4, rollout=(2, 3, 3)),), table, seed=0)
    starts = set()
    for step in range(8):
        batch = loader(step)
        assert batch.past == 5
        assert torch.equal(batch.latent[0, 0, :, 0, 0].long(), batch.frame_indices)
        starts.add(int(batch.frame_indices[-3]))
    assert starts == {5, 8}


@given(st.integers(0, 10**6))
def test_an_excerpt_is_a_run_after_the_first_window(seed: int):
    numbers = excerpt_frame_indices(29, 9, np.random.default_rng(seed)).tolist()
    assert 5 <= len(numbers) <= 9
    assert numbers == list(range(numbers[0], numbers[-1] + 1))
    assert numbers[0] >= 9
    assert numbers[-1] <= 28


def test_excerpts_reach_both_edges_and_need_room():
    runs = [
        excerpt_frame_indices(18, 9, np.random.default_rng(seed)).tolist() for seed in range(200)
    ]
    assert {run[0] for run in runs} >= {9, 13}
    assert {run[-1] for run in runs} >= {13, 17}
    with pytest.raises(ConfigError, match="must have >= 18"):
        excerpt_frame_indices(17, 9, np.random.default_rng(0))
    with pytest.raises(ConfigError, match="only one of rollout and excerpt"):
        LatentSource("x", rollout=(3, 3, 3), excerpt=9)
