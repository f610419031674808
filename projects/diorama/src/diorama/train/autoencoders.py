"""Train the autoencoders: principal components of rendered clips, then the decoder.

`decoder` trains the autoencoder of models/diorama, `autoencoder` that of models/diorama/v1: squared
error, L1, gradient L1 and, for v1, structural similarity.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from skyloom.data.encode import Encode, to_pixels
from skyloom.data.loader import PixelLoader
from skyloom.data.shards import read_shards
from skyloom.evaluate.metrics import psnr, ssim
from skyloom.models.checkpoint import load_into, load_part, save_part
from skyloom.models.diorama.autoencoder import DioramaAutoencoder, initialise_components, shrink
from skyloom.models.diorama.config import PATCH, TIME, AutoencoderConfig
from skyloom.models.diorama.v1.autoencoder import SPACE, Vae, VaeConfig, initialise_linear_path
from skyloom.train.loop import LoopConfig, Task
from skyloom.train.objectives import Losses

PART = "autoencoder"
_EVALUATION_CLIPS = 24


def load_encoder(folder: Path, device: str) -> tuple[Encode, torch.device]:
    """Load an encoder for renders at its own resolution; return it with its device."""
    where = torch.device(device)
    if any(folder.glob("vae*.safetensors")):
        config, state, _ = load_part(folder, "vae", VaeConfig)
        vae = Vae(config)
        load_into(vae, {name: value.float() for name, value in state.items()})
        vae = vae.eval().to(where)
        vae = vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return vae.encode, where
    return load_autoencoder(folder).to(where).encode_small, where


def load_autoencoder(folder: Path) -> DioramaAutoencoder:
    """Load the autoencoder in a folder, in fp32."""
    config, state, _ = load_part(folder, PART, AutoencoderConfig)
    autoencoder = DioramaAutoencoder(config)
    load_into(autoencoder, {name: value.float() for name, value in state.items()})
    return autoencoder.eval()


def save_components(
    folder: Path, config: AutoencoderConfig, clips: list[Path], patches: int, seed: int = 0
) -> float:
    """Write an untrained autoencoder with the components of `clips`; return explained variance."""
    torch.manual_seed(seed)
    autoencoder = DioramaAutoencoder(config)
    explained = initialise_components(autoencoder, sample_patches(clips, patches, seed))
    save_part(folder, PART, config, autoencoder.state_dict(), metadata={"step": "0"})
    return explained


def sample_patches(
    folders: list[Path], count: int, seed: int, size: int = PATCH
) -> Float[Tensor, "n d"]:
    """Draw patches of 4 frames x size x size pixels of clips; one clip in eight is a still."""
    random = np.random.default_rng(seed)
    shards = [frames for folder in folders for frames, _ in read_shards(folder)]
    parts: list[Tensor] = []
    while sum(map(len, parts)) < count:
        shard = shards[random.integers(len(shards))]
        clip = shard[random.integers(len(shard))]
        start = random.integers(max(1, len(clip) - TIME + 1))
        still = random.random() < 1 / 8
        frames = clip[[start] * TIME] if still else clip[start : start + TIME]
        pixels = to_pixels(torch.from_numpy(np.array(frames[None])))
        parts.append(rearrange(pixels[0], "c n (y p) (x q) -> (y x) (n c p q)", p=size, q=size))
    return torch.cat(parts)[:count]


@dataclass(frozen=True)
class DecoderRun:
    """Settings of decoder training on renders at the decoder's resolution.

    init: folder of the autoencoder.
    clips, stills: folders; batches alternate between runs of `frames` frames and single frames.
    crop: pixels per side.
    noise: latents get normal noise of a standard deviation drawn from [0, `noise`] per sample.
    squared, gradient, coarse: weights of the squared error, of the error of neighbouring
        differences, and of the absolute error of 4x4 averages, relative to the absolute error.
    """

    init: str = ""
    clips: tuple[str, ...] = ()
    stills: tuple[str, ...] = ()
    held_out: str = ""
    batch: int = 6
    frames: int = 9
    crop: int = 128
    noise: float = 0.35
    squared: float = 2.0
    gradient: float = 1.0
    coarse: float = 0.5


class StepLoader:
    """Pixels of a step: clips on even steps, four times as many stills on odd ones."""

    def __init__(self, run: DecoderRun, seed: int) -> None:
        self._clips = PixelLoader(
            [Path(one) for one in run.clips], run.batch, run.frames, run.crop, seed
        )
        self._stills = PixelLoader(
            [Path(one) for one in run.stills], 4 * run.batch, 1, run.crop, seed
        )

    def __call__(self, step: int) -> Float[Tensor, "b 3 t h w"]:
        """Load the batch of one step, in [-1, 1]."""
        return (self._stills if step % 2 else self._clips)(step)


def decoder_task(run: DecoderRun, loop: LoopConfig) -> Task:
    """Train the decoder's correction on noisy latents; evaluate PSNR, clean and noisy."""
    torch.manual_seed(loop.seed)
    autoencoder = load_autoencoder(Path(run.init))
    autoencoder.requires_grad_(requires_grad=False)
    decoder = autoencoder.decoder
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_(not name.startswith("linear."))

    def export(weights: dict[str, Tensor], folder: Path, step: int) -> None:
        state = autoencoder.state_dict() | {
            f"decoder.{name}": value for name, value in weights.items()
        }
        save_part(folder, PART, autoencoder.config, state, metadata={"step": str(step)})

    return Task(
        module=decoder,
        batch=StepLoader(run, loop.seed),
        losses=lambda module, video, random: decoder_losses(autoencoder, video, random, run),
        evaluate=lambda module, folder, step: measure_decoder(autoencoder, Path(run.held_out)),
        export=export,
    )


