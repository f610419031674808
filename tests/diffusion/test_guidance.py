"""Guidance deltas: a scale of 1 is exactly off, others extrapolate."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from skyloom.core.seeds import noise
from skyloom.diffusion.guidance import cfg_delta

SHAPE = (3, 4, 2, 2, 2)
WITH = noise(1, SHAPE).double()
WITHOUT = noise(2, SHAPE).double()


def test_a_scale_of_one_changes_nothing():
    assert (cfg_delta(WITH, WITHOUT, 1.0) == 0).all()


@given(st.floats(0, 10))
def test_guided_is_on_the_line_through_both_predictions(scale: float):
    guided = WITH + cfg_delta(WITH, WITHOUT, scale)
    torch.testing.assert_close(guided, WITHOUT + scale * (WITH - WITHOUT))
