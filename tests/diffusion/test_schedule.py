"""Schedules start and end exactly where they should."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from skyloom.core.errors import RequestError
from skyloom.diffusion.schedule import make_sigmas, shift_sigma

SHIFTS = st.floats(0.1, 20)


@given(st.integers(1, 100), SHIFTS)
def test_levels_fall_from_exactly_one_to_exactly_zero(num_steps: int, shift: float):
    sigmas = make_sigmas(num_steps, shift)
    assert len(sigmas) == num_steps + 1
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


@given(st.integers(1, 30), SHIFTS, st.floats(0.0625, 1, width=32))
def test_an_edit_starts_exactly_at_its_strength(num_steps: int, shift: float, strength: float):
    sigmas = make_sigmas(num_steps, shift, strength)
    assert float(sigmas[0]) == strength
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


@given(SHIFTS)
def test_the_reciprocal_shift_moves_levels_back(shift: float):
    sigma = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(shift_sigma(shift_sigma(sigma, shift), 1 / shift), sigma)


def test_a_shift_multiplies_the_ratio_of_noise_to_signal():
    sigma = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    shifted = shift_sigma(sigma, 3.0)
    torch.testing.assert_close(shifted / (1 - shifted), 3 * sigma / (1 - sigma))


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_levels_equal_those_of_diffusers(shift: float):
    theirs = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    theirs.set_timesteps(sigmas=make_sigmas(8)[:-1].tolist())
    torch.testing.assert_close(make_sigmas(8, shift), theirs.sigmas)


@pytest.mark.parametrize(
    "wrong", [{"num_steps": 0}, {"shift": 0.0}, {"strength": 0.0}, {"strength": 1.1}]
)
def test_impossible_schedules_are_refused(wrong: dict[str, float]):
    with pytest.raises(RequestError):
        make_sigmas(**{"num_steps": 4, **wrong})
