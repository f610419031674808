"""Samplers against equations with known answers, against diffusers, and against interruption."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from torch import Tensor

from skyloom.core.seeds import noise as draw
from skyloom.core.types import LatentShape
from skyloom.diffusion.canvas import Canvas
from skyloom.diffusion.sampling import (
    SAMPLERS,
    Sampler,
    SampleStep,
    mean_velocity,
    sample_adams_bashforth,
    sample_euler,
    sample_heun,
)
from skyloom.diffusion.schedule import make_sigmas

MEAN, SPREAD = 0.7, 0.5
ORDERS = [(sample_euler, 1), (sample_heun, 2), (sample_adams_bashforth, 2)]
BLANK = Canvas.text_to_video(2, LatentShape(3, 2, 2))
NOISE = draw(0, (2, 2, 3, 2, 2))


def gaussian_velocity(latent: Tensor, sigma: Tensor, span: Tensor | None = None) -> Tensor:
    """The exact velocity where data is normal with MEAN and SPREAD: E[noise - data | latent]."""
    s = sigma[:, None, :, None, None].to(latent)
    variance = (1 - s) ** 2 * SPREAD**2 + s**2
    return (latent - (1 - s) * MEAN) * (s - (1 - s) * SPREAD**2) / variance - MEAN


def rotating_velocity(latent: Tensor, sigma: Tensor, span: Tensor | None = None) -> Tensor:
    """The two channels turn around each other once in a unit of sigma, faster where sigma is large."""
    turn = 4 * math.pi * sigma[:, None, :, None, None].to(latent)
    return turn * torch.stack([-latent[:, 1], latent[:, 0]], dim=1)


def last(steps: Iterator[SampleStep]) -> SampleStep:
    return list(steps)[-1]


def order_of(
    sampler: Sampler, velocity: Callable[[Tensor, Tensor], Tensor], answer: Tensor
) -> float:
    """Binary logarithm of how much smaller the error is with twice the steps."""
    errors = [
        (last(sampler(velocity, NOISE.double(), make_sigmas(n, 2.0), BLANK)).latent - answer)
        .abs()
        .max()
        for n in (32, 64)
    ]
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize(("sampler", "order"), ORDERS)
def test_noise_becomes_the_gaussian_data_at_the_rate_of_the_method(sampler: Sampler, order: int):
    answer = MEAN + SPREAD * NOISE.double()
    assert order_of(sampler, gaussian_velocity, answer) > order - 0.1


@pytest.mark.parametrize(("sampler", "order"), ORDERS)
def test_a_full_turn_comes_home_at_the_rate_of_the_method(sampler: Sampler, order: int):
    assert order_of(sampler, rotating_velocity, NOISE.double()) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("sampler", SAMPLERS.values())
@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_straight_paths_need_no_small_steps(sampler: Sampler, num_steps: int):
    target = draw(1, NOISE.shape)
    steps = list(
        sampler(
            lambda latent, sigma, span: NOISE - target, NOISE, make_sigmas(num_steps, 3.0), BLANK
        )
    )
    assert [(step.index, step.total) for step in steps] == [
        (i, num_steps) for i in range(num_steps)
    ]
    for step in steps:
        torch.testing.assert_close(step.denoised, target)
    torch.testing.assert_close(steps[-1].latent, target)


@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [
        (sample_euler, FlowMatchEulerDiscreteScheduler),
        (sample_heun, FlowMatchHeunDiscreteScheduler),
    ],
)
def test_latents_equal_those_of_diffusers(sampler: Sampler, scheduler: type):
    theirs = scheduler(num_train_timesteps=1000)
    theirs.set_timesteps(8)
    latent = NOISE
    for timestep in theirs.timesteps:
        sigma = torch.full((2, 3), float(timestep) / 1000)
        latent = theirs.step(gaussian_velocity(latent, sigma), timestep, latent).prev_sample
    levels = (
        theirs.sigmas
        if sampler is sample_euler
        else theirs.sigmas[[0, *range(1, len(theirs.sigmas), 2)]]
    )
    ours = last(sampler(gaussian_velocity, NOISE, levels, BLANK)).latent
    torch.testing.assert_close(ours, latent, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS.values())
def test_known_parts_come_out_bit_for_bit(sampler: Sampler):
    canvas = Canvas.keyframes({0: draw(2, (2, 1, 2, 2))}, frames=3)
    canvas.denoise_mask[2, 0, 0] = False
    known = ~canvas.denoise_mask
    seen: list[Tensor] = []

    def velocity(latent: Tensor, sigma: Tensor, span: Tensor | None = None) -> Tensor:
        assert (sigma[:, 0] == 0).all()
        assert torch.equal(latent[:, :, 0], canvas.latent[None, :, 0].expand(2, -1, -1, -1))
        seen.append(sigma)
        return latent * 3 + 1

    for step in sampler(velocity, NOISE, make_sigmas(5, 2.0), canvas):
        assert torch.equal(
            step.denoised[:, :, known], canvas.latent[None, :, known].expand(2, -1, -1)
        )
    assert torch.equal(step.latent[:, :, known], canvas.latent[None, :, known].expand(2, -1, -1))
    assert not torch.equal(step.latent[:, :, ~known], NOISE[:, :, ~known])
    assert seen[0][:, 1:].eq(1).all()


@pytest.mark.parametrize("sampler", SAMPLERS.values())
def test_a_batch_equals_its_samples_one_by_one(sampler: Sampler):
    sigmas = make_sigmas(4)
    together = last(sampler(gaussian_velocity, NOISE, sigmas, BLANK)).latent
    for index in range(2):
        alone = last(sampler(gaussian_velocity, NOISE[index : index + 1], sigmas, BLANK)).latent
        assert torch.equal(together[index : index + 1], alone)


@pytest.mark.parametrize("sampler", SAMPLERS.values())
def test_stopping_anywhere_keeps_what_was_made(sampler: Sampler):
    sigmas, given = make_sigmas(4), NOISE.clone()
    whole = [step.latent.clone() for step in sampler(gaussian_velocity, NOISE, sigmas, BLANK)]
    for stop in range(1, 5):
        steps = sampler(gaussian_velocity, NOISE, sigmas, BLANK)
        kept = [next(steps) for _ in range(stop)]
        steps.close()
        assert all(torch.equal(step.latent, whole[step.index]) for step in kept)
    assert torch.equal(NOISE, given)


@pytest.mark.parametrize("sampler", SAMPLERS.values())
def test_gradients_are_off_inside_and_untouched_outside(sampler: Sampler):
    inside: list[bool] = []

    def velocity(latent: Tensor, sigma: Tensor, span: Tensor | None = None) -> Tensor:
        inside.append(torch.is_grad_enabled())
        return latent

    for _ in sampler(velocity, NOISE, make_sigmas(3), BLANK):
        assert torch.is_grad_enabled()
    assert not any(inside)


def test_rising_levels_are_refused():
    with pytest.raises(AssertionError, match="fall"):
        last(sample_euler(gaussian_velocity, NOISE, torch.tensor([0.0, 1.0]), BLANK))


@pytest.mark.parametrize(
    ("sampler", "calls"), [(sample_euler, 6), (sample_heun, 11), (sample_adams_bashforth, 6)]
)
def test_each_method_asks_the_model_as_often_as_it_says(sampler: Sampler, calls: int):
    asked: list[float] = []

    def velocity(latent: Tensor, sigma: Tensor, span: Tensor | None = None) -> Tensor:
        asked.append(float(sigma[0, 0]))
        return latent

    last(sampler(velocity, NOISE, make_sigmas(6), BLANK))
    assert len(asked) == calls
    assert min(asked) > 0


@pytest.mark.parametrize("substeps", [1, 3])
def test_the_mean_velocity_of_a_straight_path_is_its_velocity(substeps: int):
    latent, velocity = torch.randn(2, 3, 4, 2, 2), torch.randn(2, 3, 4, 2, 2)
    start = torch.tensor([[0.9, 0.8, 0.5, 0.3]] * 2)
    end = torch.tensor([[0.5, 0.0, 0.5, 0.1]] * 2)
    made = mean_velocity(lambda latent, sigma: velocity, latent, start, end, substeps)
    standing = (start == end)[:, None, :, None, None]
    assert (made - velocity.masked_fill(standing, 0)).abs().max() < 1e-5


def test_the_mean_velocity_comes_near_that_of_the_curve():
    """dx/dsigma = x has the mean velocity x (1 - exp(-h)) / h; the error falls as the square of the step."""
    latent, start, end = (
        torch.ones(1, 1, 1, 1, 1, dtype=torch.float64),
        torch.ones(1, 1),
        torch.zeros(1, 1),
    )
    errors = []
    for substeps in (4, 8, 16):
        made = mean_velocity(lambda latent, sigma: latent, latent, start, end, substeps)
        errors.append(abs(float(made) - (1 - math.exp(-1))))
    assert 3 < errors[0] / errors[1] < 5
    assert 3 < errors[1] / errors[2] < 5


@pytest.mark.parametrize("sampler", [sample_euler, sample_heun])
def test_strength_says_how_far_a_frame_moves_from_its_source(sampler: Sampler):
    source = draw(3, (2, 4, 16, 16))
    strength = torch.tensor([0.0, 0.3, 0.7, 1.0])
    canvas = replace(Canvas(source, torch.ones(4, 16, 16, dtype=torch.bool)), strength=strength)
    noise = draw(4, (1, 2, 4, 16, 16))
    made = last(sampler(gaussian_velocity, noise, make_sigmas(8, 1.0), canvas)).latent
    free = last(
        sampler(gaussian_velocity, noise, make_sigmas(8, 1.0), replace(canvas, strength=None))
    ).latent
    moved = (made - source).square().mean(dim=(0, 1, 3, 4))
    assert torch.equal(made[0, :, 0], source[:, 0])
    assert moved[0] < moved[1] < moved[2] < moved[3]
    torch.testing.assert_close(made[:, :, 3], free[:, :, 3])


def test_euler_goes_on_from_any_step_bit_for_bit():
    """With known cells, known frames and frames of less strength."""
    mask = torch.ones(3, 2, 2, dtype=torch.bool)
    mask[0], mask[1, 0] = False, False
    canvas = replace(
        BLANK,
        latent=draw(1, (2, 3, 2, 2)),
        denoise_mask=mask,
        strength=torch.tensor([1.0, 1.0, 0.6]),
    )
    sigmas = make_sigmas(6, 2.0)
    whole = list(sample_euler(gaussian_velocity, NOISE, sigmas, canvas))
    for done in range(1, 6):
        rest = list(
            sample_euler(gaussian_velocity, NOISE, sigmas, canvas, (done, whole[done - 1].latent))
        )
        assert [step.index for step in rest] == list(range(done, 6))
        assert all(
            torch.equal(one.latent, two.latent) for one, two in zip(rest, whole[done:], strict=True)
        )
        assert torch.equal(rest[-1].denoised, whole[-1].denoised)