def decoder_losses(
    autoencoder: DioramaAutoencoder,
    video: Float[Tensor, "b 3 t h w"],
    random: torch.Generator,
    run: DecoderRun,
) -> Losses:
    """Reconstruction losses of one batch of pixels."""
    with torch.no_grad():
        latent = autoencoder.encode(video)
        level = torch.rand(len(latent), 1, 1, 1, 1, generator=random) * run.noise
        noisy = latent + level * torch.randn(latent.shape, generator=random)
    with torch.autocast(video.device.type, torch.bfloat16):
        decoded = autoencoder.decode(noisy)
    made, real = (rearrange(part.float(), "b c t h w -> (b t) c h w") for part in (decoded, video))
    absolute = (made - real).abs().mean()
    squared = (made - real).square().mean()
    gradient = (
        gradient_distance(made, real)
        + gradient_distance(F.avg_pool2d(made, 2), F.avg_pool2d(real, 2))
    ) / 2
    coarse = F.avg_pool2d(made - real, 4).abs().mean()
    total = absolute + run.squared * squared + run.gradient * gradient + run.coarse * coarse
    return Losses(total, {"l1": absolute, "squared": squared, "gradient": gradient})


@torch.no_grad()
def measure_decoder(
    autoencoder: nn.Module, folder: Path, levels: Sequence[float] = (0.0, 0.2)
) -> dict[str, float]:
    """Return PSNR in dB at the decoder's and the encoder's resolution, per latent noise level."""
    assert isinstance(autoencoder, DioramaAutoencoder)
    found: dict[str, float] = {}
    clips = torch.from_numpy(np.array(next(read_shards(folder))[0][:16]))
    for level in levels:
        values: list[list[float]] = []
        for index, clip in enumerate(clips.split(4)):
            video = to_pixels(clip)
            latent = autoencoder.encode(video)
            noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(index))
            with torch.autocast("cpu", torch.bfloat16):
                made = autoencoder.decode(latent + level * noise).float().clamp(-1, 1)
            pairs = ((made, video), (shrink(made, 2), shrink(video, 2)))
            flat = [
                [rearrange(x / 2 + 0.5, "b c t h w -> (b t) c h w") for x in pair] for pair in pairs
            ]
            values.append([float(psnr(first, second).mean()) for first, second in flat])
        found[f"psnr@{level}"] = sum(v[0] for v in values) / len(values)
        found[f"small@{level}"] = sum(v[1] for v in values) / len(values)
    return found


