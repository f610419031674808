"""What a model is asked to be good at: (model, batch, generator) -> Losses. No optimizer in here.

Autoencoder: squared error + L1 + gradient L1 + structural similarity, for the decoder alone (the encoder is
principal components and stays).
Flow: velocity matching with a noise level per latent frame (diffusion forcing, Chen et al. 2024,
arXiv 2407.01392) and the two readings of the canvas, bidirectional and causal, in one mix.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from skyloom.data.loader import LatentBatch
from skyloom.diffusion.flow import add_noise, to_velocity, velocity_target
from skyloom.diffusion.timesteps import NoiseConfig, loss_weight, sample_sigmas
from skyloom.evaluate.metrics import ssim
from skyloom.models.dit import Dit
from skyloom.models.vae import Vae


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


def latent_noise(vae: Vae, video: Float[Tensor, "b 3 t h w"], generator: torch.Generator) -> Float[Tensor, "b c u y x"]:
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
    total = absolute + config.squared * squared + config.gradient * gradient + config.similarity * similar
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
    """The noise to train on, the share of causal batches, and the share of captions dropped."""

    noise: NoiseConfig = NoiseConfig()
    causal_share: float = 0.5
    caption_dropout: float = 0.1


def flow_losses(dit: Dit, batch: LatentBatch, generator: torch.Generator, config: FlowConfig) -> Losses:
    """Velocity error of one batch, averaged over the latent frames that carry noise."""
    latent, device = batch.latent, batch.latent.device
    count, frames = latent.shape[0], latent.shape[2]
    causal = float(torch.rand((), generator=generator)) < config.causal_share
    sigma = sample_sigmas(count, frames, generator, config.noise).to(device)
    noise = torch.randn(latent.shape, generator=generator).to(latent)
    dropped = (torch.rand(count, generator=generator) < config.caption_dropout).to(device)
    noisy = add_noise(latent, noise, sigma)
    with torch.autocast(device.type, torch.bfloat16):
        text = dit.prepare_text(*batch.captions(dropped))
        prediction = dit(noisy, sigma, text, reading="causal" if causal else "bidirectional")
    velocity = to_velocity(dit.config.prediction, prediction.float(), noisy, sigma)
    error = (velocity - velocity_target(latent, noise)).square().mean(dim=(1, 3, 4))
    weight = loss_weight(sigma)
    total = (error * weight).sum() / weight.sum().clamp(min=1)
    return Losses(total, {"causal" if causal else "bidirectional": total})
