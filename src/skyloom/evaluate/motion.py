"""How a video moves, against real renders of the same scenes: speed, flicker, drift.

Speed is the normal flow: how fast edges move across themselves, in pixels a frame (Horn and Schunck 1981, equation
of brightness constancy). Flicker is what changes there and back from frame to frame, in tiles large enough that
things moving on do not count much. Drift is how far the look of the last quarter is from that of the first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from skyloom.core.types import VideoShape
from skyloom.evaluate.metrics import share_of
from skyloom.evaluate.prompts import Prompt
from skyloom.evaluate.report import Report, Strip
from skyloom.evaluate.suite import Generator
from skyloom.world.assets import Atlas
from skyloom.world.render import render

TILE = 16
_EDGE = 0.05  # a slope of grey values per pixel that counts as an edge
_LUMA = (0.299, 0.587, 0.114)
_SHOWN = 8


@dataclass(frozen=True)
class Movement:
    """Of one video, grey values in [0, 1]: pixels a frame; mean change there and back; three drifts.

    Colour drifts in grey values (mean over channels), contrast and sharpness as ratios of last to first, minus 1,
    without sign.
    """

    speed: float
    flicker: float
    colour_drift: float
    contrast_drift: float
    sharpness_drift: float


NAMES = ("speed", "flicker", "colour_drift", "contrast_drift", "sharpness_drift")


@dataclass(frozen=True)
class Look:
    """How a run of frames looks and moves, grey values in [0, 1]: mean colour, spread of grey values, mean slope;
    pixels a frame; mean change there and back."""

    colour: tuple[float, float, float]
    contrast: float
    sharpness: float
    speed: float
    flicker: float


def look_of(frames: UInt8[Tensor, "t h w c"]) -> Look:
    """Measure a run of three frames or more."""
    colour = frames.float() / 255
    grey = colour @ torch.tensor(_LUMA)
    red, green, blue = colour.mean((0, 1, 2)).tolist()
    return Look((red, green, blue), _contrast(grey), _sharpness(grey), _speed(grey), _flicker(grey))


def colour_change(first: Look, last: Look) -> float:
    """How far the mean colour went, in grey values: mean over channels."""
    return sum(abs(a - b) for a, b in zip(first.colour, last.colour, strict=True)) / len(
        first.colour
    )


def seam_ratio(frames: UInt8[Tensor, "t h w c"], joins: Sequence[int]) -> float:
    """Change from frame to frame where windows meet (`joins`: first frames of windows) over that everywhere else."""
    change = (frames[1:].float() - frames[:-1].float()).abs().mean(dim=(1, 2, 3))
    at = torch.zeros(len(change), dtype=torch.bool)
    at[[join - 1 for join in joins if 0 < join < len(frames)]] = True
    return float(change[at].mean() / change[~at].mean().clamp(min=1e-6)) if bool(at.any()) else 1.0


def movement(frames: UInt8[Tensor, "t h w c"]) -> Movement:
    """Measure one video of three frames or more."""
    colour = frames.float() / 255
    grey = colour @ torch.tensor(_LUMA)
    quarter = max(1, len(frames) // 4)
    first, last = colour[:quarter], colour[-quarter:]
    return Movement(
        speed=_speed(grey),
        flicker=_flicker(grey),
        colour_drift=float((last.mean((0, 1, 2)) - first.mean((0, 1, 2))).abs().mean()),
        contrast_drift=_change(_contrast(grey[:quarter]), _contrast(grey[-quarter:])),
        sharpness_drift=_change(_sharpness(grey[:quarter]), _sharpness(grey[-quarter:])),
    )


def _speed(grey: Float[Tensor, "t h w"]) -> float:
    """Mean over edges of |change in time| / |slope|."""
    middle = (grey[1:] + grey[:-1]) / 2
    across = (middle[:, 1:-1, 2:] - middle[:, 1:-1, :-2]) / 2
    down = (middle[:, 2:, 1:-1] - middle[:, :-2, 1:-1]) / 2
    slope = (across.square() + down.square()).sqrt()
    change = (grey[1:] - grey[:-1])[:, 1:-1, 1:-1].abs()
    edges = slope > _EDGE
    return (
        float((change[edges] / slope[edges]).clamp(max=TILE).mean()) if bool(edges.any()) else 0.0
    )


def _flicker(grey: Float[Tensor, "t h w"]) -> float:
    """Mean absolute second difference in time of the tiles' means."""
    tiles = F.avg_pool2d(grey[:, None], min(TILE, *grey.shape[1:]))[:, 0]
    return float((tiles[2:] - 2 * tiles[1:-1] + tiles[:-2]).abs().mean())


def _contrast(grey: Float[Tensor, "t h w"]) -> float:
    return float(grey.std(dim=(1, 2)).mean())


def _sharpness(grey: Float[Tensor, "t h w"]) -> float:
    return float(grey.diff(dim=1).abs().mean() + grey.diff(dim=2).abs().mean())


def _change(before: float, after: float) -> float:
    return abs(after / max(before, 1e-6) - 1)


def compare_motion(
    pipeline: Generator,
    prompts: Sequence[Prompt],
    atlas: Atlas,
    frames: int,
    on_video: Callable[[int], None] | None = None,
) -> Report:
    """Make every prompt (seed 0), render its own scene at the same length, and measure both."""
    made, real, strips = [], [], []
    for number, prompt in enumerate(prompts):
        video = pipeline.generate(prompt.text, seed=0).frames
        shape = VideoShape(frames, prompt.scene.shape.height, prompt.scene.shape.width)
        truth = render(replace(prompt.scene, shape=shape), atlas).frames
        made.append(movement(video))
        real.append(movement(truth))
        shown = torch.linspace(0, len(video) - 1, _SHOWN).long()
        strips += [Strip(video[shown], (prompt.text,)), Strip(truth[shown], ("the world's own",))]
        if on_video:
            on_video(number)
    numbers = {}
    for name in NAMES:
        values = [[getattr(one, name) for one in each] for each in (made, real)]
        shares = [share_of([[value] for value in each]) for each in values]
        for source, share in zip(("made", "real"), shares, strict=True):
            numbers |= {
                f"{name}, {source}": share.value,
                f"{name}, {source}, standard error": share.error,
            }
        numbers[f"{name}, ratio"] = shares[0].value / max(shares[1].value, 1e-9)
    return Report(
        "Motion", {"prompts": len(prompts), "frames": frames}, numbers=numbers, strips=tuple(strips)
    )
