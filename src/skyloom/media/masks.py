"""Which part of a video an edit may change: boxes that may move, or a mask drawn as a picture or a video.

White is changed, black is kept. A region is written `x,y,w,h`, in pixels or percent (`25%,0,50%,100%`); with `@1.5-3`
it holds between two times in seconds; boxes with a time each (`0,0,64,64@0; 90,0,64,64@2`) are one box on its way.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from skyloom.core.errors import MediaError, RequestError
from skyloom.core.types import VideoShape
from skyloom.media.read import read_image
from skyloom.media.sandbox import is_picture
from skyloom.media.source import open_source

_HINT = "Write x,y,w,h in pixels or percent, x,y,w,h@1.5-3 for a while, or boxes with times: x,y,w,h@0; x,y,w,h@2."
_BOX = re.compile(r"([^@]+?)(?:@\s*([\d.]+)\s*(?:-\s*([\d.]+)\s*)?)?")
_SIDES = 4
_WHITE = 128
MAX_FEATHER = 256


@dataclass(frozen=True)
class Box:
    """A box: left, top, width, height, each a number of pixels or, where `percent` says so, hundredths of the frame.

    It holds from `start` to `stop`, in seconds; a moving box stands there at `start` and has no `stop`.
    """

    sides: tuple[float, float, float, float]
    percent: tuple[bool, bool, bool, bool]
    start: Fraction | None = None
    stop: Fraction | None = None

    def pixels(self, shape: VideoShape) -> np.ndarray:
        """Left, top, right, bottom in pixels of a frame."""
        whole = (shape.width, shape.height, shape.width, shape.height)
        left, top, width, height = (
            side * most / 100 if percent else side
            for side, most, percent in zip(self.sides, whole, self.percent, strict=True)
        )
        return np.array([left, top, left + width, top + height])


@dataclass(frozen=True)
class Region:
    """Boxes that hold for a while each, or one box on its way from key to key."""

    boxes: tuple[Box, ...]

    @property
    def moves(self) -> bool:
        """Whether the boxes are one that moves."""
        return len(self.boxes) > 1 and all(
            box.start is not None and box.stop is None for box in self.boxes
        )

    def at(self, time: Fraction, shape: VideoShape) -> list[np.ndarray]:
        """The boxes that hold at a time in seconds: left, top, right, bottom in pixels."""
        if not self.moves:
            return [box.pixels(shape) for box in self.boxes if _holds(box, time)]
        times = [float(box.start or 0) for box in self.boxes]
        corners = np.stack([box.pixels(shape) for box in self.boxes])
        return [np.array([np.interp(float(time), times, corner) for corner in corners.T])]


def _holds(box: Box, time: Fraction) -> bool:
    return box.stop is None or (box.start or 0) <= time < box.stop


def parse_region(text: str) -> Region:
    """A region as users write it. Raises RequestError, naming the box that is wrong."""
    boxes = tuple(_parse_box(part.strip()) for part in text.split(";") if part.strip())
    if not boxes:
        raise RequestError("The region is empty.", hint=_HINT)
    if len(boxes) > 1 and len({(box.start is None, box.stop is None) for box in boxes}) > 1:
        raise RequestError(
            f"The region {text!r} mixes boxes that move and boxes that do not.", hint=_HINT
        )
    region = Region(boxes)
    starts = [box.start or 0 for box in boxes]
    if region.moves and any(after <= before for before, after in pairwise(starts)):
        raise RequestError(
            f"The times in the region {text!r} do not go from early to late.", hint=_HINT
        )
    return region


def _parse_box(text: str) -> Box:
    wrong = RequestError(f"{text!r} is no region.", hint=_HINT)
    found = _BOX.fullmatch(text)
    sides = [side.strip() for side in found[1].split(",")] if found else []
    if found is None or len(sides) != _SIDES:
        raise wrong
    try:
        numbers = [float(side.removesuffix("%")) for side in sides]
        start, stop = (None if time is None else Fraction(time) for time in (found[2], found[3]))
    except ValueError as error:
        raise wrong from error
    if not all(np.isfinite(numbers)):
        raise wrong
    if numbers[2] <= 0 or numbers[3] <= 0:
        raise RequestError(
            f"The region {text!r} has no area.", hint="Give it a width and a height above 0."
        )
    if start is not None and stop is not None and stop <= start:
        raise RequestError(f"The region {text!r} ends before it begins.", hint=_HINT)
    left, top, width, height = numbers
    percent = tuple(side.endswith("%") for side in sides)
    return Box(
        (left, top, width, height), (percent[0], percent[1], percent[2], percent[3]), start, stop
    )


def mask_frames(region: Region | Path, shape: VideoShape, fps: Fraction) -> Bool[Tensor, "t h w"]:
    """Where each frame of a video may change. Raises what `open_mask` raises, and MediaError for a mask all black."""
    mask = open_mask(region, shape, fps).read(0, shape.frames)
    if not mask.any():
        raise MediaError(f"The mask {region} is empty.", hint="Paint white what may change.")
    return mask


def open_mask(region: Region | Path, shape: VideoShape, fps: Fraction) -> "Mask":
    """A mask to read in runs: a region, or a file (a picture for all frames, or a video as long as the other).

    Raises RequestError for a region outside the video, MediaError for a file of another size or length, or a black
    picture.
    """
    if isinstance(region, Region):
        if not any(_draw(region, shape, fps, number).any() for number in range(shape.frames)):
            seconds = float(shape.frames / fps)
            raise RequestError(
                f"The region lies outside of the video of {shape.size}, {seconds:.2f} s.",
                hint="Give it a place inside.",
            )
        return Mask(
            lambda start, stop: torch.stack(
                [_draw(region, shape, fps, n) for n in range(start, stop)]
            )
        )
    if is_picture(region):
        still = _is_white(read_image(region))
        _check_size(region, still, shape)
        if not still.any():
            raise MediaError(f"The mask {region} is empty.", hint="Paint white what may change.")
        return Mask(lambda start, stop: repeat(still[0], "h w -> t h w", t=stop - start))
    source = open_source(region)
    _check_size(region, torch.empty(0, source.height, source.width), shape)
    if source.frames != shape.frames:
        raise MediaError(
            f"The mask {region} has {source.frames} frames, the video {shape.frames}.",
            hint="Make it as long as the video, or use a picture.",
        )
    return Mask(lambda start, stop: _is_white(source.read(start, stop)))


@dataclass(frozen=True)
class Mask:
    """What may change of a video, in runs of frames."""

    read: Callable[[int, int], Bool[Tensor, "t h w"]]


def feather(mask: Bool[Tensor, "t h w"], pixels: int) -> Float[Tensor, "t h w"]:
    """Weights that rise from the mask's edge inwards over so many pixels; exactly 0 outside, and 1 deep inside.

    An edge that is the frame's is none. Raises RequestError for more than 256 pixels.
    """
    if not 0 <= pixels <= MAX_FEATHER:
        raise RequestError(
            f"A feather of {pixels} pixels is not possible.", hint=f"Use 0 to {MAX_FEATHER}."
        )
    kept = rearrange(mask, "t h w -> t 1 h w").float()
    weight = kept.clone()
    for _ in range(pixels):
        kept = 1 - F.max_pool2d(1 - kept, 3, stride=1, padding=1)
        weight += kept
    return rearrange(weight / (pixels + 1), "t 1 h w -> t h w")


def _draw(region: Region, shape: VideoShape, fps: Fraction, number: int) -> Bool[Tensor, "h w"]:
    """A frame of a region: the pixels whose middle is in one of its boxes."""
    mask = torch.zeros(shape.height, shape.width, dtype=torch.bool)
    for left, top, right, bottom in region.at(number / fps, shape):
        rows, columns = (
            slice(_pixel(begin), _pixel(end)) for begin, end in ((top, bottom), (left, right))
        )
        mask[rows, columns] = True
    return mask


def _pixel(edge: float) -> int:
    """The first pixel whose middle is not before an edge."""
    return max(0, math.ceil(edge - 0.5))


def _is_white(frames: UInt8[Tensor, "t h w c"]) -> Bool[Tensor, "t h w"]:
    return frames.float().mean(-1) >= _WHITE


def _check_size(path: Path, mask: Tensor, shape: VideoShape) -> None:
    if tuple(mask.shape[1:]) != (shape.height, shape.width):
        said = f"The mask {path} is {mask.shape[2]}x{mask.shape[1]}, the video {shape.size}."
        raise MediaError(said, hint="Bring it to that size.")
