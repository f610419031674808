"""Random generators keyed by (seed, sample, window, purpose), always on the CPU.

The noise of a video depends only on its seed, and is independent of batch, rank, length and device.
"""

import hashlib

import torch
from jaxtyping import Float
from torch import Tensor


def derive_seed(seed: int, *path: int | str) -> int:
    """Hash a seed and a path of names or indices into a new seed in [0, 2**63)."""
    text = "/".join(str(part) for part in (seed, *path))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *path: int | str) -> torch.Generator:
    """Return a CPU generator for one purpose, e.g. `generator(7, "window", 2, "noise")`."""
    return torch.Generator().manual_seed(derive_seed(seed, *path))


def chain_frames(
    noise: Float[Tensor, "b c t h w"],
    correlation: float,
    before: Float[Tensor, "b c h w"] | None = None,
) -> Float[Tensor, "b c t h w"]:
    """Correlate noise from frame to frame; each frame stays standard normal.

    Progressive noise (Ge et al. 2023, arXiv 2305.10474) reduces flicker. `before` is the last noise
    frame of the previous window. `correlation` in [0, 1); 0 returns the noise unchanged.
    """
    if not correlation:
        return noise
    scale = (1 - correlation**2) ** 0.5
    chained = [] if before is None else [before]
    for frame in noise.unbind(dim=2):
        chained.append(correlation * chained[-1] + scale * frame if chained else frame)
    return torch.stack(chained[-noise.shape[2] :], dim=2)


def noise(seed: int, shape: tuple[int, ...], *path: int | str) -> Float[Tensor, "..."]:
    """Draw standard normal noise of `shape` for one purpose of one sample."""
    return torch.randn(shape, generator=generator(seed, *path))
