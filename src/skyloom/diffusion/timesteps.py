"""Noise levels for training: the distribution of one level, and patterns over the latent frames.

Levels are logit-normal with a uniform share (Esser et al. 2024, arXiv 2403.03206), then shifted
towards noise. A sample's pattern relates its frames: one level for all (same), known first frames
(prefix), known ends (infill), a known first frame (first), known last frames (suffix), one level
per window, or independent levels (diffusion forcing, arXiv 2407.01392).
"""

from dataclasses import dataclass

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from skyloom.core.errors import ConfigError
from skyloom.diffusion.schedule import shift_sigma

PATTERNS = ("same", "prefix", "infill", "first", "suffix", "window", "independent")
CLEAN_SIGMA = 0.02
LAYOUT_SIGMA = 0.88
_ROLLOUT_SHARES = {"prefix": 0.75, "window": 0.25}
_MIDDLE_SHARES = {"prefix": 0.25, "infill": 0.45, "suffix": 0.25, "same": 0.05}


@dataclass(frozen=True)
class NoiseConfig:
    """Distribution of training noise.

    same ... independent: relative shares of the patterns.
    shift, mean, spread, uniform_share: the distribution of one level.
    layout_share: share of levels drawn uniformly above LAYOUT_SIGMA, where the prompt alone
        determines the layout.
    context_noise: highest level of known frames.
    window_frames: latent frames per window.
    correlation: correlation of the noise of neighbouring latent frames.
    """

    shift: float = 2.0
    mean: float = 0.0
    spread: float = 1.0
    uniform_share: float = 0.1
    layout_share: float = 0.0
    same: float = 0.5
    prefix: float = 0.15
    infill: float = 0.05
    first: float = 0.1
    suffix: float = 0.0
    window: float = 0.1
    independent: float = 0.1
    context_noise: float = 0.15
    window_frames: int = 3
    correlation: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.correlation < 1:
            raise ConfigError(f"correlation must be in [0, 1), got {self.correlation}.")
        shares = {name: getattr(self, name) for name in PATTERNS}
        if min(shares.values()) < 0 or sum(shares.values()) <= 0:
            raise ConfigError(
                f"Shares of noise patterns must be >= 0 with a sum > 0, got {shares}."
            )
        if not self.shift > 0:
            raise ConfigError(f"shift must be > 0, got {self.shift}.")


def sample_sigmas(
    batch: int,
    frames: int,
    generator: torch.Generator,
    config: NoiseConfig,
    past: int = 0,
    *,
    middle: bool = False,
) -> Float[Tensor, "b t"]:
    """Draw a noise level in [0, 1] for every latent frame of every sample.

    Known frames are clean in half of the samples and carry noise up to `context_noise` in the other
    half. past: number of leading frames that a rollout has cached; they are the known ones, except
    in samples with one level per window. middle: use the pattern shares of edits within a video,
    where some frames are nearly always known.
    """
    shared = repeat(sample_levels((batch,), generator, config), "b -> b t", t=frames)
    if frames == 1:
        return shared.clone()
    own = sample_levels((batch, frames), generator, config)
    windows = repeat(own, "b t -> b (t n)", n=config.window_frames)[:, :frames]
    context = torch.rand(batch, 1, generator=generator) * config.context_noise
    context = torch.where(torch.rand(batch, 1, generator=generator) < 1 / 2, 0.0, context)
    known = _known_frames(batch, frames, generator)
    special = _ROLLOUT_SHARES if past else _MIDDLE_SHARES if middle else None
    shares = torch.tensor(
        [getattr(config, name) if special is None else special.get(name, 0.0) for name in PATTERNS]
    )
    if past:
        known = dict.fromkeys(known, (torch.arange(frames) < past)[None].expand(batch, -1))
    pattern = torch.multinomial(shares, batch, replacement=True, generator=generator)
    sigma = shared.clone()
    for index, name in enumerate(PATTERNS):
        if name in known:
            levels = torch.where(known[name], context, shared)
        else:
            levels = {"same": shared, "window": windows, "independent": own}[name]
        sigma = torch.where((pattern == index)[:, None], levels, sigma)
    return sigma


@dataclass(frozen=True)
class ContextConfig:
    """Which frames of a training sample are known.

    share: share of samples with known first frames.
    max_sigma: highest noise level of known frames.
    window: latent frames generated at a time.
    past: if > 0, the number of known first frames of every sample.
    ends: share of samples with known last frames.
    """

    share: float
    max_sigma: float
    window: int
    past: int = 0
    ends: float = 0.0


def sample_contexts(
    batch: int, frames: int, generator: torch.Generator, config: ContextConfig
) -> Float[Tensor, "b t"]:
    """Draw the noise level of known frames; infinity for frames to generate (at least one).

    Known first frames end at a window boundary or after the first frame (image to video); known
    last frames start anywhere. Half of the samples have clean known frames, half have noisy ones.
    """
    starts = torch.tensor([1, *range(config.window, frames, config.window)])
    past = starts[torch.randint(0, len(starts), (batch,), generator=generator)]
    past = torch.where(torch.rand(batch, generator=generator) < config.share, past, 0)
    past = torch.full_like(past, config.past) if config.past else past
    level = torch.rand(batch, generator=generator) * config.max_sigma
    level = torch.where(torch.rand(batch, generator=generator) < 1 / 2, 0.0, level)
    index = torch.arange(frames)[None]
    known = index < past[:, None]
    if config.ends:
        # frames to generate after the first one
        rest = (torch.rand(batch, generator=generator) * (frames - past)).long()
        ending = torch.rand(batch, generator=generator) < config.ends
        known = known | ((index > (past + rest)[:, None]) & ending[:, None])
    return torch.where(known, level[:, None], torch.inf)


def sample_levels(
    shape: tuple[int, ...], generator: torch.Generator, config: NoiseConfig
) -> Float[Tensor, "..."]:
    """Draw independent levels: shifted logit-normal, a share of them uniform."""
    normal = torch.randn(shape, generator=generator) * config.spread + config.mean
    uniform = torch.rand(shape, generator=generator)
    plain = torch.rand(shape, generator=generator) < config.uniform_share
    levels = shift_sigma(torch.where(plain, uniform, torch.sigmoid(normal)), config.shift)
    if config.layout_share == 0:
        return levels
    position = torch.rand(shape, generator=generator)
    high = torch.lerp(torch.tensor(LAYOUT_SIGMA), torch.tensor(1.0), position)
    return torch.where(torch.rand(shape, generator=generator) < config.layout_share, high, levels)


def loss_weight(sigma: Float[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """Return 1 for noisy frames and 0 for frames at or below CLEAN_SIGMA."""
    return (sigma > CLEAN_SIGMA).to(sigma.dtype)


def _known_frames(batch: int, frames: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Mask [b t] of known frames per pattern; at least one frame is always unknown."""
    index = torch.arange(frames)
    past = torch.randint(1, frames, (batch, 1), generator=generator)
    start = torch.randint(1, max(2, frames - 1), (batch, 1), generator=generator)
    end = start + 1 + (torch.rand(batch, 1, generator=generator) * (frames - start - 1)).long()
    return {
        "prefix": index < past,
        "infill": (index < start) | (index >= end),
        "first": index < 1,
        "suffix": index >= past,
    }