@dataclass(frozen=True)
class AutoencoderLossConfig:
    """Weights of the loss terms; latent_noise: standard deviation of noise on the latent."""

    squared: float = 2.0
    gradient: float = 0.5
    similarity: float = 0.1
    latent_noise: float = 0.08


@dataclass(frozen=True)
class AutoencoderRun:
    """The autoencoder, its losses, and folders of rendered clips for training and evaluation."""

    model: VaeConfig = VaeConfig()
    losses: AutoencoderLossConfig = AutoencoderLossConfig()
    folders: tuple[str, ...] = ()
    held_out: str = ""
    batch: int = 4
    frames: int = 17
    crop: int = 96
    patches: int = 60_000


def autoencoder_task(run: AutoencoderRun, loop: LoopConfig) -> Task:
    """Train the decoder from principal components on crops of clips; evaluate PSNR and SSIM."""
    folders = [Path(folder) for folder in run.folders]
    torch.manual_seed(loop.seed)
    vae = Vae(run.model)
    initialise_linear_path(vae, sample_patches(folders, run.patches, loop.seed, SPACE))
    normalise(vae, folders[0])
    vae.encoder.requires_grad_(requires_grad=False)
    vae.to(device=loop.device or "cpu")

    losses_of = torch.compile(autoencoder_losses) if loop.compile else autoencoder_losses

    def export(weights: dict[str, Tensor], folder: Path, step: int) -> None:
        save_part(
            folder, "vae", run.model, weights, dtype=torch.bfloat16, metadata={"step": str(step)}
        )

    return Task(
        module=vae,
        batch=PixelLoader(folders, run.batch, run.frames, run.crop, loop.seed),
        losses=lambda module, video, random: losses_of(
            module, video, latent_noise(module, video, random), run.losses
        ),
        evaluate=lambda module, folder, step: measure_autoencoder(module, Path(run.held_out)),
        export=export,
    )


@torch.no_grad()
def normalise(vae: Vae, folder: Path) -> None:
    """Set mean (per channel) and scale (over all channels) from clips."""
    frames, _ = next(read_shards(folder))
    flat = rearrange(
        vae.encode(to_pixels(torch.from_numpy(np.array(frames[:48])))), "b c t h w -> c (b t h w)"
    )
    vae.mean.copy_(flat.mean(1))
    vae.std.fill_((flat - flat.mean(1, keepdim=True)).square().mean().sqrt())


@torch.no_grad()
def measure_autoencoder(vae: nn.Module, folder: Path) -> dict[str, float]:
    """Return PSNR in dB and SSIM on whole held-out clips."""
    assert isinstance(vae, Vae)
    device = next(vae.parameters()).device
    decibels: list[Tensor] = []
    similarities: list[Tensor] = []
    frames, _ = next(read_shards(folder))
    for clip in torch.from_numpy(np.array(frames[:_EVALUATION_CLIPS])).split(4):
        video = to_pixels(clip.to(device))
        with torch.autocast(device.type, torch.bfloat16):
            made = vae.decode(vae.encode(video))
        pair = [
            rearrange(x.float() / 2 + 0.5, "b c t h w -> (b t) c h w")
            for x in (made.clamp(-1, 1), video)
        ]
        decibels.append(psnr(pair[0], pair[1]).mean())
        similarities.append(ssim(pair[0], pair[1]).mean())
    return {
        "psnr": float(torch.stack(decibels).mean()),
        "ssim": float(torch.stack(similarities).mean()),
    }


def latent_noise(
    vae: Vae, video: Float[Tensor, "b 3 t h w"], random: torch.Generator
) -> Float[Tensor, "b c u y x"]:
    """Draw standard normal noise in the shape of a video's latent."""
    batch, _, frames, height, width = video.shape
    scale = vae.config.scale
    shape = (scale.latent_frames(frames), height // scale.space, width // scale.space)
    return torch.randn((batch, vae.config.latent_channels, *shape), generator=random).to(video)


def autoencoder_losses(
    vae: Vae,
    video: Float[Tensor, "b 3 t h w"],
    noise: Float[Tensor, "b c u y x"],
    config: AutoencoderLossConfig,
) -> Losses:
    """Reconstruction losses of pixels in [-1, 1], decoded from a slightly noisy latent."""
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
