"""Solvers of d latent / d sigma = velocity, from sigmas[0] down to sigmas[-1].

A sampler is a stateless generator that yields after every step; yielded tensors are never modified
afterwards and iteration may stop at any step. Latents should be fp32 whatever the model computes
in. Generated cells follow the equation; the canvas restores known cells after every step.

`resume_from` of a sampler is the number of steps already done and the `state` of the last of them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from skyloom.diffusion.canvas import Canvas
from skyloom.diffusion.flow import add_noise, denoised_from_velocity, mean_velocity

# (latent, sigma, span) -> velocity; span is how far each latent frame's sigma falls in this step
VelocityFunction = Callable[
    [Float[Tensor, "b c t h w"], Float[Tensor, "b t"], Float[Tensor, "b t"]],
    Float[Tensor, "b c t h w"],
]


@dataclass(frozen=True, eq=False)
class SampleStep:
    """Result of step `index` (from 0) of `total`: latent at its new sigma, and clean estimate.

    history: what a multistep solver needs besides the latent to go on.
    """

    index: int
    total: int
    latent: Float[Tensor, "b c t h w"]
    denoised: Float[Tensor, "b c t h w"]
    history: tuple[Float[Tensor, "b c t h w"], ...] = ()

    @property
    def state(self) -> tuple[Float[Tensor, "b c t h w"], ...]:
        """The tensors from which the sampler goes on, the latent first."""
        return (self.latent, *self.history)


def sample_euler(
    velocity_fn: VelocityFunction,
    noise: Float[Tensor, "b c t h w"],
    sigmas: Float[Tensor, " n"],
    canvas: Canvas,
    resume_from: tuple[int, Sequence[Float[Tensor, "b c t h w"]]] | None = None,
) -> Iterator[SampleStep]:
    """Euler method: first order, one evaluation per step."""
    first, (latent,) = resume_from or (0, [canvas.at_sigma(noise, float(sigmas[0]))])
    for index, (sigma, sigma_next) in enumerate(sigma_steps(sigmas)[first:], start=first):
        velocity, denoised = evaluate(velocity_fn, latent, noise, (sigma, sigma_next), canvas)
        if canvas.strength is None:
            latent = latent + velocity * (sigma_next - sigma)
        else:  # a frame of lower strength stays until sigma falls below it
            sigma_frames = canvas.frame_sigma(sigma)
            sigma_frames_next = canvas.frame_sigma(sigma_next)
            dt = rearrange(sigma_frames_next - sigma_frames, "t -> 1 1 t 1 1").to(latent)
            latent = latent + velocity * dt
        latent = canvas.apply(latent, noise, sigma_next)
        yield SampleStep(index, len(sigmas) - 1, latent, denoised)


def sample_renoise(
    velocity_fn: VelocityFunction,
    noise: Float[Tensor, "b c t h w"],
    sigmas: Float[Tensor, " n"],
    canvas: Canvas,
    resume_from: tuple[int, Sequence[Float[Tensor, "b c t h w"]]] | None = None,
    *,
    fresh_noise: Callable[[int], Float[Tensor, "b c t h w"]],
) -> Iterator[SampleStep]:
    """Replace the latent by the clean estimate with fresh noise of the next level, at every step.

    The sampler of students that are distilled by distribution matching (Yin et al. 2024, arXiv
    2405.14867) or Self-Forcing (arXiv 2506.08009). `fresh_noise` is the noise of a step, by index.
    Sampling starts from pure noise, also if the first level is below 1.
    """
    first, (latent,) = resume_from or (0, [canvas.at_sigma(noise, 1.0)])
    for index, (sigma, sigma_next) in enumerate(sigma_steps(sigmas)[first:], start=first):
        _, denoised = evaluate(velocity_fn, latent, noise, (sigma, sigma_next), canvas)
        level = canvas.frame_sigma(sigma_next)
        levels = repeat(level, "t -> b t", b=len(latent)).to(latent)
        renoised = denoised
        if sigma_next > 0:
            renoised = add_noise(denoised, fresh_noise(index).to(latent), levels)
        # a frame of lower strength stays until sigma falls below it
        falls = rearrange(level < canvas.frame_sigma(sigma), "t -> 1 1 t 1 1")
        latent = canvas.apply(torch.where(falls, renoised, latent), noise, sigma_next)
        yield SampleStep(index, len(sigmas) - 1, latent, denoised)


def multistep_mean_velocity(
    velocity_fn: Callable[
        [Float[Tensor, "b c t h w"], Float[Tensor, "b t"]], Float[Tensor, "b c t h w"]
    ],
    latent: Float[Tensor, "b c t h w"],
    start: Float[Tensor, "b t"],
    end: Float[Tensor, "b t"],
    substeps: int,
) -> Float[Tensor, "b c t h w"]:
    """Return the mean velocity from sigma `start` to `end`, the target of a few-step student.

    Integrates in `substeps` equal steps of the two-step Adams-Bashforth method (Hairer, Norsett and
    Wanner, Solving Ordinary Differential Equations I, section III.5). 0 for frames without a step.
    """
    moved = latent
    previous: Tensor | None = None
    for index in range(substeps):
        velocity = velocity_fn(moved, torch.lerp(start, end, index / substeps))
        slope = velocity if previous is None else 1.5 * velocity - 0.5 * previous
        previous = velocity
        moved = moved + rearrange((end - start) / substeps, "b t -> b 1 t 1 1") * slope
    return mean_velocity(latent, moved, start, end)


def sigma_steps(sigmas: Float[Tensor, " n"]) -> list[tuple[float, float]]:
    """Pairs of the levels at which each step starts and ends."""
    levels = [float(sigma) for sigma in sigmas.cpu()]
    assert all(high > low >= 0 for high, low in pairwise(levels)), "sigmas must fall"
    return list(pairwise(levels))


@torch.no_grad()
def evaluate(
    velocity_fn: VelocityFunction,
    latent: Float[Tensor, "b c t h w"],
    noise: Float[Tensor, "b c t h w"],
    step: tuple[float, float],
    canvas: Canvas,
) -> tuple[Float[Tensor, "b c t h w"], Float[Tensor, "b c t h w"]]:
    """Return the velocity at the start of a step and its clean estimate, without gradients.

    Gradients are disabled here and not around the sampler, which must not change the caller's
    setting between steps.
    """
    sigma, sigma_next = (
        repeat(canvas.frame_sigma(level), "t -> b t", b=len(latent)).to(latent) for level in step
    )
    velocity = velocity_fn(latent, sigma, sigma - sigma_next).to(latent)
    return velocity, canvas.apply(denoised_from_velocity(latent, velocity, sigma), noise, 0.0)
