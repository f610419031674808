"""The path and its conversions agree with each other at every noise level."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from skyloom.core.seeds import noise as draw
from skyloom.diffusion.flow import (
    SIGMA_FLOOR,
    add_noise,
    denoised_from_velocity,
    to_velocity,
    velocity_from_angular,
    velocity_from_denoised,
    velocity_target,
)

SHAPE = (2, 3, 4, 2, 2)
LEVELS = st.lists(st.floats(0, 1, width=32), min_size=8, max_size=8)
SEEDS = st.integers(0, 1000)


def make(seed: int, levels: list[float]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sigma = torch.tensor(levels, dtype=torch.float64).reshape(2, 4)
    return draw(seed, SHAPE, "latent").double(), draw(seed, SHAPE, "noise").double(), sigma


@given(SEEDS, LEVELS)
def test_true_velocity_points_to_the_data_from_everywhere(seed: int, levels: list[float]):
    latent, noise, sigma = make(seed, levels)
    noisy = add_noise(latent, noise, sigma)
    denoised = denoised_from_velocity(noisy, velocity_target(latent, noise), sigma)
    torch.testing.assert_close(denoised, latent)


@given(SEEDS, LEVELS, LEVELS)
def test_the_path_is_straight_along_the_velocity(
    seed: int, levels: list[float], others: list[float]
):
    latent, noise, sigma = make(seed, levels)
    other = torch.tensor(others, dtype=torch.float64).reshape(2, 4)
    step = (other - sigma)[:, None, :, None, None] * velocity_target(latent, noise)
    torch.testing.assert_close(
        add_noise(latent, noise, sigma) + step, add_noise(latent, noise, other)
    )


@given(SEEDS, LEVELS)
def test_velocity_and_clean_estimate_are_inverse_above_the_floor(seed: int, levels: list[float]):
    noisy, velocity, sigma = make(seed, levels)
    sigma = sigma.clamp(min=SIGMA_FLOOR)
    denoised = denoised_from_velocity(noisy, velocity, sigma)
    torch.testing.assert_close(velocity_from_denoised(noisy, denoised, sigma), velocity)


def test_the_ends_of_the_path_are_data_and_noise_exactly():
    latent, noise, _ = make(0, [0.0] * 8)
    assert torch.equal(add_noise(latent, noise, torch.zeros(2, 4)), latent)
    assert torch.equal(add_noise(latent, noise, torch.ones(2, 4)), noise)


def test_each_frame_has_its_own_level():
    latent, noise, _ = make(0, [0.0] * 8)
    sigma = torch.tensor([[0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    noisy = add_noise(latent, noise, sigma)
    assert torch.equal(noisy[0, :, 1], noise[0, :, 1])
    assert torch.equal(noisy[1, :, 1], latent[1, :, 1])


def test_a_clean_estimate_at_sigma_zero_has_a_finite_velocity():
    latent, noise, sigma = make(0, [0.0] * 8)
    assert velocity_from_denoised(latent, noise, sigma).isfinite().all()


@given(SEEDS, LEVELS)
def test_the_true_angular_prediction_has_the_true_velocity(seed: int, levels: list[float]):
    latent, noise, sigma = make(seed, levels)
    s = sigma[:, None, :, None, None]
    angular = (s * latent - (1 - s) * noise) / torch.hypot(s, 1 - s)
    velocity = velocity_from_angular(add_noise(latent, noise, sigma), angular, sigma)
    torch.testing.assert_close(velocity, velocity_target(latent, noise))


def test_to_velocity_knows_every_kind_of_prediction():
    latent, noise, sigma = make(3, [0.5] * 8)
    noisy = add_noise(latent, noise, sigma)
    target = velocity_target(latent, noise)
    assert to_velocity("velocity", target, noisy, sigma) is target
    torch.testing.assert_close(to_velocity("denoised", latent, noisy, sigma), target)
    torch.testing.assert_close(
        to_velocity("angular", (latent - noise) / 2**0.5, noisy, sigma), target
    )
