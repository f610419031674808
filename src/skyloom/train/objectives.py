"""Training losses: (model, batch, generator) -> Losses.

Flow: velocity matching with a noise level per latent frame (diffusion forcing, Chen et al. 2024,
arXiv 2407.01392), with bidirectional and causal attention in one mix.
Distillation: a student in the same weights learns the long steps of a guided teacher (progressive
distillation, Salimans and Ho 2022, arXiv 2202.00512), and longer ones from its own shorter ones
(shortcut models, Frans et al. 2024, arXiv 2410.12557).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from skyloom.core.seeds import chain_frames
from skyloom.core.seeds import generator as make_generator
from skyloom.data.loader import LatentBatch, LatentLoader
from skyloom.diffusion.flow import add_noise, mean_velocity, to_velocity, velocity_target
from skyloom.diffusion.guidance import cfg_delta
from skyloom.diffusion.sampling import multistep_mean_velocity
from skyloom.diffusion.schedule import make_sigmas
from skyloom.diffusion.timesteps import (
    ContextConfig,
    NoiseConfig,
    loss_weight,
    sample_contexts,
    sample_sigmas,
)
from skyloom.models.base import AttentionMode, TextCondition

_EVALUATION_SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
_EVALUATION_BATCHES = 4
# shares of excerpts from within a video with known first frames, and with known last frames
_EXCERPT_KNOWN = 0.75


@dataclass(frozen=True)
class Losses:
    """The loss to minimise, and its parts for the log."""

    total: Tensor
    parts: dict[str, Tensor]


@runtime_checkable
class Network(Protocol):
    """A denoising network; its config has `prediction` and `window` (latent frames)."""

    config: Any

    def prepare_text(self, context: Any, context_mask: Any, pooled: Any) -> TextCondition:
        """Project prompts for all layers."""
        ...

    def parameters(self) -> Any:
        """Iterate over the weights."""
        ...

    def __call__(
        self, latent: Tensor, sigma: Tensor, text: TextCondition, **options: Any
    ) -> Tensor:
        """Predict; options: `attention_mode`, `span`, `frame_indices`."""
        ...


AuxiliaryLosses = Callable[[Network, LatentBatch, TextCondition], Losses | None]
"""A further loss of a network on the batch and texts of `flow_losses`; its total is added."""


@dataclass(frozen=True)
class FlowConfig:
    """Settings of velocity matching.

    causal_share: share of batches with causal attention.
    caption_dropout: share of samples with the empty caption.
    hidden_words: share of samples without the tokens' own word vectors.
    steady_weight: weight of changes of the error between latent frames, which show as flicker.
    """

    noise: NoiseConfig = NoiseConfig()
    causal_share: float = 0.5
    caption_dropout: float = 0.1
    hidden_words: float = 0.0
    steady_weight: float = 0.0


def flow_losses(
    network: Network,
    batch: LatentBatch,
    generator: torch.Generator,
    config: FlowConfig,
    auxiliary: AuxiliaryLosses | None = None,
) -> Losses:
    """Velocity error of one batch, averaged over noisy latent frames, plus an auxiliary loss."""
    latent = batch.latent
    device = latent.device
    count, _, frames, _, _ = latent.shape
    excerpt = batch.frame_indices is not None and not batch.past
    causal = (
        float(torch.rand((), generator=generator)) < config.causal_share and not excerpt
    ) or batch.past > 0
    sigma = sample_sigmas(count, frames, generator, config.noise, batch.past, middle=excerpt)
    sigma = sigma.to(device)
    noise = chain_frames(
        torch.randn(latent.shape, generator=generator), config.noise.correlation
    ).to(latent)
    dropped = (torch.rand(count, generator=generator) < config.caption_dropout).to(device)
    hidden = (
        torch.rand(count, generator=generator) < config.hidden_words
        if config.hidden_words
        else None
    )
    noisy = add_noise(latent, noise, sigma)
    with autocast(network, device):
        text = network.prepare_text(*batch.captions(dropped, hidden))
        mode: AttentionMode = "causal" if causal else "bidirectional"
        prediction = network(
            noisy, sigma, text, attention_mode=mode, frame_indices=batch.frame_indices
        )
    velocity = to_velocity(network.config.prediction, prediction.float(), noisy, sigma)
    error = velocity - velocity_target(latent, noise)
    weight = loss_weight(sigma)
    total = squared_error(error, weight)
    parts = {"rollout" if batch.past else "middle" if excerpt else mode: total}
    if config.steady_weight:
        total = total + config.steady_weight * temporal_error(error, weight)
    more = None if auxiliary is None else auxiliary(network, batch, text)
    if more is not None:
        parts |= more.parts
        total = total + more.total
    return Losses(total, parts)


def autocast(module: Network, device: torch.device) -> torch.autocast:
    """Autocast to bf16 if the weights are fp32."""
    needed = next(module.parameters()).dtype == torch.float32
    return torch.autocast(device.type, torch.bfloat16, enabled=needed)


def squared_error(error: Float[Tensor, "b c t h w"], weight: Float[Tensor, "b t"]) -> Tensor:
    """Mean square over latent frames, weighted."""
    squares = error.square().mean(dim=(1, 3, 4))
    return (squares * weight).sum() / weight.sum().clamp(min=1)


def temporal_error(error: Float[Tensor, "b c t h w"], weight: Float[Tensor, "b t"]) -> Tensor:
    """Half the mean square of the change of an error between latent frames; known frames have 0.

    Equals `squared_error` in expectation if errors of neighbours are independent, 0 if equal.
    """
    if error.shape[2] == 1:
        return error.new_zeros(())
    change = (error * rearrange(weight, "b t -> b 1 t 1 1")).diff(dim=2)
    squares = change.square().mean(dim=(1, 3, 4)) / 2
    counted = torch.maximum(weight[:, 1:], weight[:, :-1])
    return (squares * counted).sum() / counted.sum().clamp(min=1)


@dataclass(frozen=True)
class DistillConfig:
    """Settings of distillation.

    num_steps: steps of the student. substeps: guided steps of the teacher per student step.
    halved: share of batches in which the student learns half or a quarter as many steps from
        itself.
    flow_share: share of batches with velocity matching, which preserves the teacher.
    causal_share, known_share, ends_share: shares with causal attention, known first frames, and
        known last frames.
    context_noise: highest noise level of known frames.
    """

    num_steps: int = 4
    guidance_scale: float = 3.0
    shift: float = 2.0
    substeps: int = 3
    halved: float = 0.2
    flow_share: float = 0.2
    causal_share: float = 0.5
    known_share: float = 0.5
    ends_share: float = 0.0
    context_noise: float = 0.15
    correlation: float = 0.0
    steady_weight: float = 0.0


def distill_losses(
    network: Network,
    teacher: Network,
    batch: LatentBatch,
    generator: torch.Generator,
    config: DistillConfig,
) -> Losses:
    """Squared distance between the student's long step and the teacher's short, guided steps.

    A `known_share` of the samples has known first frames, as windows of a rollout have; with
    bidirectional attention an `ends_share` has known last frames, as edits have.
    """
    latent = batch.latent
    device = latent.device
    count, _, frames, _, _ = latent.shape
    chances = torch.rand(3, generator=generator).tolist()
    excerpt = batch.frame_indices is not None and not batch.past
    causal = (chances[0] < config.causal_share and not excerpt) or batch.past > 0
    mode: AttentionMode = "causal" if causal else "bidirectional"
    known_share = _EXCERPT_KNOWN if excerpt else config.known_share
    ends = 0.0 if causal else _EXCERPT_KNOWN if excerpt else config.ends_share
    own = chances[1] < config.halved
    steps = config.num_steps // (1 if not own else 2 if chances[2] < 2 / 3 else 4)
    sigmas = make_sigmas(steps, config.shift)
    index = torch.randint(0, steps, (count,), generator=generator)
    contexts = ContextConfig(
        known_share, config.context_noise, network.config.window, batch.past, ends
    )
    context = sample_contexts(count, frames, generator, contexts)
    known = torch.isfinite(context)
    start, end = (
        torch.where(known, torch.minimum(context, edge[:, None]), edge[:, None]).to(device)
        for edge in (sigmas[index], sigmas[index + 1])
    )
    end = torch.where(known.to(device), start, end)
    drawn = torch.randn(latent.shape, generator=generator)
    noisy = add_noise(latent, chain_frames(drawn, config.correlation).to(latent), start)
    kept = torch.zeros(count, dtype=torch.bool, device=device)
    with autocast(network, device):
        text = network.prepare_text(*batch.captions(kept))
        if own:
            halfway = make_sigmas(2 * steps, config.shift)[2 * index + 1].to(device)[:, None]
            path = (start, torch.where(start > end, halfway, start), end)
            target = _own_target(network, batch, noisy, path, text=text, mode=mode)
        else:
            edges = (start, end)
            target = _teacher_target(teacher, batch, noisy, edges, mode=mode, config=config)
        prediction = network(
            noisy,
            start,
            text,
            attention_mode=mode,
            span=start - end,
            frame_indices=batch.frame_indices,
        )
    error = to_velocity(network.config.prediction, prediction.float(), noisy, start) - target
    weight = (start > end).to(error.dtype)
    squares = squared_error(error, weight)
    total = squares
    if config.steady_weight:
        total = total + config.steady_weight * temporal_error(error, weight)
    name = f"{steps} steps" if own else "rollout" if batch.past else "middle" if excerpt else mode
    return Losses(total, {name: squares})


@torch.no_grad()
def _teacher_target(
    teacher: Network,
    batch: LatentBatch,
    noisy: Tensor,
    edges: tuple[Tensor, Tensor],
    mode: AttentionMode,
    config: DistillConfig,
) -> Tensor:
    """Mean velocity of the guided teacher; prompted and unprompted samples in one batch."""
    count = len(noisy)
    dropped = torch.arange(2 * count, device=noisy.device) >= count
    both = LatentBatch(batch.latent, batch.rows * 2, batch.table)
    text = teacher.prepare_text(*both.captions(dropped))

    def velocity(latent: Tensor, sigma: Tensor) -> Tensor:
        twice = torch.cat([latent, latent])
        levels = torch.cat([sigma, sigma])
        made = teacher(
            twice, levels, text, attention_mode=mode, frame_indices=batch.frame_indices
        ).float()
        with_prompt, without = to_velocity(teacher.config.prediction, made, twice, levels).chunk(2)
        return with_prompt + cfg_delta(with_prompt, without, config.guidance_scale)

    return multistep_mean_velocity(velocity, noisy, *edges, config.substeps)


@torch.no_grad()
def _own_target(
    network: Network,
    batch: LatentBatch,
    noisy: Tensor,
    path: tuple[Tensor, Tensor, Tensor],
    text: TextCondition,
    mode: AttentionMode,
) -> Tensor:
    """Mean velocity of two consecutive steps of the student."""
    start, middle, end = path
    moved = noisy
    for level, after in ((start, middle), (middle, end)):
        made = network(
            moved,
            level,
            text,
            attention_mode=mode,
            span=level - after,
            frame_indices=batch.frame_indices,
        ).float()
        velocity = to_velocity(network.config.prediction, made, moved, level)
        moved = moved - (level - after)[:, None, :, None, None] * velocity
    return mean_velocity(noisy, moved, start, end)


@torch.no_grad()
def measure_flow(
    network: Network, held_out: LatentLoader, correlation: float = 0.0
) -> dict[str, float]:
    """Return the squared velocity error per attention mode and level, on fixed samples and noise.

    Errors at different `correlation` of the noise are not comparable.
    """
    errors: dict[str, list[float]] = {}
    for index in range(_EVALUATION_BATCHES):
        batch = held_out(index)
        latent = batch.latent
        drawn = torch.randn(latent.shape, generator=make_generator(2, "measure", index))
        noise = chain_frames(drawn, correlation).to(latent)
        kept = torch.zeros(len(latent), dtype=torch.bool)
        with autocast(network, latent.device):
            text = network.prepare_text(*batch.captions(kept))
        for level in _EVALUATION_SIGMAS:
            sigma = torch.full((len(latent), latent.shape[2]), level).to(latent)
            noisy = add_noise(latent, noise, sigma)
            for mode in ("bidirectional", "causal") if latent.shape[2] > 1 else ("bidirectional",):
                with autocast(network, latent.device):
                    made = network(noisy, sigma, text, attention_mode=mode)
                velocity = to_velocity(network.config.prediction, made.float(), noisy, sigma)
                error = float((velocity - velocity_target(latent, noise)).square().mean())
                errors.setdefault(mode, []).append(error)
                errors.setdefault(f"{mode}@{level}", []).append(error)
    return {name: sum(values) / len(values) for name, values in errors.items()}
