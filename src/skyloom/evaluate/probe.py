"""The probe: a small convolutional reader of videos, to measure whether a model did as asked.

It is trained on rendered clips alone (train/probe.py), never on generated ones. Noun, place, hour and colour
are the mean of what it reads in a few frames; the direction comes from how the frames differ, so a thing that
faces left but stands still reads as "none".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from skyloom.models.checkpoint import load_into, load_part

BUNDLED = Path(__file__).parent.parent / "bundled" / "probe"
CATEGORIES = ("noun", "place", "time_of_day", "colour", "direction")
DIRECTIONS = ("none", "left", "right")
NONE = "none"


@dataclass(frozen=True)
class ProbeConfig:
    """What the probe can say, and how wide it is. It looks at `size` pixels on the shorter side."""

    nouns: tuple[str, ...]
    places: tuple[str, ...]
    times: tuple[str, ...]
    colours: tuple[str, ...]
    size: int = 64
    frames: int = 5
    widths: tuple[int, int, int, int] = (32, 64, 128, 224)
    features: int = 192
    points: int = 8
    several: bool = False  # whether it can name more than one thing

    def labels(self, category: str) -> tuple[str, ...]:
        """The answers in one category; colour and direction may be "none"."""
        return {
            "noun": self.nouns,
            "place": self.places,
            "time_of_day": self.times,
            "colour": (NONE, *self.colours),
            "direction": DIRECTIONS,
        }[category]


@dataclass(frozen=True)
class Impression:
    """What the probe makes of a batch of videos: scores for every answer, and the features behind them."""

    scores: dict[str, Float[Tensor, "b _"]]
    features: Float[Tensor, "b t d"]
    things: Float[Tensor, "b k"] | None = None


@dataclass(frozen=True)
class Reading:
    """What the probe reads in one video; `nouns` are ordered from likely to unlikely.

    `things` too, but each by itself, as far as the probe can: two that are there are both likely.
    """

    noun: str
    place: str
    time_of_day: str
    colour: str
    direction: str
    nouns: tuple[str, ...]
    features: Float[Tensor, "t d"]
    things: tuple[str, ...] = ()


class Step(nn.Module):
    """Convolve, normalise, bend; what keeps its shape is added to what came in."""

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.residual = stride == 1 and channels == width

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k h2 w2"]:
        made = F.relu(self.norm(self.conv(x)))
        return x + made if self.residual else made


class Motion(nn.Module):
    """Compares the maps of two frames: where the interesting points went, and what moved past what."""

    def __init__(self, width: int, points: int, answers: int) -> None:
        super().__init__()
        self.points = nn.Conv2d(width, points, 1)
        self.compare = nn.Sequential(
            nn.Conv2d(2 * width, 64, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.answer = nn.Sequential(
            nn.Linear(64 + 4 * points, 64), nn.ReLU(), nn.Linear(64, answers)
        )

    def forward(
        self, before: Float[Tensor, "b c h w"], after: Float[Tensor, "b c h w"]
    ) -> Float[Tensor, "b k"]:
        compared = reduce(self.compare(torch.cat([before, after], 1)), "b c h w -> b c", "mean")
        start, end = self._places(before), self._places(after)
        return self.answer(torch.cat([compared, start, 4 * (end - start)], 1))

    def _places(self, maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """The soft arg-max of each point, in [-1, 1]."""
        heat = self.points(maps)
        share = rearrange(
            rearrange(heat, "b k h w -> b k (h w)").float().softmax(-1), "b k n -> (b k) n"
        )
        rows = torch.linspace(-1, 1, heat.shape[2], device=heat.device)
        columns = torch.linspace(-1, 1, heat.shape[3], device=heat.device)
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
        return rearrange(
            share @ rearrange(grid, "a h w -> (h w) a"), "(b k) a -> b (k a)", k=heat.shape[1]
        )


class Things(nn.Module):
    """Looks for every noun by itself, wherever it may be: a score above 0 says that it is there."""

    def __init__(self, width: int, answers: int) -> None:
        super().__init__()
        self.look = nn.Sequential(
            nn.Conv2d(width, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, answers, 1)
        )

    def forward(self, wide: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        return reduce(self.look(wide), "b k h w -> b k", "max")


class Probe(nn.Module):
    """Videos in [-1, 1] -> scores for every answer."""

    def __init__(self, config: ProbeConfig) -> None:
        super().__init__()
        self.config = config
        first, second, third, last = config.widths
        self.near = nn.Sequential(
            nn.PixelUnshuffle(2),
            Step(12, first),
            Step(first, second, stride=2),
            Step(second, second),
            Step(second, third, stride=2),
            Step(third, third),
            Step(third, third),
        )
        self.far = nn.Sequential(Step(third, last, stride=2), Step(last, last))
        self.norm = nn.LayerNorm(2 * last)
        self.embed = nn.Linear(2 * last, config.features)
        self.motion = Motion(third, config.points, len(DIRECTIONS))
        self.heads = nn.ModuleDict(
            {name: nn.Linear(config.features, len(config.labels(name))) for name in CATEGORIES[:-1]}
        )
        self.things = Things(last, len(config.nouns)) if config.several else None

    def forward(self, video: Float[Tensor, "b 3 t h w"]) -> Impression:
        """Read each video; one frame alone does not move."""
        length = video.shape[2]
        maps = self.near(rearrange(video, "b c t h w -> (b t) c h w"))
        wide = self.far(maps)
        pooled = torch.cat(
            [reduce(wide, "n c h w -> n c", "mean"), reduce(wide, "n c h w -> n c", "max")], 1
        )
        features = rearrange(F.relu(self.embed(self.norm(pooled))), "(b t) d -> b t d", t=length)
        scores = {name: head(features).mean(1) for name, head in self.heads.items()}
        maps = rearrange(maps, "(b t) c h w -> b t c h w", t=length)
        before, after = (maps, maps) if length == 1 else (maps[:, :-1], maps[:, 1:])
        pairs = before.shape[1]
        moved = self.motion(*(rearrange(x, "b t c h w -> (b t) c h w") for x in (before, after)))
        scores["direction"] = reduce(moved, "(b t) k -> b k", "mean", t=pairs)
        things = (
            None
            if self.things is None
            else reduce(self.things(wide), "(b t) k -> b k", "mean", t=length)
        )
        return Impression(scores, features, things)


def choose_frames(total: int, wanted: int) -> Int[Tensor, " t"]:
    """Indices of `wanted` frames spread evenly over a video, first and last included."""
    return torch.linspace(0, total - 1, min(wanted, total)).round().long()


def prepare(frames: UInt8[Tensor, "t h w c"], config: ProbeConfig) -> Float[Tensor, "1 3 u y x"]:
    """A few frames at the probe's own size, in [-1, 1]; the shape of the frame is kept."""
    chosen = rearrange(
        frames[choose_frames(len(frames), config.frames)], "t h w c -> t c h w"
    ).float()
    height, width = chosen.shape[-2:]
    scale = config.size / min(height, width)
    size = (2 * round(height * scale / 2), 2 * round(width * scale / 2))
    if size != (height, width):
        chosen = F.interpolate(
            chosen, size=size, mode="bilinear", antialias=True, align_corners=False
        )
    return rearrange(chosen / 127.5 - 1, "t c h w -> 1 c t h w")


