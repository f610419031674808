"""UniPC: a predictor and a corrector of second order that share one evaluation per step.

Zhao et al. 2023 (arXiv 2302.04867): the variant B2 of order 2 on clean estimates, with first order
in the first and last steps, as in FlowUniPCMultistepScheduler of Wan-Video/Wan2.2 and in diffusers'
UniPCMultistepScheduler. Both halves of a step are sums of latents and clean estimates whose weights
depend on the levels alone; levels and order are those of each latent frame.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from skyloom.diffusion.canvas import Canvas
from skyloom.diffusion.sampling import SampleStep, VelocityFunction, evaluate, sigma_steps

_MAX_ORDER = 2


def sample_unipc(
    velocity_fn: VelocityFunction,
    noise: Float[Tensor, "b c t h w"],
    sigmas: Float[Tensor, " n"],
    canvas: Canvas,
    resume_from: tuple[int, Sequence[Float[Tensor, "b c t h w"]]] | None = None,
) -> Iterator[SampleStep]:
    """UniPC of order 2, one evaluation per step. The first level must be below 1.

    As in the original code, sampling starts from pure noise although the first level is below 1.
    A frame of lower strength starts, with first order, where sigma falls below it. The history of a
    step is its corrected latent, its clean estimate and the estimate before.
    """
    first, (latent, *history) = resume_from or (0, [canvas.at_sigma(noise, 1.0)])
    steps = sigma_steps(sigmas)
    assert steps[0][0] < 1, "UniPC needs a first level below 1"
    frames = _frame_levels(canvas, [*(sigma for sigma, _ in steps), steps[-1][1]])
    for index, step in enumerate(steps[first:], start=first):
        _, denoised = evaluate(velocity_fn, latent, noise, step, canvas)
        if index > 0:
            weights = [_corrector_weights(levels, index) for levels in frames]
            latent = _weighted_sum(weights, (latent, history[0], denoised, *history[1:]))
        weights = [_predictor_weights(levels, index) for levels in frames]
        predicted = _weighted_sum(weights, (latent, denoised, *history[1:2]))
        history = [latent, denoised, *history[1:2]]
        latent = canvas.apply(predicted, noise, step[1])
        yield SampleStep(index, len(steps), latent, denoised, tuple(history))


def _frame_levels(canvas: Canvas, sigmas: Sequence[float]) -> list[list[float]]:
    """The levels of each latent frame, over the steps."""
    levels = torch.stack([canvas.frame_sigma(sigma) for sigma in sigmas], dim=1)
    return [[float(level) for level in row] for row in levels]


def _order(levels: Sequence[float], index: int) -> int:
    """Order of step `index` of a frame; 0 if its level does not fall."""
    if levels[index] == levels[index + 1]:
        return 0
    done = sum(levels[step] > levels[step + 1] for step in range(index))
    return min(_MAX_ORDER, done + 1, len(levels) - 1 - index)


def _predictor_weights(levels: Sequence[float], index: int) -> tuple[float, float, float]:
    """Weights of latent, clean estimate and the estimate before, for the latent of the next level.

    With D the difference of the estimates: next / now x - (1 - next) expm1(-h) (m + D / (2 r)).
    """
    order = _order(levels, index)
    if order == 0:
        return 1.0, 0.0, 0.0
    now = levels[index]
    following = levels[index + 1]
    h = _half_log_snr(following) - _half_log_snr(now)
    scale = -(1 - following) * math.expm1(-h)
    before = 0.0
    if order > 1:
        before = 0.5 * h / (_half_log_snr(levels[index - 1]) - _half_log_snr(now))
    return following / now, scale * (1 - before), scale * before


def _corrector_weights(
    levels: Sequence[float], index: int
) -> tuple[float, float, float, float, float]:
    """Weights of the corrected latent at the level of step `index`.

    Of: predicted latent, corrected latent before, clean estimate, the one before and the oldest.
    """
    order = _order(levels, index - 1)
    if order == 0:
        return 1.0, 0.0, 0.0, 0.0, 0.0
    before = levels[index - 1]
    now = levels[index]
    h = _half_log_snr(now) - _half_log_snr(before)
    scale = -(1 - now) * math.expm1(-h)
    newest = 0.5
    oldest = 0.0
    if order > 1:
        ratio = (_half_log_snr(levels[index - 2]) - _half_log_snr(before)) / h
        # b_1 and b_2 of the paper, which the weights of both differences must match
        phi = math.expm1(-h) / -h - 1
        moment = phi / math.expm1(-h)
        next_moment = 2 * (phi / -h - 0.5) / math.expm1(-h)
        share = (moment - next_moment) / (1 - ratio)
        oldest = share / ratio
        newest = moment - share
    return 0.0, now / before, scale * newest, scale * (1 - newest - oldest), scale * oldest


def _half_log_snr(sigma: float) -> float:
    """Logarithm of signal over noise; infinite at 0."""
    return math.inf if sigma == 0 else math.log1p(-sigma) - math.log(sigma)


def _weighted_sum(
    weights: Sequence[tuple[float, ...]], tensors: Sequence[Float[Tensor, "b c t h w"]]
) -> Float[Tensor, "b c t h w"]:
    """Sum tensors with weights per latent frame; those without a tensor are 0."""
    columns = torch.tensor(weights, dtype=tensors[0].dtype, device=tensors[0].device)
    rows = [rearrange(column, "t -> 1 1 t 1 1") for column in columns.unbind(dim=1)]
    total = rows[0] * tensors[0]
    for row, tensor in zip(rows[1:], tensors[1:], strict=False):
        total = total + row * tensor
    return total
