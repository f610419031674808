"""The critic of long videos: does a window still look and move as the first one did, and does it join on?

Its bounds are what the windows of ten videos of the bundled model, and of real renders of the same scenes, hardly ever
go beyond; `skyloom evaluate windows` measures them (docs/log.md). Whoever knows better gives others.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from itertools import pairwise

import torch
from jaxtyping import UInt8
from torch import Tensor

from skyloom.core.errors import RequestError
from skyloom.core.types import VideoShape
from skyloom.evaluate.motion import Look, colour_change, look_of, seam_ratio
from skyloom.evaluate.probe import Probe, load_probe, read
from skyloom.evaluate.prompts import Prompt
from skyloom.evaluate.report import Report
from skyloom.evaluate.suite import Generator
from skyloom.generate.rollout import WindowScore
from skyloom.world.assets import Atlas
from skyloom.world.render import render

Frames = UInt8[Tensor, "t h w c"]
_LOOK = 3  # frames that looks and movements can be told from
_DIGITS = 4
_QUANTILES = (0.01, 0.05, 0.5, 0.95, 0.99)
# what counts as none: pixels a frame, change there and back, spread and slope of grey values
_STILL, _STEADY, _FLAT = 0.05, 0.005, 0.01


@dataclass(frozen=True)
class Bounds:
    """How far a window may be from the first: its mean colour by so many grey values (of 1); contrast and sharpness by
    such a factor up or down; flicker by such a factor up; motion not below such a share. At the join frames may change
    so many times as much as elsewhere. The subject's features may turn away from the first by such a cosine distance.
    """

    colour: float = 0.04
    contrast: float = 1.27
    sharpness: float = 1.16
    flicker: float = 1.17
    motion: float = 0.39
    seam: float = 2.5
    identity: float = 0.17


_NAMES = tuple(one.name for one in fields(Bounds))
_LEAST = {"contrast": 1.0, "sharpness": 1.0}


@dataclass(frozen=True)
class WindowCritic:
    """Judges windows by their looks and by a probe's features. Measures are rounded, so that the last bits of a sum do
    not decide."""

    probe: Probe
    limits: Bounds = field(default_factory=Bounds)

    @property
    def bounds(self) -> Mapping[str, float]:
        """What is allowed, by measure."""
        return asdict(self.limits)

    def __call__(self, frames: Frames, first: Frames | None, before: Frames) -> WindowScore:
        """Hold frames against the first ones and against those right before them; what cannot be told is not judged."""
        measures = measure_window(frames, first, before, self.probe)
        towards = {
            name: _towards(name, value, bound)
            for name, bound in self.bounds.items()
            if (value := measures.get(name)) is not None
        }
        return WindowScore(round(max(towards.values(), default=0.0), _DIGITS), measures)


def load_critic(bounds: Mapping[str, float] | None = None) -> WindowCritic:
    """The critic with the bundled probe, and with other bounds, if given: a receipt's.

    Raises CheckpointError when the probe is missing or broken, RequestError for bounds that are none.
    """
    given = dict(bounds or {})
    wrong = [
        name
        for name, value in given.items()
        if name not in _NAMES or not _above(value, _LEAST.get(name, 0.0))
    ]
    if wrong:
        hint = f"Give numbers above 0 (of factors, above 1) for any of: {', '.join(_NAMES)}."
        raise RequestError(f"A critic has no such bounds: {', '.join(wrong)}.", hint=hint)
    return WindowCritic(load_probe(), Bounds(**given))


def measure_window(
    frames: Frames, first: Frames | None, before: Frames, probe: Probe
) -> dict[str, float]:
    """Every measure of `Bounds` that there are frames for: differences from `first`, and the join with `before`."""
    told: dict[str, float] = {}
    if first is not None and min(len(first), len(frames)) >= _LOOK:
        (there, its_features), (here, features) = _first_sight(first, probe), _sight(frames, probe)
        told["colour"] = colour_change(there, here)
        told["contrast"] = max(here.contrast, _FLAT) / max(there.contrast, _FLAT)
        told["sharpness"] = max(here.sharpness, _FLAT) / max(there.sharpness, _FLAT)
        told["flicker"] = max(here.flicker, _STEADY) / max(there.flicker, _STEADY)
        told["motion"] = max(here.speed, _STILL) / max(there.speed, _STILL)
        told["identity"] = 1 - float(torch.cosine_similarity(its_features, features, dim=0))
    if len(before) and len(frames) + len(before) >= _LOOK:
        told["seam"] = (
            seam_ratio(torch.cat([before, frames]), [len(before)]) if len(frames) else 1.0
        )
    return {name: round(value, _DIGITS) for name, value in told.items()}


def _sight(frames: Tensor, probe: Probe) -> tuple[Look, Tensor]:
    return look_of(frames), read(probe, frames).features.mean(0)


_first_sight = lru_cache(maxsize=1)(_sight)  # every window is held against the same frames


def compare_windows(
    pipeline: Generator,
    prompts: Sequence[Prompt],
    critic: WindowCritic,
    atlas: Atlas,
    edges: Sequence[int],
    on_video: Callable[[int], None] | None = None,
) -> Report:
    """Make every prompt (its number is the seed), render its scene at the same length, and measure the windows of both
    that begin at the frames `edges`: quantiles of every measure, and the share of windows beyond a bound."""
    found: dict[str, list[WindowScore]] = {"made": [], "real": []}
    for number, prompt in enumerate(prompts):
        video = pipeline.generate(prompt.text, seed=number).frames
        shape = VideoShape(len(video), prompt.scene.shape.height, prompt.scene.shape.width)
        for name, frames in (
            ("made", video),
            ("real", render(replace(prompt.scene, shape=shape), atlas).frames),
        ):
            windows = [frames[start:end] for start, end in pairwise([0, *edges, len(frames)])]
            found[name] += [critic(here, windows[0], last) for last, here in pairwise(windows)]
        if on_video:
            on_video(number)
    numbers: dict[str, float] = {}
    for name, verdicts in found.items():
        numbers[f"{name}, share beyond a bound"] = sum(one.score > 1 for one in verdicts) / len(
            verdicts
        )
        for measure in critic.bounds:
            values = torch.tensor(
                [one.measures[measure] for one in verdicts if measure in one.measures]
            )
            numbers |= {
                f"{measure}, {name}, {share:.0%}": float(values.quantile(share))
                for share in _QUANTILES
            }
    about = {"prompts": len(prompts), "windows": len(found["made"]), "bounds": dict(critic.bounds)}
    return Report("Windows against the first of their video", about, numbers=numbers)


def _above(value: object, least: float) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and value > least
    )


def _towards(name: str, value: float, bound: float) -> float:
    """How far a measure is towards its bound; 1 is at it."""
    if name in ("contrast", "sharpness"):
        return abs(math.log(value)) / math.log(bound)
    if name == "motion":
        return bound / value
    return value / bound
