"""Build, save and load the diorama's autoencoder, and train its decoder.

python -m skyloom.train.autoencoders --clips FOLDER --out FOLDER
writes an autoencoder with the principal components of rendered clips and an untrained decoder.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from skyloom.data.clips import read_shards
from skyloom.data.encode import Encode, to_pixels
from skyloom.data.loader import PixelLoader
from skyloom.evaluate.metrics import psnr
from skyloom.models.checkpoint import load_into, load_part, save_part
from skyloom.models.diorama.autoencoder import (
    PATCH,
    TIME,
    AutoencoderConfig,
    DioramaAutoencoder,
    initialise_components,
    shrink,
)
from skyloom.models.diorama.v1.autoencoder import Vae, VaeConfig
from skyloom.train.loop import LoopConfig, Task
from skyloom.train.objectives import Losses, gradient_distance

PART = "autoencoder"


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


def sample_patches(folders: list[Path], count: int, seed: int) -> Float[Tensor, "n d"]:
    """Draw 4x8x8 patches of rendered clips; one clip in eight is a still frame."""
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
        parts.append(rearrange(pixels[0], "c n (y p) (x q) -> (y x) (n c p q)", p=PATCH, q=PATCH))
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


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=Path, nargs="+", required=True)
    parser.add_argument("--channels", type=int, default=AutoencoderConfig.channels)
    parser.add_argument("--patches", type=int, default=120_000)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    explained = save_components(
        arguments.out,
        AutoencoderConfig(channels=arguments.channels),
        arguments.clips,
        arguments.patches,
    )
    message = f"{arguments.channels} components explain {explained:.4f} of the variance"
    print(message)  # noqa: T201 - output of the command


if __name__ == "__main__":
    main()
