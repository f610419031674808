"""The Euler sampler against closed forms, against diffusers, and when interrupted."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from skyloom.core.seeds import noise as draw
from skyloom.core.types import LatentShape
from skyloom.diffusion.canvas import Canvas
from skyloom.diffusion.sampling import (
    SampleStep,
    multistep_mean_velocity,
    sample_euler,
    sample_renoise,
)
from skyloom.diffusion.schedule import make_sigmas, sigmas_of_timesteps

MEAN, SPREAD = 0.7, 0.5
BLANK = Canvas.text_to_video(2, LatentShape(3, 2, 2))
NOISE = draw(0, (2, 2, 3, 2, 2))


def gaussian_velocity(latent: Tensor, sigma: Tensor, span: Tensor | None = None) -> Tensor:
    """E[noise - data | latent] for normal data with MEAN and SPREAD."""
    s = sigma[:, None, :, None, None].to(latent)
    variance = (1 - s) ** 2 * SPREAD**2 + s**2
    return (latent - (1 - s) * MEAN) * (s - (1 - s) * SPREAD**2) / variance - MEAN


def rotating_velocity(latent: Tensor, sigma: Tensor, span: Tensor | None = None) -> Tensor:
    """Rotate the two channels into each other, one turn from sigma 1 to 0."""
    turn = 4 * math.pi * sigma[:, None, :, None, None].to(latent)
    return turn * torch.stack([-latent[:, 1], latent[:, 0]], dim=1)


def last(steps: Iterator[SampleStep]) -> SampleStep:
    return list(steps)[-1]


def order_of(velocity: Callable[[Tensor, Tensor], Tensor], answer: Tensor) -> float:
    """Binary logarithm of how much smaller the error is with twice the steps."""
    errors = [
        (last(sample_euler(velocity, NOISE.double(), make_sigmas(n, 2.0), BLANK)).latent - answer)
        .abs()
        .max()
        for n in (32, 64)
    ]
    return math.log2(errors[0] / errors[1])


def test_noise_becomes_the_gaussian_data_at_the_rate_of_the_method():
    answer = MEAN + SPREAD * NOISE.double()
    assert order_of(gaussian_velocity, answer) > 0.9


def test_a_full_turn_ends_at_its_start_at_the_rate_of_the_method():
    assert order_of(rotating_velocity, NOISE.double()) == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_straight_paths_need_no_small_steps(num_steps: int):
    target = draw(1, NOISE.shape)
    steps = list(
        sample_euler(
            lambda latent, sigma, span: NOISE - target, NOISE, make_sigmas(num_steps, 3.0), BLANK
        )
    )
    assert [(step.index, step.total) for step in steps] == [
        (i, num_steps) for i in range(num_steps)
    ]
    for step in steps:
        torch.testing.assert_close(step.denoised, target)
    torch.testing.assert_close(steps[-1].latent, target)


def test_latents_equal_those_of_diffusers():
    theirs = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    theirs.set_timesteps(8)
    latent = NOISE
    for timestep in theirs.timesteps:
        sigma = torch.full((2, 3), float(timestep) / 1000)
        latent = theirs.step(gaussian_velocity(latent, sigma), timestep, latent).prev_sample
    ours = last(sample_euler(gaussian_velocity, NOISE, theirs.sigmas, BLANK)).latent
    torch.testing.assert_close(ours, latent, atol=1e-5, rtol=1e-5)


def test_known_parts_come_out_bit_for_bit():
    canvas = BLANK.set_known(0, draw(2, (2, 1, 2, 2)))
    canvas.denoise_mask[2, 0, 0] = False
    known = ~canvas.denoise_mask
    seen: list[Tensor] = []

    def velocity(latent: Tensor, sigma: Tensor, span: Tensor | None = None) -> Tensor:
        assert (sigma[:, 0] == 0).all()
        assert torch.equal(latent[:, :, 0], canvas.latent[None, :, 0].expand(2, -1, -1, -1))
        seen.append(sigma)
        return latent * 3 + 1

    for step in sample_euler(velocity, NOISE, make_sigmas(5, 2.0), canvas):
        assert torch.equal(
            step.denoised[:, :, known], canvas.latent[None, :, known].expand(2, -1, -1)
        )
    assert torch.equal(step.latent[:, :, known], canvas.latent[None, :, known].expand(2, -1, -1))
    assert not torch.equal(step.latent[:, :, ~known], NOISE[:, :, ~known])
    assert seen[0][:, 1:].eq(1).all()


def test_a_batch_equals_its_samples_one_by_one():
    sigmas = make_sigmas(4)
    together = last(sample_euler(gaussian_velocity, NOISE, sigmas, BLANK)).latent
    for index in range(2):
        alone = last(
            sample_euler(gaussian_velocity, NOISE[index : index + 1], sigmas, BLANK)
        ).latent
        assert torch.equal(together[index : index + 1], alone)


def test_stopping_anywhere_keeps_what_was_made():
    sigmas, given = make_sigmas(4), NOISE.clone()
    whole = [step.latent.clone() for step in sample_euler(gaussian_velocity, NOISE, sigmas, BLANK)]
    for stop in range(1, 5):
        steps = sample_euler(gaussian_velocity, NOISE, sigmas, BLANK)
        kept = [next(steps) for _ in range(stop)]
        steps.close()
        assert all(torch.equal(step.latent, whole[step.index]) for step in kept)
    assert torch.equal(NOISE, given)


def test_gradients_are_off_inside_and_untouched_outside():
    inside: list[bool] = []

    def velocity(latent: Tensor, sigma: Tensor, span: Tensor | None = None) -> Tensor:
        inside.append(torch.is_grad_enabled())
        return latent

    for _ in sample_euler(velocity, NOISE, make_sigmas(3), BLANK):
        assert torch.is_grad_enabled()
    assert not any(inside)


def test_rising_levels_are_refused():
    with pytest.raises(AssertionError, match="fall"):
        last(sample_euler(gaussian_velocity, NOISE, torch.tensor([0.0, 1.0]), BLANK))


def test_each_step_evaluates_the_model_once():
    evaluated: list[float] = []

    def velocity(latent: Tensor, sigma: Tensor, span: Tensor | None = None) -> Tensor:
        evaluated.append(float(sigma[0, 0]))
        return latent

    last(sample_euler(velocity, NOISE, make_sigmas(6), BLANK))
    assert len(evaluated) == 6
    assert min(evaluated) > 0


@pytest.mark.parametrize("substeps", [1, 3])
def test_the_mean_velocity_of_a_straight_path_is_its_velocity(substeps: int):
    latent, velocity = torch.randn(2, 3, 4, 2, 2), torch.randn(2, 3, 4, 2, 2)
    start = torch.tensor([[0.9, 0.8, 0.5, 0.3]] * 2)
    end = torch.tensor([[0.5, 0.0, 0.5, 0.1]] * 2)
    made = multistep_mean_velocity(lambda latent, sigma: velocity, latent, start, end, substeps)
    standing = (start == end)[:, None, :, None, None]
    assert (made - velocity.masked_fill(standing, 0)).abs().max() < 1e-5


def test_the_mean_velocity_comes_near_that_of_the_curve():
    """dx/dsigma = x has mean velocity x (1 - exp(-h)) / h; the error is of second order."""
    latent, start, end = (
        torch.ones(1, 1, 1, 1, 1, dtype=torch.float64),
        torch.ones(1, 1),
        torch.zeros(1, 1),
    )
    errors = []
    for substeps in (4, 8, 16):
        made = multistep_mean_velocity(lambda latent, sigma: latent, latent, start, end, substeps)
        errors.append(abs(float(made) - (1 - math.exp(-1))))
    assert 3 < errors[0] / errors[1] < 5
    assert 3 < errors[1] / errors[2] < 5


def test_strength_limits_how_far_a_frame_moves_from_its_source():
    source = draw(3, (2, 4, 16, 16))
    strength = torch.tensor([0.0, 0.3, 0.7, 1.0])
    canvas = replace(Canvas(source, torch.ones(4, 16, 16, dtype=torch.bool)), strength=strength)
    noise = draw(4, (1, 2, 4, 16, 16))
    made = last(sample_euler(gaussian_velocity, noise, make_sigmas(8, 1.0), canvas)).latent
    free = last(
        sample_euler(gaussian_velocity, noise, make_sigmas(8, 1.0), replace(canvas, strength=None))
    ).latent
    moved = (made - source).square().mean(dim=(0, 1, 3, 4))
    assert torch.equal(made[0, :, 0], source[:, 0])
    assert moved[0] < moved[1] < moved[2] < moved[3]
    torch.testing.assert_close(made[:, :, 3], free[:, :, 3])


def test_resuming_from_any_step_is_exact():
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
            sample_euler(gaussian_velocity, NOISE, sigmas, canvas, (done, whole[done - 1].state))
        )
        assert [step.index for step in rest] == list(range(done, 6))
        assert all(
            torch.equal(one.latent, two.latent) for one, two in zip(rest, whole[done:], strict=True)
        )
        assert torch.equal(rest[-1].denoised, whole[-1].denoised)


def step_noise(index: int) -> Tensor:
    return draw(100 + index, tuple(NOISE.shape))


@pytest.mark.parametrize(
    ("shift", "timesteps"),
    [(8.0, [1000, 757, 522]), (5.0, [1000.0, 937.5, 2500 / 3, 625.0])],
    ids=["FastVideo", "Self-Forcing"],
)
def test_renoise_steps_equal_the_loops_of_distilled_models(shift: float, timesteps: list[float]):
    """FastVideo and Self-Forcing: x0 = x - sigma v in fp64, then noise of the next level."""
    table = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    levels = [
        table.sigmas[(table.timesteps - timestep).abs().argmin()].double() for timestep in timesteps
    ]
    latent = NOISE
    for index, sigma in enumerate(levels):
        velocity = gaussian_velocity(latent, sigma.float().expand(2, 3))
        clean = (latent.double() - sigma * velocity.double()).float()
        latent = clean
        if index + 1 < len(levels):
            following = levels[index + 1]
            latent = ((1 - following) * clean + following * step_noise(index)).float()
    sigmas = sigmas_of_timesteps(timesteps, shift)
    steps = list(sample_renoise(gaussian_velocity, NOISE, sigmas, BLANK, fresh_noise=step_noise))
    assert latent.std() > 0.1
    assert len(steps) == len(timesteps)
    torch.testing.assert_close(steps[-1].latent, latent, atol=1e-6, rtol=1e-6)
    assert torch.equal(steps[-1].latent, steps[-1].denoised)


def test_renoise_steps_keep_what_is_known_and_resume_exactly():
    mask = torch.ones(3, 2, 2, dtype=torch.bool)
    mask[0] = False
    mask[1, 0] = False
    source = draw(1, (2, 3, 2, 2))
    canvas = Canvas(source, mask, context_sigma=0.1, strength=torch.tensor([1.0, 1.0, 0.6]))
    sigmas = sigmas_of_timesteps([1000, 750, 500, 250], 5.0)
    whole = list(sample_renoise(gaussian_velocity, NOISE, sigmas, canvas, fresh_noise=step_noise))
    assert torch.equal(whole[-1].latent[:, :, ~mask], source[None, :, ~mask].expand(2, -1, -1))
    kept = 0.4 * source[:, 2] + torch.tensor(0.6) * NOISE[:, :, 2]
    torch.testing.assert_close(whole[0].latent[:, :, 2], kept)
    for done in range(1, 4):
        rest = sample_renoise(
            gaussian_velocity,
            NOISE,
            sigmas,
            canvas,
            (done, whole[done - 1].state),
            fresh_noise=step_noise,
        )
        for step, expected in zip(rest, whole[done:], strict=True):
            assert torch.equal(step.latent, expected.latent)
