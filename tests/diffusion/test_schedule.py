"""Schedules start and end exactly where they should."""

import pytest
import torch
import wan_reference
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from hypothesis import given
from hypothesis import strategies as st

from skyloom.core.errors import RequestError
from skyloom.diffusion.schedule import (
    diffusers_sigmas,
    make_sigmas,
    shift_sigma,
    sigmas_of_timesteps,
    wan_sigmas,
    whole_timesteps,
)

SHIFTS = st.floats(0.1, 20)

# Printed by FlowUniPCMultistepScheduler of wan22 2.2.11 (set_timesteps): steps, shift; levels and
# timesteps 0, 1, n // 2 and n - 1; sums of all levels and timesteps.
WAN_TABLES = {
    "Wan2.1-T2V-1.3B at 480p": (
        (50, 3.0),
        (0.999666452, 0.992907465, 0.749624789, 0.057636835),
        (999, 992, 749, 57),
        (34.2812285, 34256),
    ),
    "Wan2.2-TI2V-5B, Wan2.1-T2V-14B at 720p": (
        (50, 5.0),
        (0.999799848, 0.995732367, 0.833055377, 0.092506856),
        (999, 995, 833, 92),
        (37.8317917, 37807),
    ),
    "Wan2.2-T2V-A14B": (
        (40, 12.0),
        (0.999916613, 0.997782648, 0.922934771, 0.235109538),
        (999, 997, 922, 235),
        (34.2479963, 34226),
    ),
    "Wan2.2-I2V-A14B": (
        (40, 5.0),
        (0.999799848, 0.994694769, 0.833055377, 0.113533050),
        (999, 994, 833, 113),
        (30.3618233, 30342),
    ),
    "Wan2.1-I2V-14B-480P": (
        (40, 3.0),
        (0.999666452, 0.991189122, 0.749624789, 0.071360543),
        (999, 991, 749, 71),
        (27.5229525, 27502),
    ),
    "Wan2.1-FLF2V-14B": (
        (40, 16.0),
        (0.999937415, 0.998336017, 0.941065669, 0.290697455),
        (999, 998, 941, 290),
        (35.2422073, 35220),
    ),
    "SkyReels-V2-DF": (
        (30, 8.0),
        (0.999874890, 0.995579839, 0.888691187, 0.216040879),
        (999, 995, 888, 216),
        (24.5729937, 24558),
    ),
    "A14B with the 4-step LoRA": (
        (4, 5.0),
        (0.999799848, 0.937265456, 0.833055377, 0.624687374),
        (999, 937, 833, 624),
        (3.3948081, 3393),
    ),
}


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


@pytest.mark.parametrize("name", WAN_TABLES)
def test_levels_are_those_that_the_original_code_printed(name: str):
    (num_steps, shift), levels, timesteps, (sum_of_levels, sum_of_timesteps) = WAN_TABLES[name]
    sigmas = wan_sigmas(num_steps, shift)
    shown = [0, 1, num_steps // 2, num_steps - 1]
    assert sigmas[shown].tolist() == pytest.approx(levels, abs=1e-7)
    assert sigmas[-1] == 0
    assert float(sigmas.sum()) == pytest.approx(sum_of_levels, abs=1e-6)
    whole = whole_timesteps(sigmas)
    assert whole[shown].tolist() == list(timesteps)
    assert whole.sum() == sum_of_timesteps


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0, 12.0, 16.0])
def test_levels_equal_those_of_the_original_code(shift: float):
    unipc = wan_reference.load("wan.utils.fm_solvers_unipc").FlowUniPCMultistepScheduler
    for num_steps in [1, 2, 3, 4, 8, 20, 30, 40, 50, 100]:
        theirs = unipc(shift=1, use_dynamic_shifting=False)
        theirs.set_timesteps(num_steps, device="cpu", shift=shift)
        ours = wan_sigmas(num_steps, shift)
        assert (ours.float() - theirs.sigmas).abs().max() < 1e-7
        assert whole_timesteps(ours)[:-1].tolist() == theirs.timesteps.tolist()


@pytest.mark.parametrize("shift", [5.0, 12.0])
def test_the_original_dpm_solver_has_the_linear_levels(shift: float):
    solvers = wan_reference.load("wan.utils.fm_solvers")
    theirs = solvers.FlowDPMSolverMultistepScheduler(shift=1, use_dynamic_shifting=False)
    theirs.set_timesteps(sigmas=solvers.get_sampling_sigmas(40, shift), device="cpu")
    assert (make_sigmas(40, shift) - theirs.sigmas).abs().max() < 1e-7


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0, 12.0, 16.0])
def test_levels_equal_those_of_unipc_in_diffusers(shift: float):
    for num_steps in [1, 2, 3, 4, 20, 40, 50]:
        theirs = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        )
        theirs.set_timesteps(num_steps)
        ours = diffusers_sigmas(num_steps, shift)
        assert (ours.float() - theirs.sigmas).abs().max() < 1e-7
        assert whole_timesteps(ours)[:-1].tolist() == theirs.timesteps.tolist()


@pytest.mark.parametrize(
    ("shift", "timesteps"), [(8.0, [1000, 757, 522]), (8.0, [988, 932, 852, 608])]
)
def test_levels_of_timesteps_are_the_nearest_of_training(shift: float, timesteps: list[float]):
    """FastVideo looks levels up in the scheduler of training, by the nearest timestep."""
    theirs = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    expected = [
        float(theirs.sigmas[(theirs.timesteps - timestep).abs().argmin()]) for timestep in timesteps
    ]
    ours = sigmas_of_timesteps(timesteps, shift)
    assert ours.tolist() == pytest.approx([*expected, 0], abs=1e-7)
    told = torch.tensor([*timesteps, 0], dtype=torch.float64) / 1000
    assert (ours - told).abs().max() < 1e-3


def test_levels_of_self_forcing_are_a_quarter_apart_before_the_shift():
    """Self-Forcing: steps 1000, 750, 500, 250, warped by shift 5."""
    warped = [1000.0, 937.5, 2500 / 3, 625.0]
    expected = [1.0, 0.9375, 5 / 6, 0.625, 0.0]
    assert sigmas_of_timesteps(warped, 5.0).tolist() == pytest.approx(expected, abs=1e-12)