@torch.no_grad()
def read(probe: Probe, frames: UInt8[Tensor, "t h w c"]) -> Reading:
    """Say what a video of any length and size shows."""
    device = next(probe.parameters()).device
    seen = probe(prepare(frames, probe.config).to(device))
    best = {
        name: scores[0].argsort(descending=True).tolist() for name, scores in seen.scores.items()
    }
    said = {name: probe.config.labels(name)[order[0]] for name, order in best.items()}
    nouns = tuple(probe.config.nouns[index] for index in best["noun"])
    found = (
        ()
        if seen.things is None
        else tuple(probe.config.nouns[i] for i in seen.things[0].argsort(descending=True))
    )
    return Reading(**said, nouns=nouns, features=seen.features[0].float().cpu(), things=found)


def read_all(probe: Probe, videos: Sequence[UInt8[Tensor, "t h w c"]]) -> list[Reading]:
    """Read several videos, each by itself."""
    return [read(probe, frames) for frames in videos]


def load_probe(folder: Path | None = None) -> Probe:
    """The probe of a folder, or the bundled one. Raises CheckpointError when it is missing or broken."""
    config, state, _ = load_part(BUNDLED if folder is None else folder, "probe", ProbeConfig)
    probe = Probe(config)
    load_into(probe, {name: value.float() for name, value in state.items()})
    return probe.eval()
