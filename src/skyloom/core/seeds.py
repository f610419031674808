"""One random generator per (seed, sample, window, purpose), always on the CPU.

So the noise of a video depends on nothing but its own seed: not on batch, rank, length or device.
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
    """A CPU generator for one purpose of one sample, e.g. `generator(7, "window", 2, "noise")`."""
    return torch.Generator().manual_seed(derive_seed(seed, *path))


def chain_frames(
    noise: Float[Tensor, "b c t h w"],
    correlation: float,
    before: Float[Tensor, "b c h w"] | None = None,
) -> Float[Tensor, "b c t h w"]:
    """Noise whose frames are alike from one to the next, each still standard normal: what a model makes of noise that
    moves little flickers less (progressive noise: Ge et al. 2023, arXiv 2305.10474). `before` is the last frame of
    the noise that this goes on from. A correlation of 0 returns the noise as it is.
    """
    if not correlation:
        return noise
    chained, fresh = [] if before is None else [before], (1 - correlation**2) ** 0.5
    for frame in noise.unbind(dim=2):
        chained.append(correlation * chained[-1] + fresh * frame if chained else frame)
    return torch.stack(chained[-noise.shape[2] :], dim=2)


def noise(seed: int, shape: tuple[int, ...], *path: int | str) -> Float[Tensor, "..."]:
    """Standard normal noise of `shape`, drawn for one purpose of one sample."""
    return torch.randn(shape, generator=generator(seed, *path))
