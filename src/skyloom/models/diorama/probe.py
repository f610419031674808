# pyright: basic
"""Probe: a small convolutional classifier of videos that measures prompt adherence.

Trained on rendered clips alone (projects/diorama). Noun, place, time of day and colour are averaged
over a few frames. Direction is predicted from differences between frames, so a subject that faces
left without moving has direction "none".
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from skyloom.models.checkpoint import build, open_part

BUNDLED = Path(__file__).parents[2] / "bundled" / "probe"
CATEGORIES = ("noun", "place", "time_of_day", "colour", "direction")
DIRECTIONS = ("none", "left", "right")
NONE = "none"


@dataclass(frozen=True)
class ProbeConfig:
    """Labels and sizes of the probe.

    size: pixels on the shorter side. several: whether it has a multi-label head.
    """

    nouns: tuple[str, ...]
    places: tuple[str, ...]
    times: tuple[str, ...]
    colours: tuple[str, ...]
    size: int = 64
    frames: int = 5
    widths: tuple[int, int, int, int] = (32, 64, 128, 224)
    features: int = 192
    points: int = 8
    several: bool = False

    def labels(self, category: str) -> tuple[str, ...]:
        """Return the labels of a category; colour and direction include "none"."""
        return {
            "noun": self.nouns,
            "place": self.places,
            "time_of_day": self.times,
            "colour": (NONE, *self.colours),
            "direction": DIRECTIONS,
        }[category]


@dataclass(frozen=True)
class ProbeOutput:
    """Scores per category, features, and multi-label scores `things` for a batch of videos."""

    scores: dict[str, Float[Tensor, "b _"]]
    features: Float[Tensor, "b t d"]
    things: Float[Tensor, "b k"] | None = None


@dataclass(frozen=True)
class ProbePrediction:
    """Labels of one video.

    nouns: all nouns by falling probability. things: all nouns by falling score of the multi-label
    head, where several present nouns score high.
    """

    noun: str
    place: str
    time_of_day: str
    colour: str
    direction: str
    nouns: tuple[str, ...]
    features: Float[Tensor, "t d"]
    things: tuple[str, ...] = ()


class ConvBlock(nn.Module):
    """Convolution, batch norm, ReLU; residual if the shape is unchanged."""

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.residual = stride == 1 and channels == width

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k h2 w2"]:
        """Apply the block."""
        made = F.relu(self.norm(self.conv(x)))
        return x + made if self.residual else made


class DirectionHead(nn.Module):
    """Predict the direction from the feature maps of two frames and from tracked points."""

    def __init__(self, width: int, points: int, labels: int) -> None:
        super().__init__()
        self.points = nn.Conv2d(width, points, 1)
        self.compare = nn.Sequential(
            nn.Conv2d(2 * width, 64, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.answer = nn.Sequential(
            nn.Linear(64 + 4 * points, 64), nn.ReLU(), nn.Linear(64, labels)
        )

    def forward(
        self, before: Float[Tensor, "b c h w"], after: Float[Tensor, "b c h w"]
    ) -> Float[Tensor, "b k"]:
        """Score the direction of each pair of frames."""
        compared = reduce(self.compare(torch.cat([before, after], 1)), "b c h w -> b c", "mean")
        start = self._positions(before)
        end = self._positions(after)
        return self.answer(torch.cat([compared, start, 4 * (end - start)], 1))

    def _positions(self, maps: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Return the soft arg-max of each point, in [-1, 1]."""
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


