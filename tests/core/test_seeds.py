"""Seeds: the same purpose always draws the same numbers, another purpose draws others."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from skyloom.core.seeds import chain_frames, derive_seed, generator, noise
from skyloom.core.types import MAX_SEED

SEEDS = st.integers(0, MAX_SEED)
PATHS = st.lists(st.integers(0, 10**6) | st.sampled_from(["noise", "window", "text"]), max_size=4)


@given(SEEDS, PATHS)
def test_derived_seeds_are_in_range_and_repeat(seed: int, path: list[int | str]):
    derived = derive_seed(seed, *path)
    assert 0 <= derived <= MAX_SEED
    assert derive_seed(seed, *path) == derived


def test_derived_seeds_never_change_between_releases():
    assert derive_seed(7, "window", 2, "noise") == 2122211121231401342


def test_every_step_of_the_path_counts():
    paths = [(), (0,), (1,), (0, 0), (0, 1), (10,), (1, 0), ("noise",), ("noise", 0), ("window", 0)]
    assert len({derive_seed(seed, *path) for seed in (0, 1, 10) for path in paths}) == 3 * len(
        paths
    )


def test_noise_does_not_depend_on_what_was_drawn_before():
    first = noise(3, (2, 4), "window", 1)
    torch.randn(100)
    noise(3, (50,), "window", 0)
    assert torch.equal(noise(3, (2, 4), "window", 1), first)
    assert not torch.equal(noise(3, (2, 4), "window", 2), first)


def test_drawing_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    noise(1, (10,))
    generator(1, "noise")
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_is_standard_normal():
    drawn = noise(0, (100_000,))
    assert abs(float(drawn.mean())) < 0.02
    assert abs(float(drawn.std()) - 1) < 0.02


def test_chained_noise_is_standard_normal_and_alike_from_frame_to_frame():
    fresh = noise(0, (1, 8, 40, 16, 16))
    chained = chain_frames(fresh, 0.8)
    assert torch.equal(chain_frames(fresh, 0.0), fresh)
    assert torch.equal(chained[:, :, 0], fresh[:, :, 0])
    spread = chained.std(dim=(0, 1, 3, 4))
    assert (spread - 1).abs().max() < 0.07
    alike = (chained[:, :, 1:] * chained[:, :, :-1]).mean(dim=(0, 1, 3, 4))
    assert (alike - 0.8).abs().max() < 0.08


def test_a_chain_cut_in_two_is_the_same_chain():
    fresh = noise(0, (1, 2, 9, 4, 4))
    whole, first = chain_frames(fresh, 0.6), chain_frames(fresh[:, :, :4], 0.6)
    rest = chain_frames(fresh[:, :, 4:], 0.6, first[:, :, -1])
    assert torch.equal(torch.cat([first, rest], dim=2), whole)
