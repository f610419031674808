"""UniPC against the original scheduler of Wan and diffusers', with a canvas, and resumed."""

import math
from dataclasses import replace

import pytest
import torch
import wan_reference
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from skyloom.core.seeds import noise as draw
from skyloom.core.types import LatentShape
from skyloom.diffusion.canvas import Canvas
from skyloom.diffusion.sampling import SampleStep
from skyloom.diffusion.schedule import diffusers_sigmas, wan_sigmas
from skyloom.diffusion.unipc import sample_unipc

SHAPE = (1, 4, 3, 4, 4)
NOISE = draw(0, SHAPE)
TARGET = draw(1, SHAPE)
MIXING = 0.3 * draw(2, (4, 4))
BLANK = Canvas.text_to_video(4, LatentShape(3, 4, 4))
STEPS = [1, 2, 3, 4, 20, 40, 50]
SHIFTS = [1.0, 3.0, 5.0, 8.0, 12.0, 16.0]


def curved_velocity(latent: Tensor, sigma: Tensor, span: Tensor | None = None) -> Tensor:
    """A field that is linear in neither the latent nor sigma."""
    bent = torch.tanh(torch.einsum("ij,bjthw->bithw", MIXING.to(latent), latent))
    return latent - TARGET.to(latent) + 0.5 * bent * sigma[:, None, :, None, None].to(latent)


def frame_levels(sigma: Tensor) -> Tensor:
    return sigma.expand(1, SHAPE[2])


def run_reference(scheduler) -> Tensor:
    """The latent that a scheduler of diffusers' interface ends with."""
    latent = NOISE
    for sigma, timestep in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
        velocity = curved_velocity(latent, frame_levels(sigma))
        latent = scheduler.step(velocity, timestep, latent, return_dict=False)[0]
    return latent


def steps_of(sigmas: Tensor, canvas: Canvas = BLANK, **options) -> list[SampleStep]:
    return list(sample_unipc(curved_velocity, NOISE, sigmas, canvas, **options))


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("num_steps", STEPS)
def test_latents_equal_those_of_the_original_code(num_steps: int, shift: float):
    module = wan_reference.load("wan.utils.fm_solvers_unipc")
    theirs = module.FlowUniPCMultistepScheduler(shift=1, use_dynamic_shifting=False)
    theirs.set_timesteps(num_steps, device="cpu", shift=shift)
    ours = steps_of(wan_sigmas(num_steps, shift))[-1].latent
    expected = run_reference(theirs)
    assert expected.std() > 0.1
    assert (ours - expected).abs().max() < 2e-6


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("num_steps", STEPS)
def test_latents_equal_those_of_diffusers(num_steps: int, shift: float):
    theirs = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    theirs.set_timesteps(num_steps)
    ours = steps_of(diffusers_sigmas(num_steps, shift))[-1].latent
    assert (ours - run_reference(theirs)).abs().max() < 2e-6


def test_halving_the_steps_quarters_the_error():
    """Second order on a smooth field, with a first and a last step of first order."""

    def end(num_steps: int) -> Tensor:
        sigmas = torch.linspace(0.9, 0.3, num_steps + 1, dtype=torch.float64)
        steps = sample_unipc(curved_velocity, NOISE.double(), sigmas, BLANK)
        return list(steps)[-1].latent

    exact = end(320)
    errors = [float((end(num_steps) - exact).abs().max()) for num_steps in (20, 40)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.2)


def test_a_held_first_frame_is_that_of_image_to_video():
    """TI2V-5B: the first latent frame is put back before every call, and is told timestep 0."""
    first = draw(3, (4, 1, 4, 4))

    def mixing_velocity(latent: Tensor, sigma: Tensor, span: Tensor | None = None) -> Tensor:
        return curved_velocity(latent, sigma) + 0.3 * latent.mean(dim=2, keepdim=True)

    module = wan_reference.load("wan.utils.fm_solvers_unipc")
    theirs = module.FlowUniPCMultistepScheduler(shift=1, use_dynamic_shifting=False)
    theirs.set_timesteps(10, device="cpu", shift=5.0)
    latent = NOISE.clone()
    for sigma, timestep in zip(theirs.sigmas, theirs.timesteps, strict=False):
        latent[:, :, :1] = first
        levels = frame_levels(sigma).clone()
        levels[:, 0] = 0
        velocity = mixing_velocity(latent, levels)
        latent = theirs.step(velocity, timestep, latent, return_dict=False)[0]
    latent[:, :, :1] = first
    canvas = BLANK.set_known(0, first)
    steps = list(sample_unipc(mixing_velocity, NOISE, wan_sigmas(10, 5.0), canvas))
    assert (steps[-1].latent - latent).abs().max() < 2e-6
    assert torch.equal(steps[-1].latent[0, :, :1], first)


