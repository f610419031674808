"""Loaders of the diorama family (`models.base.FamilyLoader`).

A folder holds the parts `text`, `unet` and `autoencoder`; those of the first model hold `dit` and
`vae` (v1/) instead of the last two.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from skyloom.models.base import Autoencoder, ClipReader, ModelBundle, NetworkCost, Transformer
from skyloom.models.checkpoint import build, has_part, open_part, read_config
from skyloom.models.diorama.autoencoder import DioramaAutoencoder
from skyloom.models.diorama.config import AutoencoderConfig, UNetConfig
from skyloom.models.diorama.probe import load_probe
from skyloom.models.diorama.text_encoder import load_text_encoder
from skyloom.models.diorama.transformer import UNet
from skyloom.models.diorama.v1.autoencoder import Vae, VaeConfig
from skyloom.models.diorama.v1.transformer import Dit, DitConfig
from skyloom.models.registry import ModelInfo

_FLOATS_PER_CHANNEL = 24  # live fp32 values per token and channel


def load(info: ModelInfo, device: torch.device, dtype: torch.dtype) -> ModelBundle:
    """Load all parts of a model. Raises CheckpointError."""
    return ModelBundle(
        info,
        text_encoder=load_text_encoder(info.folder),
        autoencoder=load_autoencoder(info, device, dtype),
        transformer=load_transformer(info.folder, device, dtype),
        device=device,
        dtype=dtype,
    )


def load_transformer(folder: Path, device: torch.device, dtype: torch.dtype) -> Transformer:
    """Load the part `unet` or, in a folder of the first model, `dit`. Raises CheckpointError."""
    if has_part(folder, "dit"):
        with open_part(folder, "dit") as reader:
            dit_config = reader.config(DitConfig)
            return build(lambda: Dit(dit_config), reader, device, dtype)
    with open_part(folder, "unet") as reader:
        config = reader.config(UNetConfig)
        return build(lambda: UNet(config), reader, device, dtype)


def load_autoencoder(info: ModelInfo, device: torch.device, dtype: torch.dtype) -> Autoencoder:
    """Load the part `autoencoder` or, in a folder of the first model, `vae`.

    Raises CheckpointError.
    """
    folder = info.folder
    if has_part(folder, "vae"):
        with open_part(folder, "vae") as reader:
            vae_config = reader.config(VaeConfig)
            return build(lambda: Vae(vae_config), reader, device, dtype)
    with open_part(folder, "autoencoder") as reader:
        config = reader.config(AutoencoderConfig)
        return build(lambda: DioramaAutoencoder(config), reader, device, dtype)


def load_clip_reader(info: ModelInfo) -> ClipReader:
    """Load the clip reader: the probe in the model's folder, else the bundled one."""
    return load_probe(info.folder if has_part(info.folder, "probe") else None)


def read_network_cost(info: ModelInfo) -> NetworkCost:
    """Read the cost of the networks from their configs, without weights. Raises CheckpointError."""
    folder = info.folder
    if has_part(folder, "dit"):
        vae = read_config(folder, "vae", VaeConfig)
        dit = read_config(folder, "dit", DitConfig)
        weights = 6 * dit.width**2 + 2 * dit.width * dit.ffn
        return NetworkCost(
            scale=vae.scale,
            latent_channels=vae.latent_channels,
            patch=dit.patch,
            token_flops=2.0 * dit.layers * weights,
            key_flops=4.0 * dit.layers * dit.width,
            token_bytes=4 * _FLOATS_PER_CHANNEL * dit.width,
        )
    autoencoder = read_config(folder, "autoencoder", AutoencoderConfig)
    unet = read_config(folder, "unet", UNetConfig)
    return NetworkCost(
        scale=autoencoder.scale,
        latent_channels=autoencoder.channels,
        patch=(1, 2, 2),
        token_flops=2.0 * _unet_weights(unet),
        key_flops=4.0 * unet.attentions * unet.widths[1],
        token_bytes=4 * _FLOATS_PER_CHANNEL * (4 * unet.widths[0] + unet.widths[1]),
    )


def _unet_weights(config: UNetConfig) -> int:
    """Multiplications of a U-Net per coarse token, which covers four cells of the fine level."""
    with torch.device("meta"):
        unet = UNet(config)
    total = 0
    modules: Iterable[tuple[str, nn.Module]] = cast(Any, unet).named_modules()
    for name, module in modules:
        per_frame = name.endswith("modulation")
        if per_frame or not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        level = name.split(".")[0]
        if level in ("stem", "fine_in", "skip", "fine_out", "head"):
            total += 4 * module.weight.numel()
        elif level in ("to_coarse", "coarse_in", "attentions", "coarse_out", "to_fine"):
            total += module.weight.numel()
    return total
