"""Which noise levels to train on: a distribution for one level, and patterns over the latent frames.

Levels are logit-normal with a uniform share (Esser et al. 2024, arXiv 2403.03206), then shifted towards
noise. A sample's pattern says how its frames are related: all alike, a clean past, clean ends, a clean
first frame, a clean future, one level per window, or all independent (diffusion forcing, arXiv 2407.01392).
"""

from dataclasses import dataclass

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from skyloom.core.errors import ConfigError
from skyloom.diffusion.schedule import shift_sigma

PATTERNS = ("same", "prefix", "infill", "first", "suffix", "window", "independent")
SILENT_SIGMA = 0.02
LAYOUT_SIGMA = 0.88
_ROLLOUT_SHARES = {"prefix": 0.75, "window": 0.25}
_MIDDLE_SHARES = {"prefix": 0.25, "infill": 0.45, "suffix": 0.25, "same": 0.05}


@dataclass(frozen=True)
class NoiseConfig:
    """Shares of the patterns (in any unit), the distribution of one level, and how alike the noise of neighbouring
    frames is.

    `layout_share` of the levels are uniform above LAYOUT_SIGMA: where only the text says what will be where.
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
            raise ConfigError(
                f"A correlation of {self.correlation} is none.", hint="Use 0 up to, but not, 1."
            )
        shares = [getattr(self, name) for name in PATTERNS]
        if min(shares) < 0 or sum(shares) <= 0:
            raise ConfigError(
                f"The shares of the noise patterns are {shares}.", hint="Use shares above 0."
            )
        if not self.shift > 0:
            raise ConfigError(
                f"A shift of {self.shift} is not a factor.", hint="Use a number above 0."
            )


def sample_sigmas(
    batch: int,
    frames: int,
    generator: torch.Generator,
    config: NoiseConfig,
    past: int = 0,
    *,
    middle: bool = False,
) -> Float[Tensor, "b t"]:
    """Noise levels in [0, 1] for every latent frame of every sample.

    Known frames (past, ends, first or future) are clean in half of the samples and carry noise up to
    `context_noise` in the other half. Where a rollout remembers `past` frames, these are the known ones, except
    in samples with one level per window. In the `middle` of a video, as edits see it, something is known nearly always.
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
            made = torch.where(known[name], context, shared)
        else:
            made = {"same": shared, "window": windows, "independent": own}[name]
        sigma = torch.where((pattern == index)[:, None], made, sigma)
    return sigma


@dataclass(frozen=True)
class ContextConfig:
    """A `share` of samples with known first frames, which carry noise up to `most`; `window` latent frames are made
    at a time. With a `past`, every sample has that many known frames. A share `ends` has known last frames too."""

    share: float
    most: float
    window: int
    past: int = 0
    ends: float = 0.0


def sample_contexts(
    batch: int, frames: int, generator: torch.Generator, config: ContextConfig
) -> Float[Tensor, "b t"]:
    """The noise of the known frames of each sample; infinity where a frame is to be made, and one always is.

    Known first frames end where a window of a rollout does (whole windows), or after the first frame, as with a
    picture; known last ones begin anywhere. Half of them are clean, half carry noise.
    """
    starts = torch.tensor([1, *range(config.window, frames, config.window)])
    past = starts[torch.randint(0, len(starts), (batch,), generator=generator)]
    past = torch.where(torch.rand(batch, generator=generator) < config.share, past, 0)
    past = torch.full_like(past, config.past) if config.past else past
    level = torch.rand(batch, generator=generator) * config.most
    level = torch.where(torch.rand(batch, generator=generator) < 1 / 2, 0.0, level)
    index = torch.arange(frames)[None]
    known = index < past[:, None]
    if config.ends:
        rest = (
            torch.rand(batch, generator=generator) * (frames - past)
        ).long()  # made frames: at least one
        ending = torch.rand(batch, generator=generator) < config.ends
        known = known | ((index > (past + rest)[:, None]) & ending[:, None])
    return torch.where(known, level[:, None], torch.inf)


def sample_levels(
    shape: tuple[int, ...], generator: torch.Generator, config: NoiseConfig
) -> Float[Tensor, "..."]:
    """Independent noise levels: shifted logit-normal, a share of them uniform."""
    normal = torch.randn(shape, generator=generator) * config.spread + config.mean
    uniform = torch.rand(shape, generator=generator)
    plain = torch.rand(shape, generator=generator) < config.uniform_share
    levels = shift_sigma(torch.where(plain, uniform, torch.sigmoid(normal)), config.shift)
    if config.layout_share == 0:
        return levels
    high = torch.lerp(
        torch.tensor(LAYOUT_SIGMA), torch.tensor(1.0), torch.rand(shape, generator=generator)
    )
    return torch.where(torch.rand(shape, generator=generator) < config.layout_share, high, levels)


def loss_weight(sigma: Float[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """1 where there is something to predict, 0 for frames that are practically clean."""
    return (sigma > SILENT_SIGMA).to(sigma.dtype)


def _known_frames(batch: int, frames: int, generator: torch.Generator) -> dict[str, Tensor]:
    """For each pattern with known frames, which ones are known [b t]; at least one is always to be made."""
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
