"""Record of a model family: sizes, rate, windows, defaults, prompts, licence. Needs no torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

from skyloom.core.errors import ConfigError, RequestError

Prediction = Literal["velocity", "denoised", "angular"]
Size = tuple[int, int]


@dataclass(frozen=True)
class Schedule:
    """Solver and noise levels of a sampler. sigma 1 is noise, 0 is data.

    solver: "euler"; "unipc" (second-order multistep); "renoise" (few-step students: the clean
        estimate with fresh noise of the next level).
    levels: how n levels are spaced before the shift: "linear" from 1 to 0; "wan", from 0.999 as in
        the original code of Wan; "diffusers", from 1 to 0.001 as in its UniPC scheduler; "listed",
        the `timesteps`.
    shift: factor on the ratio of noise to signal. area_shifts: (pixels of a frame, shift) pairs in
        rising order; the last pair whose pixels a frame reaches replaces `shift`.
    timesteps: falling training timesteps (1 to 1000) that the model is told at "listed" levels.
    """

    solver: Literal["euler", "unipc", "renoise"] = "euler"
    levels: Literal["linear", "wan", "diffusers", "listed"] = "linear"
    shift: float = 1.0
    area_shifts: tuple[tuple[int, float], ...] = ()
    timesteps: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        shifts = (self.shift, *(shift for _, shift in self.area_shifts))
        if not min(shifts) > 0:
            raise ConfigError(f"shift must be > 0, got {min(shifts)}.")
        if self.solver == "unipc" and self.levels not in ("wan", "diffusers"):
            raise ConfigError(
                f"levels must be wan or diffusers for the solver unipc, got {self.levels}.",
                hint="UniPC needs a first level below 1.",
            )
        falling = all(high > low for high, low in pairwise((*self.timesteps, 0)))
        if (self.levels == "listed") != bool(self.timesteps) or not falling:
            raise ConfigError(
                "timesteps must be falling numbers above 0 for listed levels, and left out for "
                f"others, got {self.timesteps} for {self.levels}."
            )

    def at_size(self, width: int, height: int) -> "Schedule":
        """Return the schedule with the shift of a frame size in pixels."""
        reached = [shift for area, shift in self.area_shifts if width * height >= area]
        shift = reached[-1] if reached else self.shift
        return replace(self, shift=shift, area_shifts=())

    @property
    def comparable(self) -> tuple[str, ...]:
        """Spacings of the levels that a request may choose for comparison; the own one first."""
        others = ("wan", "diffusers") if self.levels in ("wan", "diffusers") else ()
        return tuple(dict.fromkeys((self.levels, *others)))


@dataclass(frozen=True)
class Quality:
    """Sampling settings. A distilled `student` needs no guidance and few steps.

    schedule: None is that of the model.
    """

    num_steps: int
    guidance_scale: float
    student: bool = False
    schedule: Schedule | None = None


@dataclass(frozen=True)
class Rollout:
    """Autoregressive continuation after the native window, in latent frames.

    Each step generates `window` frames and attends to the `sink` first and `recent` last frames,
    which carry noise up to `context_sigma`.
    """

    sink: int
    recent: int
    window: int
    context_sigma: float = 0.0


@dataclass(frozen=True)
class SizeRule:
    """Frame sizes (width, height) in pixels that a model generates.

    Sides are multiples of `multiple` from `min_side` to `max_side`, areas at most `max_area`. With
    `listed`, only those sizes.
    """

    multiple: int
    min_side: int
    max_side: int
    max_area: int
    default: Size
    listed: tuple[Size, ...] = ()

    @classmethod
    def of_sizes(cls, sizes: tuple[str, ...]) -> "SizeRule":
        """Make the rule of a list of "WIDTHxHEIGHT"; the first one is the default."""
        listed = tuple(_parse(size) for size in sizes)
        sides = [side for size in listed for side in size]
        return cls(
            multiple=math.gcd(*sides),
            min_side=min(sides),
            max_side=max(sides),
            max_area=max(width * height for width, height in listed),
            default=listed[0],
            listed=listed,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Listed sizes as "WIDTHxHEIGHT", the default first; without a list, the default alone."""
        named = (f"{width}x{height}" for width, height in (self.default, *self.listed))
        return tuple(dict.fromkeys(named))

    def allows(self, width: int, height: int) -> bool:
        """Whether the model generates this size."""
        if self.listed:
            return (width, height) in self.listed
        sides = (width, height)
        return (
            all(side % self.multiple == 0 for side in sides)
            and self.min_side <= min(sides)
            and max(sides) <= self.max_side
            and width * height <= self.max_area
        )

    def check(self, width: int, height: int) -> None:
        """Raise RequestError, naming the nearest size, unless the model generates this one."""
        if self.allows(width, height):
            return
        near_width, near_height = self.nearest(width, height)
        raise RequestError(
            f"size must be {self.describe()}, got {width}x{height}.",
            hint=f"The nearest size is {near_width}x{near_height}.",
            field="size",
        )

    def nearest(self, width: int, height: int) -> Size:
        """Return the nearest size: in aspect ratio, if possible, then in pixels."""
        width = max(width, 1)
        height = max(height, 1)
        if self.listed:
            return min(self.listed, key=lambda one: _distance(one, (width, height)))
        scale = max(1.0, self.min_side / min(width, height))
        scale = min(scale, self.max_side / max(width, height))
        scale = min(scale, math.sqrt(self.max_area / (width * height)))
        sides = [self._side(side * scale) for side in (width, height)]
        while sides[0] * sides[1] > self.max_area:
            longer = sides.index(max(sides))
            sides[longer] -= self.multiple
        return sides[0], sides[1]

    def _side(self, length: float) -> int:
        """Round a length to a valid side."""
        rounded = round(length / self.multiple) * self.multiple
        largest = self.max_side // self.multiple * self.multiple
        return min(max(rounded, self._up(self.min_side)), largest)

    def _up(self, length: int) -> int:
        return -(-length // self.multiple) * self.multiple

    def describe(self) -> str:
        """Describe the sizes, as in "size must be ..."."""
        if self.listed:
            return f"one of {', '.join(self.names)}"
        return (
            f"a multiple of {self.multiple} from {self.min_side} to {self.max_side} pixels per "
            f"side and at most {self.max_area:,} pixels in all"
        )


@dataclass(frozen=True)
class ModelFamily:
    """Properties that all models of a family share; a model's manifest overrides them.

    frames: native window, 1 + k times the frames of a latent frame; for edits k >= 2.
    edit_verbs: generating verbs that it can do.
    few_step: settings of a distilled student, for models that have one.
    rollout: settings of the key-value cache for longer videos; None for a family that was not
        trained to continue from one. Its longer videos are made in windows that see known frames.
    frame_levels: whether it was trained with a noise level per latent frame, so that known frames
        enter clean. Without it they are noised like the others (RePaint).
    negative_prompt: used with guidance by requests that give none.
    trial_decode: decode one latent frame before sampling, so that a decoder that does not fit in
        memory or is damaged fails at once and not after the last step.
    knows: words that a prompt may use, by kind: things, places, times, colours, motions; empty for
    an open vocabulary.
    """

    name: str
    licence: str
    sizes: SizeRule
    fps: int
    frames: int
    num_steps: int
    guidance_scale: float
    schedule: Schedule
    edit_verbs: tuple[str, ...]
    few_step: Quality | None = None
    rollout: Rollout | None = None
    frame_levels: bool = True
    negative_prompt: str = ""
    trial_decode: bool = False
    knows: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])


def _distance(size: Size, asked: Size) -> tuple[float, int]:
    """Differences of two sizes in aspect ratio and in pixels."""
    ratios = [width / height for width, height in (size, asked)]
    return round(abs(ratios[0] - ratios[1]), 3), abs(math.prod(size) - math.prod(asked))


def _parse(size: str) -> Size:
    width, height = size.lower().split("x")
    return int(width), int(height)
