"""Larger and smoother, by arithmetic alone: no detail is invented, and no frame that was there is changed."""

import math
from collections.abc import Iterable, Iterator
from fractions import Fraction

import av
import torch
from av.error import FFmpegError
from av.filter import Graph
from jaxtyping import UInt8
from torch import Tensor

from skyloom.core.errors import RequestError

MAX_SIDE, MAX_FPS = 2**13, 240
_FORMAT = "yuv444p"
_LEAST_SIDE = 32  # the motion search looks at blocks of 16 pixels, and round them
_AHEAD = 3  # the filter looks at two frames on each side of what it makes


def upscale(
    runs: Iterable[UInt8[Tensor, "n h w c"]], size: tuple[int, int]
) -> Iterator[UInt8[Tensor, "n y x c"]]:
    """Frames at another size (height, width) by Lanczos resampling: larger and as sharp as before, not sharper.

    Raises RequestError for a size that is none.
    """
    height, width = size
    if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE):
        raise RequestError(
            f"A video cannot be {width}x{height}.", hint=f"Use sides of 1 to {MAX_SIDE} pixels."
        )
    for run in runs:
        yield torch.stack(
            [
                _tensor(
                    _picture(frame).reformat(
                        width=width, height=height, format="rgb24", interpolation="LANCZOS"
                    )
                )
                for frame in run
            ]
        )


def interpolate(
    runs: Iterable[UInt8[Tensor, "n h w c"]], fps: Fraction, target: Fraction
) -> Iterator[UInt8[Tensor, "n h w c"]]:
    """Frames at a higher rate: those at old times are the old ones, bit for bit; between them things move on.

    Between two frames motion is estimated in blocks (FFmpeg's minterpolate); across a cut, and after the last frame,
    the frame before stands. Raises RequestError for a rate that is not higher, or frames of less than 32 pixels.
    """
    if not fps < target <= MAX_FPS:
        raise RequestError(
            f"From {float(fps):g} fps, {float(target):g} fps cannot be made.",
            hint=f"Use more, and up to {MAX_FPS}.",
        )
    smooth: _Smooth | None = None
    for run in runs:
        if min(run.shape[1:3]) < _LEAST_SIDE:
            raise RequestError(
                "Motion cannot be seen in frames this small.",
                hint=f"Use {_LEAST_SIDE} pixels or more.",
            )
        smooth = smooth or _Smooth(run.shape[1], run.shape[2], fps, target)
        for frame in run:
            smooth.push(frame)
        if ready := list(smooth.ready()):
            yield torch.stack(ready)
    if smooth is not None:
        smooth.end()
        yield torch.stack(list(smooth.ready()))


class _Smooth:
    """The filter with what it was given and what it made, as long as they are needed."""

    def __init__(self, height: int, width: int, fps: Fraction, target: Fraction) -> None:
        self._step, self._fps = fps / target, fps
        self._given: dict[int, UInt8[Tensor, "h w c"]] = {}
        self._made: dict[int, UInt8[Tensor, "h w c"]] = {}
        self._count, self._next = 0, 0
        self._last: float = math.inf
        self._total: float = math.inf
        self._graph = Graph()
        source = self._graph.add_buffer(
            width=width, height=height, format=av.VideoFormat(_FORMAT), time_base=1 / fps
        )
        motion = self._graph.add("minterpolate", f"fps={target}:mi_mode=mci:me_mode=bidir")
        self._graph.link_nodes(source, motion, self._graph.add("buffersink")).configure()

    def push(self, frame: UInt8[Tensor, "h w c"]) -> None:
        """Take the next frame."""
        self._given[self._count] = frame
        self._feed(frame)

    def end(self) -> None:
        """Take no more: the last frame stands, which the filter must see to make what is before it."""
        last = self._given[self._count - 1]
        self._last, self._total = self._count - 1, math.ceil(self._count / self._step)
        for _ in range(_AHEAD):
            self._feed(last)

    def _feed(self, frame: UInt8[Tensor, "h w c"]) -> None:
        picture = _picture(frame).reformat(format=_FORMAT)
        picture.pts, picture.time_base = self._count, 1 / self._fps
        self._count += 1
        self._graph.push(picture)
        while True:
            try:
                made = self._graph.pull()
            except (BlockingIOError, EOFError, FFmpegError):
                return
            assert isinstance(made, av.VideoFrame)
            if made.pts is not None:
                self._made[made.pts] = _tensor(made.reformat(format="rgb24"))

    def ready(self) -> Iterator[UInt8[Tensor, "h w c"]]:
        """The frames that can be told by now."""
        while self._next < self._total:
            place = self._next * self._step
            before = math.floor(place)
            stands = before in {place, self._last}
            if before not in self._given or not (stands or self._next in self._made):
                return
            yield self._given[before] if stands else self._made[self._next]
            self._next += 1
            self._given = {
                number: frame for number, frame in self._given.items() if number >= before
            }
            self._made = {
                number: frame for number, frame in self._made.items() if number >= self._next
            }


def _picture(frame: UInt8[Tensor, "h w c"]) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(frame.cpu().contiguous().numpy(), format="rgb24")


def _tensor(picture: av.VideoFrame) -> UInt8[Tensor, "h w c"]:
    return torch.from_numpy(picture.to_ndarray(format="rgb24").copy())
