"""Edit masks: boxes that may move, or a picture or video in which white is edited and black kept.

A region is `x,y,w,h` in pixels or percent (`25%,0,50%,100%`). `x,y,w,h@1.5-3` applies from 1.5 s to
3 s. Boxes with one time each (`0,0,64,64@0; 90,0,64,64@2`) are key frames of one moving box.
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

_HINT = (
    "Write x,y,w,h in pixels or percent, x,y,w,h@1.5-3 for a time range, "
    "or x,y,w,h@0; x,y,w,h@2 for a moving box."
)
_MASK_HINT = "Paint white what may change."
_BOX = re.compile(r"([^@]+?)(?:@\s*([\d.]+)\s*(?:-\s*([\d.]+)\s*)?)?")
_BOX_VALUES = 4
_WHITE = 128
MAX_FEATHER = 256


@dataclass(frozen=True)
class Box:
    """A box: left, top, width, height in pixels or, where `percent`, in percent of the frame.

    It applies from `start` to `stop` in seconds; a key frame of a moving box has no `stop`.
    """

    sides: tuple[float, float, float, float]
    percent: tuple[bool, bool, bool, bool]
    start: Fraction | None = None
    stop: Fraction | None = None

    def pixels(self, shape: VideoShape) -> np.ndarray:
        """Return left, top, right, bottom in pixels."""
        frame = (shape.width, shape.height, shape.width, shape.height)
        left, top, width, height = (
            side * full / 100 if percent else side
            for side, full, percent in zip(self.sides, frame, self.percent, strict=True)
        )
        return np.array([left, top, left + width, top + height])


@dataclass(frozen=True)
class Region:
    """Boxes with time ranges, or the key frames of one moving box."""

    boxes: tuple[Box, ...]

    @property
    def moves(self) -> bool:
        """Whether the boxes are key frames of one moving box."""
        return len(self.boxes) > 1 and all(
            box.start is not None and box.stop is None for box in self.boxes
        )

    def at(self, time: Fraction, shape: VideoShape) -> list[np.ndarray]:
        """Return the boxes at a time in seconds: left, top, right, bottom in pixels."""
        if not self.moves:
            return [box.pixels(shape) for box in self.boxes if _applies(box, time)]
        times = [float(box.start or 0) for box in self.boxes]
        corners = np.stack([box.pixels(shape) for box in self.boxes])
        return [np.array([np.interp(float(time), times, corner) for corner in corners.T])]


def _applies(box: Box, time: Fraction) -> bool:
    return box.stop is None or (box.start or 0) <= time < box.stop


def parse_region(text: str) -> Region:
    """Parse a region. Raises RequestError naming the invalid box."""
    boxes = tuple(_parse_box(part.strip()) for part in text.split(";") if part.strip())
    if not boxes:
        raise RequestError("region must not be empty.", hint=_HINT)
    if len(boxes) > 1 and len({(box.start is None, box.stop is None) for box in boxes}) > 1:
        raise RequestError(
            f"region must not mix time ranges and key frames, got {text!r}.", hint=_HINT
        )
    region = Region(boxes)
    starts = [box.start or 0 for box in boxes]
    if region.moves and any(after <= before for before, after in pairwise(starts)):
        raise RequestError(f"The times of a region must rise, got {text!r}.", hint=_HINT)
    return region


def _parse_box(text: str) -> Box:
    invalid = RequestError(f"region must be x,y,w,h, got {text!r}.", hint=_HINT)
    match = _BOX.fullmatch(text)
    sides = [side.strip() for side in match[1].split(",")] if match else []
    if match is None or len(sides) != _BOX_VALUES:
        raise invalid
    try:
        numbers = [float(side.removesuffix("%")) for side in sides]
        start, stop = (None if time is None else Fraction(time) for time in (match[2], match[3]))
    except ValueError as error:
        raise invalid from error
    if not all(np.isfinite(numbers)):
        raise invalid
    if numbers[2] <= 0 or numbers[3] <= 0:
        raise RequestError(f"The width and height of a region must be above 0, got {text!r}.")
    if start is not None and stop is not None and stop <= start:
        raise RequestError(f"A region must end after it starts, got {text!r}.", hint=_HINT)
    left, top, width, height = numbers
    percent = tuple(side.endswith("%") for side in sides)
    return Box(
        (left, top, width, height), (percent[0], percent[1], percent[2], percent[3]), start, stop
    )


def open_mask(region: Region | Path, shape: VideoShape, fps: Fraction) -> "Mask":
    """Open a region, a picture (for all frames) or a video of the same length as a mask.

    Raises RequestError for a region outside the video, MediaError for a file of another size or
    length, or a black picture.
    """
    if isinstance(region, Region):
        return _open_region(region, shape, fps)
    if is_picture(region):
        still = _is_white(read_image(region))
        _check_size(region, still.shape[1], still.shape[2], shape)
        if not still.any():
            raise MediaError(f"The mask {region} is empty.", hint=_MASK_HINT)
        return Mask(lambda start, stop: repeat(still[0], "h w -> t h w", t=stop - start))
    source = open_source(region)
    _check_size(region, source.height, source.width, shape)
    if source.frames != shape.frames:
        raise MediaError(
            f"The mask {region} must have {shape.frames} frames like the video, "
            f"got {source.frames}.",
            hint="Change its length, or use a picture.",
        )
    return Mask(lambda start, stop: _is_white(source.read(start, stop)))


@dataclass(frozen=True)
class Mask:
    """A mask of a video; `read(start, stop)` returns frames [start, stop), True is edited."""

    read: Callable[[int, int], Bool[Tensor, "t h w"]]


def _open_region(region: Region, shape: VideoShape, fps: Fraction) -> Mask:
    if not any(_draw(region, shape, fps, number).any() for number in range(shape.frames)):
        raise RequestError(
            f"region must overlap the video ({shape.size}, {float(shape.frames / fps):.2f} s)."
        )

    def read(start: int, stop: int) -> Bool[Tensor, "t h w"]:
        return torch.stack([_draw(region, shape, fps, number) for number in range(start, stop)])

    return Mask(read)


def feather(mask: Bool[Tensor, "t h w"], pixels: int) -> Float[Tensor, "t h w"]:
    """Return weights that rise from 0 outside the mask to 1 over `pixels` inwards.

    The border of the frame is not feathered. Raises RequestError for more than 256 pixels.
    """
    if not 0 <= pixels <= MAX_FEATHER:
        raise RequestError(f"feather must be 0 to {MAX_FEATHER} pixels, got {pixels}.")
    inside = rearrange(mask, "t h w -> t 1 h w").float()
    weight = inside.clone()
    for _ in range(pixels):
        inside = 1 - F.max_pool2d(1 - inside, 3, stride=1, padding=1)
        weight += inside
    return rearrange(weight / (pixels + 1), "t 1 h w -> t h w")


def _draw(region: Region, shape: VideoShape, fps: Fraction, number: int) -> Bool[Tensor, "h w"]:
    """Draw one frame of a region: the pixels whose centre is in one of its boxes."""
    mask = torch.zeros(shape.height, shape.width, dtype=torch.bool)
    for left, top, right, bottom in region.at(number / fps, shape):
        mask[_pixel(top) : _pixel(bottom), _pixel(left) : _pixel(right)] = True
    return mask


def _pixel(edge: float) -> int:
    """Return the first pixel whose centre is not before an edge."""
    return max(0, math.ceil(edge - 0.5))


def _is_white(frames: UInt8[Tensor, "t h w c"]) -> Bool[Tensor, "t h w"]:
    return frames.float().mean(-1) >= _WHITE


def _check_size(path: Path, height: int, width: int, shape: VideoShape) -> None:
    if (height, width) != (shape.height, shape.width):
        raise MediaError(
            f"The mask {path} must be {shape.size} like the video, got {width}x{height}."
        )
