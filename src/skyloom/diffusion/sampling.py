"""Samplers: they solve d latent / d sigma = velocity from sigmas[0] down to sigmas[-1], one step per yield.

Each is a generator without state of its own: every yielded tensor is final, and it may be dropped after any
step. Latents should be fp32 whatever the model computes in. Made cells follow the equation; known cells are
put back by the canvas after every step.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from skyloom.diffusion.canvas import Canvas
from skyloom.diffusion.flow import denoised_from_velocity

# (latent, sigma, span) -> velocity; span is how far each latent frame's sigma falls in this step
VelocityFunction = Callable[
    [Float[Tensor, "b c t h w"], Float[Tensor, "b t"], Float[Tensor, "b t"]],
    Float[Tensor, "b c t h w"],
]


@dataclass(frozen=True, eq=False)
class SampleStep:
    """After step `index` (from 0) of `total`: the latent at its new sigma, and the clean estimate so far."""

    index: int
    total: int
    latent: Float[Tensor, "b c t h w"]
    denoised: Float[Tensor, "b c t h w"]


Sampler = Callable[
    [VelocityFunction, Float[Tensor, "b c t h w"], Float[Tensor, " n"], Canvas],
    Iterator[SampleStep],
]


def sample_euler(
    velocity_fn: VelocityFunction,
    noise: Float[Tensor, "b c t h w"],
    sigmas: Float[Tensor, " n"],
    canvas: Canvas,
    begun: tuple[int, Float[Tensor, "b c t h w"]] | None = None,
) -> Iterator[SampleStep]:
    """First order: one evaluation per step.

    What was `begun` goes on: so many steps were done, and this is the latent that the last of them gave.
    """
    first, latent = begun or (0, canvas.at_sigma(noise, float(sigmas[0])))
    for index, (sigma, sigma_next) in enumerate(_pairs(sigmas)[first:], start=first):
        velocity, denoised = _evaluate(velocity_fn, latent, noise, (sigma, sigma_next), canvas)
        latent = canvas.apply(
            _moved(latent, velocity, (sigma, sigma_next), canvas), noise, sigma_next
        )
        yield SampleStep(index, len(sigmas) - 1, latent, denoised)


def sample_heun(
    velocity_fn: VelocityFunction,
    noise: Float[Tensor, "b c t h w"],
    sigmas: Float[Tensor, " n"],
    canvas: Canvas,
) -> Iterator[SampleStep]:
    """Second order: the mean of the velocities at both ends of a step (Karras et al. 2022, arXiv 2206.00364).

    Two evaluations per step, one where the step ends at sigma 0.
    """
    latent = canvas.at_sigma(noise, float(sigmas[0]))
    for index, (sigma, sigma_next) in enumerate(_pairs(sigmas)):
        velocity, denoised = _evaluate(velocity_fn, latent, noise, (sigma, sigma_next), canvas)
        if sigma_next > 0:
            ahead = canvas.apply(
                _moved(latent, velocity, (sigma, sigma_next), canvas), noise, sigma_next
            )
            velocity = (
                velocity + _evaluate(velocity_fn, ahead, noise, (sigma_next, sigma_next), canvas)[0]
            ) / 2
        latent = canvas.apply(
            _moved(latent, velocity, (sigma, sigma_next), canvas), noise, sigma_next
        )
        yield SampleStep(index, len(sigmas) - 1, latent, denoised)


def sample_adams_bashforth(
    velocity_fn: VelocityFunction,
    noise: Float[Tensor, "b c t h w"],
    sigmas: Float[Tensor, " n"],
    canvas: Canvas,
) -> Iterator[SampleStep]:
    """Second order with one evaluation per step: the line through the last two velocities.

    The two-step Adams-Bashforth method in sigma, for steps of any length (Hairer, Norsett and Wanner, Solving
    Ordinary Differential Equations I, section III.5); the first step is an Euler step.
    """
    assert canvas.strength is None, "steps of frames that start later have no common ratio"
    latent, previous = canvas.at_sigma(noise, float(sigmas[0])), None
    for index, (sigma, sigma_next) in enumerate(_pairs(sigmas)):
        velocity, denoised = _evaluate(velocity_fn, latent, noise, (sigma, sigma_next), canvas)
        step, slope = sigma_next - sigma, velocity
        if previous is not None:
            last_velocity, last_step = previous
            slope = velocity + step / (2 * last_step) * (velocity - last_velocity)
        previous = velocity, step
        latent = canvas.apply(latent + step * slope, noise, sigma_next)
        yield SampleStep(index, len(sigmas) - 1, latent, denoised)


def mean_velocity(
    velocity_fn: Callable[
        [Float[Tensor, "b c t h w"], Float[Tensor, "b t"]], Float[Tensor, "b c t h w"]
    ],
    latent: Float[Tensor, "b c t h w"],
    start: Float[Tensor, "b t"],
    end: Float[Tensor, "b t"],
    substeps: int,
) -> Float[Tensor, "b c t h w"]:
    """The velocity that carries each latent frame from its sigma `start` to `end` in one step.

    What `substeps` equal Adams-Bashforth steps come to, and what a few-step student learns. 0 where a frame
    does not move.
    """
    moved, previous = latent, None
    for index in range(substeps):
        velocity = velocity_fn(moved, torch.lerp(start, end, index / substeps))
        slope = velocity if previous is None else 1.5 * velocity - 0.5 * previous
        previous = velocity
        moved = moved + rearrange((end - start) / substeps, "b t -> b 1 t 1 1") * slope
    span = rearrange(start - end, "b t -> b 1 t 1 1")
    return torch.where(span > 0, (latent - moved) / span.clamp(min=1e-6), torch.zeros_like(latent))


SAMPLERS: dict[str, Sampler] = {
    "euler": sample_euler,
    "heun": sample_heun,
    "adams_bashforth": sample_adams_bashforth,
}


def _pairs(sigmas: Float[Tensor, " n"]) -> list[tuple[float, float]]:
    """Where each step starts and ends."""
    levels = [float(sigma) for sigma in sigmas.cpu()]
    assert all(high > low >= 0 for high, low in pairwise(levels)), "sigmas must fall"
    return list(pairwise(levels))


def _moved(
    latent: Float[Tensor, "b c t h w"],
    velocity: Float[Tensor, "b c t h w"],
    step: tuple[float, float],
    canvas: Canvas,
) -> Float[Tensor, "b c t h w"]:
    """The latent after a straight step; a frame of less strength stays until the step that passes it."""
    sigma, sigma_next = step
    if canvas.strength is None:
        return latent + (sigma_next - sigma) * velocity
    spans = canvas.frame_sigma(sigma_next) - canvas.frame_sigma(sigma)
    return latent + rearrange(spans, "t -> 1 1 t 1 1").to(latent) * velocity


@torch.no_grad()
def _evaluate(
    velocity_fn: VelocityFunction,
    latent: Float[Tensor, "b c t h w"],
    noise: Float[Tensor, "b c t h w"],
    step: tuple[float, float],
    canvas: Canvas,
) -> tuple[Float[Tensor, "b c t h w"], Float[Tensor, "b c t h w"]]:
    """The velocity at a level, and the clean estimate that it points to; no gradients are kept.

    Gradients are off here and not around the samplers, so that the caller's own setting holds between steps.
    """
    levels, after = (
        repeat(canvas.frame_sigma(sigma), "t -> b t", b=len(latent)).to(latent) for sigma in step
    )
    velocity = velocity_fn(latent, levels, levels - after).to(latent)
    return velocity, canvas.apply(denoised_from_velocity(latent, velocity, levels), noise, 0.0)
