"""Training noise: bounds, patterns and determinism."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skyloom.core.errors import ConfigError
from skyloom.core.seeds import generator
from skyloom.diffusion.timesteps import (
    CLEAN_SIGMA,
    LAYOUT_SIGMA,
    PATTERNS,
    ContextConfig,
    NoiseConfig,
    loss_weight,
    sample_contexts,
    sample_levels,
    sample_sigmas,
)


def only(pattern: str, **fields: float) -> NoiseConfig:
    return NoiseConfig(**{name: float(name == pattern) for name in PATTERNS}, **fields)


def runs_known(row: torch.Tensor, config: NoiseConfig) -> tuple[int, int]:
    """How many frames at either end differ from the level of the frames that are made."""
    made = row.max()
    known = (row != made).tolist()
    first_made = known.index(False)
    last_made = len(known) - 1 - known[::-1].index(False)
    assert not any(known[first_made : last_made + 1])
    assert all(level <= config.context_noise for level in row[row != made])
    return first_made, len(known) - 1 - last_made


@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 10**6), st.floats(0.2, 8))
def test_levels_are_in_range_and_come_from_the_generator_alone(
    batch: int, frames: int, seed: int, shift: float
):
    config = NoiseConfig(shift=shift)
    sigma = sample_sigmas(batch, frames, generator(seed), config)
    assert sigma.shape == (batch, frames)
    assert ((sigma >= 0) & (sigma <= 1)).all()
    torch.manual_seed(0)
    assert torch.equal(sigma, sample_sigmas(batch, frames, generator(seed), config))


@given(st.sampled_from(PATTERNS), st.integers(2, 9), st.integers(0, 10**6))
def test_every_pattern_leaves_something_to_make(pattern: str, frames: int, seed: int):
    sigma = sample_sigmas(8, frames, generator(seed), only(pattern, context_noise=0.0))
    assert (sigma > 0).any(dim=1).all()


def test_same_gives_one_level_per_sample():
    sigma = sample_sigmas(32, 6, generator(1), only("same"))
    assert (sigma == sigma[:, :1]).all()
    assert len(sigma[:, 0].unique()) == 32


def test_independent_gives_every_frame_its_own_level():
    assert len(sample_sigmas(16, 6, generator(1), only("independent")).unique()) == 96


def test_window_levels_hold_for_whole_windows():
    sigma = sample_sigmas(16, 7, generator(1), only("window"))
    assert (sigma[:, :3] == sigma[:, :1]).all()
    assert (sigma[:, 3:6] == sigma[:, 3:4]).all()
    assert len(sigma.unique()) == 48


@pytest.mark.parametrize("pattern", ["prefix", "first", "infill"])
def test_known_frames_lie_where_the_pattern_says(pattern: str):
    config = only(pattern, context_noise=1e-3)
    ends = [runs_known(row, config) for row in sample_sigmas(300, 6, generator(2), config)]
    heads, tails = {head for head, _ in ends}, {tail for _, tail in ends}
    assert heads == {"prefix": {1, 2, 3, 4, 5}, "first": {1}, "infill": {1, 2, 3, 4}}[pattern]
    assert tails == {"prefix": {0}, "first": {0}, "infill": {1, 2, 3, 4}}[pattern]


def test_about_half_of_the_known_frames_are_clean():
    sigma = sample_sigmas(2000, 4, generator(3), only("first"))[:, 0]
    assert 0.45 < (sigma == 0).double().mean() < 0.55
    assert 0.14 < sigma.max() <= 0.15


def test_levels_follow_the_logistic_normal_law():
    config = NoiseConfig(shift=2.0, uniform_share=0.0)
    level = sample_levels((20_000,), generator(4), config).double()
    odds = (level / (1 - level)).log()
    assert abs(odds.mean() - torch.tensor(2.0).log()) < 0.03
    assert abs(odds.std() - 1) < 0.03


def test_a_share_of_uniform_levels_reaches_the_ends():
    config = NoiseConfig(shift=1.0, spread=0.01, uniform_share=0.25)
    level = sample_levels((20_000,), generator(5), config)
    assert abs(((level < 0.4) | (level > 0.6)).double().mean() - 0.25 * 0.8) < 0.02


def test_clean_frames_have_no_weight():
    assert loss_weight(torch.tensor([[0.0, CLEAN_SIGMA, 0.021, 1.0]])).tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize(
    "wrong", [{name: 0.0 for name in PATTERNS}, {"same": -1.0}, {"shift": 0.0}]
)
def test_impossible_mixes_are_refused(wrong: dict[str, float]):
    with pytest.raises(ConfigError):
        NoiseConfig(**wrong)


def test_layout_levels_are_uniform_above_their_bound():
    levels = sample_levels((4000,), generator(0), NoiseConfig(layout_share=1.0))
    assert levels.min() >= LAYOUT_SIGMA
    assert levels.mean() == pytest.approx((1 + LAYOUT_SIGMA) / 2, abs=0.003)


@given(st.integers(2, 12), st.integers(1, 4), st.integers(0, 10**6), st.floats(0, 1))
def test_contexts_end_where_windows_do(frames: int, window: int, seed: int, share: float):
    config = ContextConfig(share, 0.2, window)
    context = sample_contexts(6, frames, generator(seed), config)
    for row in context:
        past = int(torch.isfinite(row).sum())
        assert past in (0, 1, *range(window, frames, window))
        assert torch.isfinite(row[:past]).all()
        assert past == 0 or (row[0] <= 0.2 and (row[:past] == row[0]).all())


def test_cached_frames_of_a_rollout_are_known():
    context = sample_contexts(20, 9, generator(0), ContextConfig(0.0, 0.2, 3, past=6))
    assert torch.isfinite(context).sum(1).tolist() == [6] * 20
    sigma = sample_sigmas(400, 9, generator(1), NoiseConfig(context_noise=0.1), past=6)
    known = (sigma[:, :6] <= 0.1).all(1)
    assert 0.65 < known.float().mean() < 0.85
    assert (sigma[:, 6:] == sigma[:, 6:7]).all()


def test_suffix_knows_the_last_frames_alone():
    config = only("suffix", context_noise=0.0)
    sigma = sample_sigmas(64, 9, generator(4), config)
    before, after = zip(*(runs_known(row, config) for row in sigma), strict=True)
    assert set(before) == {0}
    assert set(after) == set(range(1, 9))


def test_edits_within_a_video_nearly_always_have_known_frames():
    config = only("same", context_noise=0.0)
    sigma = sample_sigmas(400, 9, generator(5), config, middle=True)
    ends = [runs_known(row, config) for row in sigma]
    shares = [
        sum(bool(test(*one)) for one in ends) / 400
        for test in (lambda a, b: a and b, lambda a, b: b > 0, lambda a, b: a or b)
    ]
    assert 0.35 < shares[0] < 0.55
    assert 0.6 < shares[1] < 0.8
    assert 0.9 < shares[2] < 1


@given(st.integers(2, 9), st.integers(0, 10**6))
def test_known_ends_leave_one_run_to_make(frames: int, seed: int):
    context = sample_contexts(8, frames, generator(seed), ContextConfig(0.5, 0.2, 3, ends=1.0))
    for row in context:
        made = torch.isinf(row).nonzero()[:, 0].tolist()
        assert made
        assert made == list(range(made[0], made[-1] + 1))
    plain = sample_contexts(64, 9, generator(seed), ContextConfig(0.0, 0.2, 3, ends=1.0))
    assert torch.isinf(plain[:, 0]).all()
    assert torch.isfinite(plain[:, -1]).any()
