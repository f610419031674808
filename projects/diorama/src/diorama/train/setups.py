"""Training setups of the diorama family: autoencoder, decoder, flow (the network) and probe."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diorama.clips import select_rows
from diorama.train.autoencoders import AutoencoderRun, DecoderRun, autoencoder_task, decoder_task
from diorama.train.probe import ProbeRun, probe_task
from skyloom.core.errors import ConfigError
from skyloom.data.loader import CaptionTable, LatentBatch, LatentLoader, LatentSource
from skyloom.models.base import TextCondition
from skyloom.models.checkpoint import from_int8, load_into, load_part, save_part
from skyloom.models.diorama.config import UNetConfig
from skyloom.models.diorama.transformer import UNet
from skyloom.models.diorama.v1.transformer import Dit, DitConfig
from skyloom.train.loop import LoopConfig, Task
from skyloom.train.objectives import (
    DistillConfig,
    FlowConfig,
    Losses,
    distill_losses,
    flow_losses,
    measure_flow,
)
from skyloom.train.setups import Setup, register_setup


@dataclass(frozen=True)
class SketchFlowConfig(FlowConfig):
    """Flow losses with the error of the mean-latent predictor, weighted by `sketch_weight`."""

    sketch_weight: float = 0.2


@dataclass(frozen=True)
class FlowRun:
    """The network (exactly one of `unet` and `model`), its losses, and encoded clips.

    init: folder with exported weights to start from.
    distill: train a few-step student; the `init` weights are the teacher (a DiT needs
        `model.span`).
    sketch_only: train only the DiT's mean-latent predictor.
    held_out: folder of clips for evaluation.
    """

    unet: UNetConfig | None = None
    model: DitConfig | None = None
    losses: SketchFlowConfig = SketchFlowConfig()
    distill: DistillConfig | None = None
    sketch_only: bool = False
    sources: tuple[LatentSource, ...] = ()
    captions: str = ""
    held_out: str = ""
    init: str | None = None


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
    source = LatentSource(run.held_out, batch=25)
    held_out = LatentLoader((source,), table, seed=1, device=device, select_rows=select_rows)

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
        batch=LatentLoader(run.sources, table, loop.seed, device, select_rows=select_rows),
        losses=_flow_losses(run, network),
        evaluate=lambda module, folder, step: measure_flow(
            module, held_out, run.losses.noise.correlation
        ),
        export=export,
    )


def _network(run: FlowRun) -> tuple[str, Dit | UNet]:
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
        load_into(dit, expand_weights(weights, dit.state_dict()))
    return "dit", dit


def expand_weights(state: dict[str, Tensor], fresh: dict[str, Tensor]) -> dict[str, Tensor]:
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
    run: FlowRun, dit: Dit | UNet
) -> Callable[[Any, LatentBatch, torch.Generator], Losses]:
    """Losses of a flow recipe; with `distill`, the teacher is a frozen copy of the weights."""
    if run.sketch_only:
        for name, parameter in dit.named_parameters():
            parameter.requires_grad_(
                name.startswith("sketch.") and not name.startswith("sketch.into")
            )
        return lambda module, batch, random: sketch_losses(module, batch)

    def auxiliary(module: Any, batch: LatentBatch, text: TextCondition) -> Losses | None:
        return weighted_sketch_losses(module, batch, text, run.losses.sketch_weight)

    if run.distill is None:
        return lambda module, batch, random: flow_losses(
            module, batch, random, run.losses, auxiliary
        )
    if run.init is None or (run.model is not None and not run.model.span):
        raise ConfigError(
            "`distill` needs `init`, the weights of the teacher, and for a DiT `model.span = true`."
        )
    config = run.distill
    teacher = copy.deepcopy(dit).eval().requires_grad_(requires_grad=False)

    def losses(module: Dit | UNet, batch: LatentBatch, random: torch.Generator) -> Losses:
        if float(torch.rand((), generator=random)) < config.flow_share:
            return flow_losses(module, batch, random, run.losses, auxiliary)
        return distill_losses(module, teacher, batch, random, config)

    return losses


def weighted_sketch_losses(
    network: Dit | UNet, batch: LatentBatch, text: TextCondition, weight: float
) -> Losses | None:
    """Weighted error of the mean-latent predictor; None without one, or for a part of a video."""
    if text.attributes is None or batch.frame_indices is not None:
        return None
    assert isinstance(network, Dit)
    error = sketch_error(network, batch.latent, text.attributes)
    return Losses(weight * error, {"sketch": error})


def sketch_losses(dit: Dit, batch: LatentBatch) -> Losses:
    """Error of the mean-latent predictor alone; one caption in ten is dropped."""
    dropped = torch.arange(len(batch.latent)) % 10 == 0
    pooled = batch.captions(dropped)[2]
    error = sketch_error(dit, batch.latent, pooled[:, -dit.config.sketch :])
    return Losses(error, {"sketch": error})


def sketch_error(
    dit: Dit, latent: Float[Tensor, "b c t h w"], attributes: Float[Tensor, "b s"]
) -> Tensor:
    """Squared error of the predicted mean latent; at best the variance given the prompt."""
    drawn = dit.draw_sketch(attributes.float(), latent.shape[2], latent.shape[3], latent.shape[4])
    return (drawn.float() - latent).square().mean()


def register() -> None:
    """Register the setups of the diorama family; skyloom calls it by the entry point."""
    register_setup("autoencoder", Setup(AutoencoderRun, autoencoder_task))
    register_setup("decoder", Setup(DecoderRun, decoder_task))
    register_setup("flow", Setup(FlowRun, flow_task))
    register_setup("probe", Setup(ProbeRun, probe_task))
