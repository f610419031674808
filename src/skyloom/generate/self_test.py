"""Compare decoding on a device with fp32 on the CPU: some bf16 kernels are wrong (docs/log.md)."""

import torch

from skyloom.media.frames import to_frames
from skyloom.models.base import find_loader
from skyloom.models.registry import ModelInfo

TOLERANCE = 16
"""Largest pixel difference (of 255) that bf16 rounding explains; the bundled model's is 1."""
_LATENT_FRAMES = 3
_LATENT_SIDE = 8


def compare_decoders(info: ModelInfo, device: torch.device, dtype: torch.dtype) -> int:
    """Return the largest pixel difference (of 255) of a model's decoder to fp32 on the CPU.

    Both decode the same noise of three latent frames. Raises CheckpointError.
    """
    if device.type == "cpu" and dtype == torch.float32:
        return 0  # the same call twice
    decoded: list[torch.Tensor] = []
    for where, kind in ((torch.device("cpu"), torch.float32), (device, dtype)):
        autoencoder = find_loader(info).load_autoencoder(info, where, kind)
        shape = (1, autoencoder.latent_channels, _LATENT_FRAMES, _LATENT_SIDE, _LATENT_SIDE)
        latent = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            pixels = autoencoder.decode(latent.to(where))[0]
        decoded.append(to_frames(pixels).cpu().int())
    return int((decoded[0] - decoded[1]).abs().max())
