"""Training tasks of the autoencoder and of the denoising network."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from skyloom.core.errors import ConfigError
from skyloom.core.seeds import chain_frames, generator
from skyloom.data.clips import read_shards
from skyloom.data.encode import to_pixels
from skyloom.data.loader import CaptionTable, LatentBatch, LatentLoader, LatentSource, PixelLoader
from skyloom.diffusion.flow import add_noise, to_velocity, velocity_target
from skyloom.evaluate.metrics import psnr, ssim
from skyloom.models.checkpoint import from_int8, load_into, load_part, save_part
from skyloom.models.diorama.transformer import UNet, UNetConfig
from skyloom.models.diorama.v1.autoencoder import SPACE, TIME, Vae, initialise_linear_path
from skyloom.models.diorama.v1.transformer import Dit, DitConfig
from skyloom.train.loop import LoopConfig, Task
from skyloom.train.objectives import (
    Losses,
    Network,
    autocast,
    autoencoder_losses,
    distill_losses,
    flow_losses,
    latent_noise,
    sketch_losses,
)
from skyloom.train.recipe import AutoencoderRun, FlowRun

_EVALUATION_CLIPS = 24
_EVALUATION_SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
_EVALUATION_BATCHES = 4


def autoencoder_task(run: AutoencoderRun, loop: LoopConfig) -> Task:
    """Train the decoder from principal components on crops of clips; evaluate PSNR and SSIM."""
    folders = [Path(folder) for folder in run.folders]
    torch.manual_seed(loop.seed)
    vae = Vae(run.model)
    initialise_linear_path(vae, sample_patches(folders, run.patches, loop.seed))
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


def sample_patches(folders: list[Path], count: int, seed: int) -> Float[Tensor, "n d"]:
    """Draw 4x16x16 patches of rendered clips; one clip in eight is a still frame."""
    random = np.random.default_rng(seed)
    shards = [frames for folder in folders for frames, _ in read_shards(folder)]
    patches: list[Tensor] = []
    while sum(map(len, patches)) < count:
        clip = shards[random.integers(len(shards))]
        clip = clip[random.integers(len(clip))]
        start = random.integers(max(1, len(clip) - TIME + 1))
        frames = clip[[start] * TIME] if random.random() < 1 / 8 else clip[start : start + TIME]
        pixels = to_pixels(torch.from_numpy(np.array(frames[None])))
        patches.append(rearrange(pixels[0], "c n (y p) (x q) -> (y x) (n c p q)", p=SPACE, q=SPACE))
    return torch.cat(patches)[:count]


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


def flow_task(run: FlowRun, loop: LoopConfig) -> Task:
    """Train on latents of clips; evaluate the velocity error at fixed levels on held-out clips."""
    device = loop.device or "cpu"
    torch.manual_seed(loop.seed)
    part, network = _network(run)
    network.to(device)
    if loop.compile and isinstance(network, Dit):
        for block in network.blocks:
            block.compile(dynamic=False)
    table = CaptionTable(Path(run.captions))
    held_out = LatentLoader((LatentSource(run.held_out, batch=25),), table, seed=1, device=device)

    def export(weights: dict[str, Tensor], folder: Path, step: int) -> None:
        save_part(
            folder,
            part,
            network.config,
            weights,
            dtype=torch.bfloat16,
            metadata={"step": str(step)},
        )

    return Task(
        module=network,
        batch=LatentLoader(run.sources, table, loop.seed, device),
        losses=_flow_losses(run, network),
        evaluate=lambda module, folder, step: measure_flow(
            module, held_out, run.losses.noise.correlation
        ),
        export=export,
    )


def _network(run: FlowRun) -> tuple[str, Network]:
    """Return the part name and the network of a recipe, with the `init` weights if given."""
    if (run.unet is None) == (run.model is None):
        raise ConfigError(
            "A flow recipe must have exactly one of the tables [flow.unet] and [flow.model]."
        )
    if run.unet is not None:
        unet = UNet(run.unet)
        if run.init:
            load_into(unet, from_int8(load_part(Path(run.init), "unet", UNetConfig)[1]))
        return "unet", unet
    assert run.model is not None
    dit = Dit(run.model)
    if run.init:
        state = load_part(Path(run.init), "dit", DitConfig)[1]
        weights = {name: value.float() for name, value in state.items()}
        load_into(dit, _expand_weights(weights, dit.state_dict()))
    return "dit", dit


def _expand_weights(state: dict[str, Tensor], fresh: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fit weights to a larger model, which then computes the same function.

    Columns for new text channels and the output of new refiner blocks are 0.
    """
    grown = {
        name: value
        for name, value in fresh.items()
        if name.startswith(("span.", "places.", "sketch.", "detail."))
    } | state
    for name in ("text.inner.weight", "pooled.weight"):
        if name in grown and grown[name].shape[1] < fresh[name].shape[1]:
            grown[name] = F.pad(grown[name], (0, fresh[name].shape[1] - grown[name].shape[1]))
    for name in ("detail.levels.weight", "detail.levels.bias"):
        if name in state and len(state[name]) < len(fresh[name]):
            grown[name] = torch.cat([state[name], fresh[name][len(state[name]) :]])
    for name, value in fresh.items():
        if (
            name.startswith("detail.convolutions.")
            and name not in state
            and int(name.split(".")[2]) % 2
        ):
            grown[name] = torch.zeros_like(value)
    return grown


