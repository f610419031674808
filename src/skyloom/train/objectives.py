"""What a model is asked to be good at: (model, batch, generator) -> Losses. No optimizer in here.

Autoencoder: squared error + L1 + gradient L1 + structural similarity, for the decoder alone (the encoder is
principal components and stays).
Distill: a student in the same weights takes the long steps of a guided teacher (progressive distillation, Salimans
and Ho 2022, arXiv 2202.00512; longer ones from its own shorter ones: shortcut models, Frans et al. 2024, arXiv
2410.12557).
Flow: velocity matching with a noise level per latent frame (diffusion forcing, Chen et al. 2024,
arXiv 2407.01392) and the two readings of the canvas, bidirectional and causal, in one mix.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from skyloom.core.seeds import chain_frames
from skyloom.data.loader import LatentBatch
from skyloom.diffusion.flow import add_noise, to_velocity, velocity_target
from skyloom.diffusion.guidance import cfg_delta
from skyloom.diffusion.sampling import mean_velocity
from skyloom.diffusion.schedule import make_sigmas
from skyloom.diffusion.timesteps import (
    ContextConfig,
    NoiseConfig,
    loss_weight,
    sample_contexts,
    sample_sigmas,
)
from skyloom.evaluate.metrics import ssim
from skyloom.models.diorama.transformer import UNet
from skyloom.models.dit import Dit, Reading, TextCondition
from skyloom.models.vae import Vae

Network = Dit | UNet

_MIDDLE_KNOWN = (
    0.75  # of samples from the middle of a video: known first frames, and known last ones
)


@dataclass(frozen=True)
class Losses:
    """The number to go down, and its parts for the log."""

    total: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True)
class AutoencoderConfig:
    """Weights of the parts, and the noise that the decoder must bear (in units of the latent's scale)."""

    squared: float = 2.0
    gradient: float = 0.5
    similarity: float = 0.1
    latent_noise: float = 0.08


def latent_noise(
    vae: Vae, video: Float[Tensor, "b 3 t h w"], generator: torch.Generator
) -> Float[Tensor, "b c u y x"]:
    """Standard normal noise in the shape of a video's latent."""
    batch, _, frames, height, width = video.shape
    scale = vae.config.scale
    shape = (scale.latent_frames(frames), height // scale.space, width // scale.space)
    return torch.randn((batch, vae.config.latent_channels, *shape), generator=generator).to(video)


def autoencoder_losses(
    vae: Vae,
    video: Float[Tensor, "b 3 t h w"],
    noise: Float[Tensor, "b c u y x"],
    config: AutoencoderConfig,
) -> Losses:
    """Reconstruction losses of one batch of pixels in [-1, 1], decoded through a little latent noise."""
    with torch.no_grad():
        latent = vae.encode(video)
    with torch.autocast(video.device.type, torch.bfloat16):
        decoded = vae.decode(latent + config.latent_noise * noise)
    made = rearrange(decoded.float(), "b c t h w -> (b t) c h w")
    real = rearrange(video, "b c t h w -> (b t) c h w")
    absolute = (made - real).abs().mean()
    gradient = (gradient_distance(made, real) + gradient_distance(_half(made), _half(real))) / 2
    similar = 1 - ssim(made[::5] / 2 + 0.5, real[::5] / 2 + 0.5, window=5).mean()
    squared = (made - real).square().mean()
    total = (
        absolute
        + config.squared * squared
        + config.gradient * gradient
        + config.similarity * similar
    )
    parts = {"l1": absolute, "squared": squared, "gradient": gradient, "dissimilarity": similar}
    return Losses(total, parts)


def gradient_distance(first: Float[Tensor, "n c h w"], second: Float[Tensor, "n c h w"]) -> Tensor:
    """L1 distance between the horizontal and vertical differences of neighbouring pixels."""
    gap = first - second
    return gap.diff(dim=-1).abs().mean() + gap.diff(dim=-2).abs().mean()


def _half(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h2 w2"]:
    return F.avg_pool2d(x, 2)


@dataclass(frozen=True)
class FlowConfig:
    """The noise to train on, the share of causal batches, of captions dropped and of those whose words' own vectors are
    hidden (for words that training never saw), what the sketch's error counts, and what changes of the error from one
    latent frame to the next do: they are what flickers."""

    noise: NoiseConfig = NoiseConfig()
    causal_share: float = 0.5
    caption_dropout: float = 0.1
    hidden_words: float = 0.0
    sketch_weight: float = 0.2
    steady_weight: float = 0.0


def flow_losses(
    dit: Network, batch: LatentBatch, generator: torch.Generator, config: FlowConfig
) -> Losses:
    """Velocity error of one batch, averaged over the latent frames that carry noise."""
    latent, device = batch.latent, batch.latent.device
    count, frames = latent.shape[0], latent.shape[2]
    middle = batch.numbers is not None and not batch.past
    causal = (
        float(torch.rand((), generator=generator)) < config.causal_share and not middle
    ) or batch.past > 0
    sigma = sample_sigmas(count, frames, generator, config.noise, batch.past, middle=middle).to(
        device
    )
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
    with autocast(dit, device):
        text = dit.prepare_text(*batch.captions(dropped, hidden))
        reading: Reading = "causal" if causal else "bidirectional"
        prediction = dit(noisy, sigma, text, reading=reading, numbers=batch.numbers)
    gap = to_velocity(dit.config.prediction, prediction.float(), noisy, sigma) - velocity_target(
        latent, noise
    )
    weight = loss_weight(sigma)
    total = squared_error(gap, weight)
    parts = {"rollout" if batch.past else "middle" if middle else reading: total}
    if config.steady_weight:
        total = total + config.steady_weight * unsteadiness(gap, weight)
    if text.meaning is not None and batch.numbers is None:
        assert isinstance(dit, Dit)
        parts["sketch"] = sketch_error(dit, latent, text.meaning)
        total = total + config.sketch_weight * parts["sketch"]
    return Losses(total, parts)


def autocast(module: nn.Module, device: torch.device) -> torch.autocast:
    """Compute in bf16 where the weights are fp32; weights that are bf16 already need no casts."""
    needed = next(module.parameters()).dtype == torch.float32
    return torch.autocast(device.type, torch.bfloat16, enabled=needed)


def squared_error(gap: Float[Tensor, "b c t h w"], weight: Float[Tensor, "b t"]) -> Tensor:
    """Mean square over the latent frames that count."""
    error = gap.square().mean(dim=(1, 3, 4))
    return (error * weight).sum() / weight.sum().clamp(min=1)


def unsteadiness(gap: Float[Tensor, "b c t h w"], weight: Float[Tensor, "b t"]) -> Tensor:
    """Half the mean square of how an error changes from one latent frame to the next; known frames have none.

    As large as `squared_error` where errors of neighbours have nothing to do with each other, 0 where they are alike.
    """
    if gap.shape[2] == 1:
        return gap.new_zeros(())
    change = (gap * rearrange(weight, "b t -> b 1 t 1 1")).diff(dim=2).square().mean(
        dim=(1, 3, 4)
    ) / 2
    counted = torch.maximum(weight[:, 1:], weight[:, :-1])
    return (change * counted).sum() / counted.sum().clamp(min=1)


def sketch_losses(dit: Dit, batch: LatentBatch) -> Losses:
    """The sketch's error alone; one caption in ten is dropped."""
    dropped = torch.arange(len(batch.latent)) % 10 == 0
    pooled = batch.captions(dropped)[2]
    error = sketch_error(dit, batch.latent, pooled[:, -dit.config.sketch :])
    return Losses(error, {"sketch": error})


def sketch_error(
    dit: Dit, latent: Float[Tensor, "b c t h w"], meaning: Float[Tensor, "b s"]
) -> Tensor:
    """Mean squared error of the sketch that a meaning draws; at best the variance of the videos of one prompt."""
    drawn = dit.draw_sketch(meaning.float(), latent.shape[2], latent.shape[3], latent.shape[4])
    return (drawn.float() - latent).square().mean()


@dataclass(frozen=True)
class DistillConfig:
    """The student takes `num_steps` steps; the teacher `substeps` guided ones for each of them.

    `halved` is the share of batches that learn half as many steps, or a quarter, from the student's own. In
    `flow_share` of the batches the velocity is learned as before, so that the teacher in the weights stays.
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
    dit: Network,
    teacher: Network,
    batch: LatentBatch,
    generator: torch.Generator,
    config: DistillConfig,
) -> Losses:
    """Squared distance from the student's long step to where the teacher's short, guided steps lead.

    Half of the samples (`known_share`) have known first frames, as windows of a rollout have them; where the reading is
    bidirectional, some (`ends_share`; most of those from the middle of a video) have known last ones, as edits have.
    """
    latent, device = batch.latent, batch.latent.device
    count, frames = latent.shape[0], latent.shape[2]
    chances = torch.rand(3, generator=generator).tolist()
    middle = batch.numbers is not None and not batch.past
    causal = (chances[0] < config.causal_share and not middle) or batch.past > 0
    reading: Reading = "causal" if causal else "bidirectional"
    known_share = _MIDDLE_KNOWN if middle else config.known_share
    ends = 0.0 if causal else _MIDDLE_KNOWN if middle else config.ends_share
    own = chances[1] < config.halved
    steps = config.num_steps // (1 if not own else 2 if chances[2] < 2 / 3 else 4)
    sigmas = make_sigmas(steps, config.shift)
    index = torch.randint(0, steps, (count,), generator=generator)
    contexts = ContextConfig(known_share, config.context_noise, dit.config.window, batch.past, ends)
    context = sample_contexts(count, frames, generator, contexts)
    known = torch.isfinite(context)
    start, end = (
        torch.where(known, torch.minimum(context, edge[:, None]), edge[:, None]).to(device)
        for edge in (sigmas[index], sigmas[index + 1])
    )
    end = torch.where(known.to(device), start, end)
    noise = chain_frames(torch.randn(latent.shape, generator=generator), config.correlation).to(
        latent
    )
    noisy = add_noise(latent, noise, start)
    kept = torch.zeros(count, dtype=torch.bool, device=device)
    with autocast(dit, device):
        text = dit.prepare_text(*batch.captions(kept))
        if own:
            halfway = make_sigmas(2 * steps, config.shift)[2 * index + 1].to(device)[:, None]
            path = (start, torch.where(start > end, halfway, start), end)
            target = _own_target(dit, noisy, path, text, reading, batch.numbers)
        else:
            target = _teacher_target(teacher, batch, noisy, (start, end), reading, config)
        prediction = dit(
            noisy, start, text, reading=reading, span=start - end, numbers=batch.numbers
        )
    gap = to_velocity(dit.config.prediction, prediction.float(), noisy, start) - target
    weight = (start > end).to(gap.dtype)
    error = squared_error(gap, weight)
    total = (
        error + config.steady_weight * unsteadiness(gap, weight) if config.steady_weight else error
    )
    name = f"{steps} steps" if own else "rollout" if batch.past else "middle" if middle else reading
    return Losses(total, {name: error})


@torch.no_grad()
def _teacher_target(
    teacher: Network,
    batch: LatentBatch,
    noisy: Tensor,
    edges: tuple[Tensor, Tensor],
    reading: Reading,
    config: DistillConfig,
) -> Tensor:
    """The guided teacher's mean velocity; with and without the prompt in one batch."""
    count = len(noisy)
    dropped = torch.arange(2 * count, device=noisy.device) >= count
    both = LatentBatch(batch.latent, batch.rows * 2, batch.table)
    text = teacher.prepare_text(*both.captions(dropped))

    def velocity(latent: Tensor, sigma: Tensor) -> Tensor:
        twice, levels = torch.cat([latent, latent]), torch.cat([sigma, sigma])
        made = teacher(twice, levels, text, reading=reading, numbers=batch.numbers).float()
        with_prompt, without = to_velocity(teacher.config.prediction, made, twice, levels).chunk(2)
        return with_prompt + cfg_delta(with_prompt, without, config.guidance_scale)

    return mean_velocity(velocity, noisy, *edges, config.substeps)


@torch.no_grad()
def _own_target(
    dit: Network,
    noisy: Tensor,
    path: tuple[Tensor, Tensor, Tensor],
    text: TextCondition,
    reading: Reading,
    numbers: Tensor | None,
) -> Tensor:
    """The mean velocity of two of the student's own steps, one after the other."""
    start, middle, end = path
    moved = noisy
    for level, after in ((start, middle), (middle, end)):
        made = dit(moved, level, text, reading=reading, span=level - after, numbers=numbers).float()
        velocity = to_velocity(dit.config.prediction, made, moved, level)
        moved = moved - (level - after)[:, None, :, None, None] * velocity
    span = (start - end)[:, None, :, None, None]
    return torch.where(span > 0, (noisy - moved) / span.clamp(min=1e-6), torch.zeros_like(noisy))
