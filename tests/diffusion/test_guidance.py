"""Guidance deltas: off is exactly nothing, and each keeps the promise in its name."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skyloom.core.seeds import noise
from skyloom.diffusion.guidance import (
    add_momentum,
    apg_delta,
    cfg_delta,
    rescale_delta,
    scale_in_interval,
)

SHAPE = (3, 4, 2, 2, 2)
WITH, WITHOUT = noise(1, SHAPE).double(), noise(2, SHAPE).double()


def norm(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).norm(dim=1)


def test_a_scale_of_one_changes_nothing():
    assert (cfg_delta(WITH, WITHOUT, 1.0) == 0).all()
    assert (apg_delta(WITH, WITH - WITHOUT, 1.0) == 0).all()


@given(st.floats(0, 10))
def test_guided_is_on_the_line_through_both_predictions(scale: float):
    guided = WITH + cfg_delta(WITH, WITHOUT, scale)
    torch.testing.assert_close(guided, WITHOUT + scale * (WITH - WITHOUT))


@given(st.floats(1.5, 10))
def test_projected_guidance_with_all_of_the_parallel_part_is_plain_cfg(scale: float):
    torch.testing.assert_close(
        apg_delta(WITH, WITH - WITHOUT, scale, parallel=1.0), cfg_delta(WITH, WITHOUT, scale)
    )


def test_projected_guidance_is_orthogonal_to_the_prediction():
    delta = apg_delta(WITH, WITH - WITHOUT, 7.0)
    inner = (delta * WITH).flatten(1).sum(dim=1)
    torch.testing.assert_close(inner, torch.zeros_like(inner), atol=1e-10, rtol=0)


def test_projected_guidance_is_no_longer_than_its_bound_and_short_ones_are_left_alone():
    difference = WITH - WITHOUT
    assert (norm(apg_delta(WITH, difference, 3.0, max_norm=0.5)) <= 2 * 0.5 + 1e-9).all()
    free = apg_delta(WITH, difference, 3.0)
    assert torch.equal(apg_delta(WITH, difference, 3.0, max_norm=1e6), free)


def test_samples_do_not_see_each_other():
    difference = WITH - WITHOUT
    together = apg_delta(WITH, difference, 3.0, max_norm=1.0)
    torch.testing.assert_close(together[:1], apg_delta(WITH[:1], difference[:1], 3.0, max_norm=1.0))


def test_rescaling_fully_restores_the_deviation():
    guided = WITH + cfg_delta(WITH, WITHOUT, 9.0)
    restored = guided + rescale_delta(WITH, guided, 1.0)
    torch.testing.assert_close(restored.flatten(1).std(dim=1), WITH.flatten(1).std(dim=1))
    assert (rescale_delta(WITH, guided, 0.0) == 0).all()


@pytest.mark.parametrize(("sigma", "expected"), [(0.05, 1.0), (0.1, 6.0), (0.5, 6.0), (1.0, 1.0)])
def test_guidance_acts_inside_its_interval_only(sigma: float, expected: float):
    assert scale_in_interval(6.0, sigma, 0.1, 0.9) == expected


def test_momentum_sums_a_geometric_series():
    difference, running = torch.ones(1, 1, 1, 1, 1), None
    for _ in range(40):
        running = add_momentum(difference, running, momentum=-0.5)
    torch.testing.assert_close(running, difference / 1.5)
