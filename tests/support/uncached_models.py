"""Pipelines of models without a rollout: a diorama whose rollout is left out, and a tiny Wan."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from skyloom.generate.pipeline import Pipeline
from skyloom.models.base import ModelBundle
from skyloom.models.family import SizeRule
from skyloom.models.registry import ModelInfo, read_model
from skyloom.models.wan.autoencoder import WanAutoencoder, WanAutoencoderConfig
from skyloom.models.wan.config import WanConfig
from skyloom.models.wan.transformer import Wan

CPU = torch.device("cpu")
SIZES = SizeRule(multiple=32, min_side=32, max_side=96, max_area=96 * 64, default=(64, 32))
WAN_CELLS = 16  # channels of a latent


def copy_without_rollout(folder: Path, target: Path, **changes: Any) -> Path:
    """Copy a model folder without its rollout, with other values in its manifest."""
    shutil.copytree(folder, target)
    manifest = {**json.loads((folder / "manifest.json").read_text()), **changes}
    del manifest["rollout"]
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


def without_rollout(folder: Path) -> ModelInfo:
    """The tiny model's record without its rollout, for sides that are multiples of 32."""
    info = read_model(folder)
    manifest = {key: value for key, value in info.manifest.items() if key != "rollout"}
    return replace(info, manifest=manifest, size_rule=SIZES)


def diorama_pipeline(folder: Path) -> Pipeline:
    """The tiny diorama without a rollout."""
    bundle = ModelBundle.load(without_rollout(folder), CPU, torch.float32)
    return Pipeline(bundle)


def wan_pipeline(folder: Path) -> Pipeline:
    """A Wan transformer and autoencoder of random weights, with the diorama's text encoder."""
    bundle = ModelBundle.load(without_rollout(folder), CPU, torch.float32)
    torch.manual_seed(0)
    autoencoder = WanAutoencoder(WanAutoencoderConfig(width=8, decoder_width=8))
    width = bundle.text_encoder.encode(["a"]).context.shape[-1]
    transformer = Wan(
        WanConfig(
            in_channels=WAN_CELLS,
            out_channels=WAN_CELLS,
            width=48,
            heads=2,
            layers=2,
            ffn=64,
            text_width=width,
            text_length=16,
        )
    )
    for network in (autoencoder, transformer):
        for parameter in network.parameters():
            if parameter.dim() > 1:
                fan_in = parameter[0].numel()
                torch.nn.init.normal_(parameter, std=fan_in**-0.5)
        network.place(CPU, torch.float32)
    manifest = {key: one for key, one in bundle.info.manifest.items() if key != "student_steps"}
    info = replace(bundle.info, manifest=manifest)
    return Pipeline(replace(bundle, info=info, autoencoder=autoencoder, transformer=transformer))