def test_known_cells_come_out_bit_for_bit_and_the_others_do_not_depend_on_them():
    canvas = BLANK.set_known(2, draw(3, (4, 1, 4, 4)))
    canvas.denoise_mask[1, 0, 0] = False
    made = steps_of(wan_sigmas(6, 5.0), canvas)
    free = steps_of(wan_sigmas(6, 5.0))
    known = ~canvas.denoise_mask
    for step in made:
        assert torch.equal(step.denoised[0, :, known], canvas.latent[:, known])
    assert torch.equal(made[-1].latent[0, :, known], canvas.latent[:, known])
    assert torch.equal(made[-1].latent[:, :, 0], free[-1].latent[:, :, 0])


def test_noisy_context_frames_are_restored_at_their_level():
    known = draw(3, (4, 1, 4, 4))
    canvas = replace(BLANK.set_known(0, known), context_sigma=0.2)
    steps = steps_of(wan_sigmas(6, 5.0), canvas)
    expected = 0.8 * known + torch.tensor(0.2) * NOISE[0, :, :1]
    torch.testing.assert_close(steps[1].latent[0, :, :1], expected)
    assert torch.equal(steps[-1].latent[0, :, :1], known)


def test_strength_limits_how_far_a_frame_moves_from_its_source():
    source = draw(3, (4, 3, 4, 4))
    strength = torch.tensor([0.0, 0.4, 1.0])
    canvas = replace(BLANK, latent=source, strength=strength)
    steps = steps_of(wan_sigmas(8, 3.0), canvas)
    made = steps[-1].latent[0]
    free = steps_of(wan_sigmas(8, 3.0))[-1].latent[0]
    assert torch.equal(made[:, 0], source[:, 0])
    torch.testing.assert_close(made[:, 2], free[:, 2])
    moved = (made - source).square().mean(dim=(0, 2, 3))
    assert 0 < moved[1] < moved[2]
    less = replace(canvas, strength=torch.tensor([0.0, 0.2, 1.0]))
    nearer = steps_of(wan_sigmas(8, 3.0), less)[-1].latent[0]
    assert (nearer[:, 1] - source[:, 1]).square().mean() < moved[1]


def test_a_frame_of_lower_strength_is_sampled_as_if_it_started_at_its_level():
    """Equal to sampling from the level of the strength, with the same levels below it."""
    sigmas = wan_sigmas(8, 3.0)
    source = draw(3, (4, 3, 4, 4))
    canvas = replace(BLANK, latent=source, strength=torch.full((3,), 0.5))
    made = steps_of(sigmas, canvas)[-1].latent
    below = torch.cat([torch.tensor([0.5], dtype=torch.float64), sigmas[sigmas < 0.5]])
    begun = 0.5 * source + 0.5 * NOISE
    alone = list(sample_unipc(curved_velocity, begun, below, BLANK))[-1].latent
    torch.testing.assert_close(made, alone, atol=1e-6, rtol=0)


def test_resuming_from_any_step_is_exact():
    """With known cells, known frames and frames of less strength."""
    mask = torch.ones(3, 4, 4, dtype=torch.bool)
    mask[0] = False
    mask[1, 0] = False
    canvas = replace(
        BLANK,
        latent=draw(5, (4, 3, 4, 4)),
        denoise_mask=mask,
        strength=torch.tensor([1.0, 1.0, 0.6]),
    )
    sigmas = wan_sigmas(7, 5.0)
    whole = steps_of(sigmas, canvas)
    for done in range(1, 7):
        rest = steps_of(sigmas, canvas, resume_from=(done, whole[done - 1].state))
        assert [step.index for step in rest] == list(range(done, 7))
        for step, expected in zip(rest, whole[done:], strict=True):
            assert len(step.state) == len(expected.state)
            assert all(map(torch.equal, step.state, expected.state))


def test_each_step_evaluates_the_model_once_at_its_level():
    seen: list[float] = []

    def velocity(latent: Tensor, sigma: Tensor, span: Tensor) -> Tensor:
        seen.append(float(sigma[0, 0]))
        return curved_velocity(latent, sigma)

    sigmas = wan_sigmas(5, 5.0)
    list(sample_unipc(velocity, NOISE, sigmas, BLANK))
    assert seen == sigmas[:-1].float().tolist()


def test_a_first_level_of_one_is_refused():
    with pytest.raises(AssertionError, match="below 1"):
        steps_of(torch.tensor([1.0, 0.5, 0.0]))