class MultiLabelHead(nn.Module):
    """Score the presence of every noun independently; a score above 0 means present."""

    def __init__(self, width: int, labels: int) -> None:
        super().__init__()
        self.look = nn.Sequential(
            nn.Conv2d(width, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, labels, 1)
        )

    def forward(self, wide: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Return the highest score over the frame."""
        return reduce(self.look(wide), "b k h w -> b k", "max")


class Probe(nn.Module):
    """Classifier of videos in [-1, 1]."""

    def __init__(self, config: ProbeConfig) -> None:
        super().__init__()
        self.config = config
        first, second, third, last = config.widths
        self.near = nn.Sequential(
            nn.PixelUnshuffle(2),
            ConvBlock(12, first),
            ConvBlock(first, second, stride=2),
            ConvBlock(second, second),
            ConvBlock(second, third, stride=2),
            ConvBlock(third, third),
            ConvBlock(third, third),
        )
        self.far = nn.Sequential(ConvBlock(third, last, stride=2), ConvBlock(last, last))
        self.norm = nn.LayerNorm(2 * last)
        self.embed = nn.Linear(2 * last, config.features)
        self.motion = DirectionHead(third, config.points, len(DIRECTIONS))
        self.heads = nn.ModuleDict(
            {name: nn.Linear(config.features, len(config.labels(name))) for name in CATEGORIES[:-1]}
        )
        self.things = MultiLabelHead(last, len(config.nouns)) if config.several else None

    def labels(self, category: str) -> tuple[str, ...]:
        """Return the labels of a category or, for "things", of the multi-label head."""
        return self.config.nouns if category == "things" else self.config.labels(category)

    def choose_frames(self, total: int) -> list[int]:
        """Return the indices of the frames that it looks at, in a clip of `total` frames."""
        return choose_frames(total, self.config.frames).tolist()

    @torch.no_grad()
    def features(self, frames: UInt8[Tensor, "t h w c"]) -> Float[Tensor, "u d"]:
        """Return feature vectors of frames spread over the clip, in fp32 on the CPU."""
        return self._read(frames).features[0].float().cpu()

    @torch.no_grad()
    def scores(self, frames: UInt8[Tensor, "t h w c"]) -> dict[str, Float[Tensor, " k"]]:
        """Return probabilities per category; "things" are independent of each other."""
        output = self._read(frames)
        scores = {name: rows[0].softmax(-1) for name, rows in output.scores.items()}
        if output.things is not None:
            scores["things"] = output.things[0].sigmoid()
        return scores

    def _read(self, frames: UInt8[Tensor, "t h w c"]) -> ProbeOutput:
        return self(prepare(frames, self.config).to(self.embed.weight.device))

    def forward(self, video: Float[Tensor, "b 3 t h w"]) -> ProbeOutput:
        """Score each video; a single frame is compared with itself."""
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
        return ProbeOutput(scores, features, things)


def choose_frames(total: int, count: int) -> Int[Tensor, " t"]:
    """Return indices of `count` frames spread evenly, first and last included."""
    return torch.linspace(0, total - 1, min(count, total)).round().long()


def prepare(frames: UInt8[Tensor, "t h w c"], config: ProbeConfig) -> Float[Tensor, "1 3 u y x"]:
    """Select and resize frames for the probe, in [-1, 1]; keeps the aspect ratio."""
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
def predict(probe: Probe, frames: UInt8[Tensor, "t h w c"]) -> ProbePrediction:
    """Classify a video of any length and size."""
    output = probe(prepare(frames, probe.config).to(probe.embed.weight.device))
    ranked = {
        name: scores[0].argsort(descending=True).tolist() for name, scores in output.scores.items()
    }
    labels = {name: probe.config.labels(name)[order[0]] for name, order in ranked.items()}
    nouns = tuple(probe.config.nouns[index] for index in ranked["noun"])
    things: tuple[str, ...] = ()
    if output.things is not None:
        order = output.things[0].argsort(descending=True).tolist()
        things = tuple(probe.config.nouns[index] for index in order)
    features = output.features[0].float().cpu()
    return ProbePrediction(**labels, nouns=nouns, features=features, things=things)


def load_probe(folder: Path | None = None) -> Probe:
    """Load the probe of a folder, by default the bundled one. Raises CheckpointError."""
    with open_part(BUNDLED if folder is None else folder, "probe") as reader:
        config = reader.config(ProbeConfig)
        return build(lambda: Probe(config), reader, torch.device("cpu"))
