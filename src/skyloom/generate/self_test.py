"""Whether this machine decodes as it should: processors and their kernels have been wrong in bf16 (docs/log.md)."""

from pathlib import Path

import torch

from skyloom.media.frames import to_frames
from skyloom.models.checkpoint import load_into, load_part
from skyloom.models.vae import Vae, VaeConfig, place

TOLERANCE = 16
"""The largest difference, of 255, that rounding to bf16 explains; the bundled model's is 1 where bf16 is right."""
_FRAMES, _CELLS = 3, 8


def compare_decoders(folder: Path, device: torch.device, dtype: torch.dtype) -> int:
    """The largest difference, of 255, of frames by a model's decoder on a device in a dtype from the CPU in fp32.

    Both decode the same noise (8x8 cells, 9 frames). Raises CheckpointError.
    """
    config, state, _ = load_part(folder, "vae", VaeConfig)
    random = torch.Generator().manual_seed(0)
    latent = torch.randn(1, config.latent_channels, _FRAMES, _CELLS, _CELLS, generator=random)
    made: list[torch.Tensor] = []
    for where, kind in ((torch.device("cpu"), torch.float32), (device, dtype)):
        vae = Vae(config)
        load_into(vae, state)
        with torch.no_grad():
            made.append(to_frames(place(vae, where, kind).decode(latent.to(where))[0]).cpu().int())
    return int((made[0] - made[1]).abs().max())