def _flow_losses(
    run: FlowRun, dit: Network
) -> Callable[[Any, LatentBatch, torch.Generator], Losses]:
    """Losses of a flow recipe; with `distill`, the teacher is a frozen copy of the weights."""
    if run.sketch_only:
        for name, parameter in dit.named_parameters():
            parameter.requires_grad_(
                name.startswith("sketch.") and not name.startswith("sketch.into")
            )
        return lambda module, batch, random: sketch_losses(module, batch)
    if run.distill is None:
        return lambda module, batch, random: flow_losses(module, batch, random, run.losses)
    if run.init is None or (run.model is not None and not run.model.span):
        raise ConfigError(
            "`distill` needs `init`, the weights of the teacher, and for a DiT `model.span = true`."
        )
    config = run.distill
    teacher = copy.deepcopy(dit).eval().requires_grad_(requires_grad=False)

    def losses(module: Network, batch: LatentBatch, random: torch.Generator) -> Losses:
        if float(torch.rand((), generator=random)) < config.flow_share:
            return flow_losses(module, batch, random, run.losses)
        return distill_losses(module, teacher, batch, random, config)

    return losses


@torch.no_grad()
def measure_flow(
    dit: nn.Module, held_out: LatentLoader, correlation: float = 0.0
) -> dict[str, float]:
    """Return the squared velocity error per attention mode and level, on fixed samples and noise.

    Errors at different `correlation` of the noise are not comparable.
    """
    assert isinstance(dit, Network)
    errors: dict[str, list[float]] = {}
    for index in range(_EVALUATION_BATCHES):
        batch = held_out(index)
        latent = batch.latent
        drawn = torch.randn(latent.shape, generator=generator(2, "measure", index))
        noise = chain_frames(drawn, correlation).to(latent)
        kept = torch.zeros(len(latent), dtype=torch.bool)
        with autocast(dit, latent.device):
            text = dit.prepare_text(*batch.captions(kept))
        for level in _EVALUATION_SIGMAS:
            sigma = torch.full((len(latent), latent.shape[2]), level).to(latent)
            noisy = add_noise(latent, noise, sigma)
            for mode in ("bidirectional", "causal") if latent.shape[2] > 1 else ("bidirectional",):
                with autocast(dit, latent.device):
                    made = dit(noisy, sigma, text, attention_mode=mode)
                velocity = to_velocity(dit.config.prediction, made.float(), noisy, sigma)
                error = float((velocity - velocity_target(latent, noise)).square().mean())
                errors.setdefault(mode, []).append(error)
                errors.setdefault(f"{mode}@{level}", []).append(error)
    return {name: sum(values) / len(values) for name, values in errors.items()}
