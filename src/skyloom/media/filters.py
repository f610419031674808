"""Classical upscaling (Lanczos) and frame interpolation (FFmpeg minterpolate)."""

import math
from collections.abc import Iterable, Iterator
from fractions import Fraction

import av
import torch
from av.error import FFmpegError
from av.filter import Graph
from jaxtyping import Float, UInt8
from torch import Tensor

from skyloom.core.errors import RequestError

MAX_SIDE = 2**13
MAX_FPS = 240
_FORMAT = "yuv444p"
_MIN_SIDE = 32  # minterpolate searches motion in blocks of 16 pixels and their neighbours
_LOOKAHEAD = 3  # minterpolate uses two frames on each side
_CUT_PERCENT = 10.0  # of the range of luma, as in FFmpeg's scene change detection
_LUMA = (0.299, 0.587, 0.114)


def upscale(
    runs: Iterable[UInt8[Tensor, "n h w c"]], size: tuple[int, int]
) -> Iterator[UInt8[Tensor, "n y x c"]]:
    """Resize frames to (height, width) by Lanczos resampling. Raises RequestError."""
    height, width = size
    if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE):
        raise RequestError(
            f"width and height must be 1 to {MAX_SIDE} pixels, got {width}x{height}."
        )
    for run in runs:
        resized = [
            _to_av(frame).reformat(
                width=width, height=height, format="rgb24", interpolation="LANCZOS"
            )
            for frame in run
        ]
        yield torch.stack([_from_av(frame) for frame in resized])


def interpolate(
    runs: Iterable[UInt8[Tensor, "n h w c"]], fps: Fraction, target: Fraction
) -> Iterator[UInt8[Tensor, "n h w c"]]:
    """Raise the frame rate by motion-compensated interpolation (FFmpeg minterpolate).

    Frames at old times are unchanged. Across a cut, and after the last frame, the frame before is
    repeated. Raises RequestError for a rate that is not higher, or sides below 32 pixels.
    """
    if not fps < target <= MAX_FPS:
        raise RequestError(
            f"fps must be above the source's {float(fps):g} and at most {MAX_FPS}, "
            f"got {float(target):g}."
        )
    interpolator: _Interpolator | None = None
    for run in runs:
        if min(run.shape[1:3]) < _MIN_SIDE:
            raise RequestError(
                f"width and height must be at least {_MIN_SIDE} pixels, "
                f"got {run.shape[2]}x{run.shape[1]}."
            )
        height, width = run.shape[1:3]
        interpolator = interpolator or _Interpolator(height, width, fps=fps, target=target)
        for frame in run:
            interpolator.push(frame)
        if ready := list(interpolator.ready()):
            yield torch.stack(ready)
    if interpolator is not None:
        interpolator.end()
        yield torch.stack(list(interpolator.ready()))


class _Interpolator:
    """The FFmpeg filter graph with the input and output frames that are still needed."""

    def __init__(self, height: int, width: int, *, fps: Fraction, target: Fraction) -> None:
        self._fps = fps
        self._step = fps / target
        self._inputs: dict[int, UInt8[Tensor, "h w c"]] = {}
        self._outputs: dict[int, UInt8[Tensor, "h w c"]] = {}
        self._luma: Float[Tensor, "h w"] | None = None  # of the frame before
        self._change = 0.0  # of the frame before, in percent
        self._cuts: set[int] = set()  # last frames before a cut
        self._count = 0
        self._next = 0
        self._last: float = math.inf
        self._total: float = math.inf
        self._graph = Graph()
        source = self._graph.add_buffer(
            width=width, height=height, format=av.VideoFormat(_FORMAT), time_base=1 / fps
        )
        # FFmpeg's own scene change detection (scd) gives other frames from run to run
        options = f"fps={target}:mi_mode=mci:me_mode=bidir:scd=none"
        motion = self._graph.add("minterpolate", options)
        self._graph.link_nodes(source, motion, self._graph.add("buffersink")).configure()

    def push(self, frame: UInt8[Tensor, "h w c"]) -> None:
        """Add the next input frame."""
        luma = frame.float() @ torch.tensor(_LUMA)
        if self._luma is not None:
            change = 100 * float((luma - self._luma).abs().mean()) / 256
            if min(change, abs(change - self._change)) >= _CUT_PERCENT:
                self._cuts.add(self._count - 1)
            self._change = change
        self._luma = luma
        self._inputs[self._count] = frame
        self._feed(frame)

    def end(self) -> None:
        """Finish the input; repeat the last frame so that the filter emits all before it."""
        last = self._inputs[self._count - 1]
        self._last = self._count - 1
        self._total = math.ceil(self._count / self._step)
        for _ in range(_LOOKAHEAD):
            self._feed(last)

    def _feed(self, frame: UInt8[Tensor, "h w c"]) -> None:
        picture = _to_av(frame).reformat(format=_FORMAT)
        picture.pts = self._count
        picture.time_base = 1 / self._fps
        self._count += 1
        self._graph.push(picture)
        while True:
            try:
                output = self._graph.pull()
            except (BlockingIOError, EOFError, FFmpegError):
                return
            assert isinstance(output, av.VideoFrame)
            if output.pts is not None:
                self._outputs[output.pts] = _from_av(output.reformat(format="rgb24"))

    def ready(self) -> Iterator[UInt8[Tensor, "h w c"]]:
        """Yield the output frames that are complete."""
        while self._next < self._total:
            position = self._next * self._step
            before = math.floor(position)
            copied = before in {position, self._last} or before in self._cuts
            if before not in self._inputs or not (copied or self._next in self._outputs):
                return
            yield self._inputs[before] if copied else self._outputs[self._next]
            self._next += 1
            self._inputs = _from_number(self._inputs, before)
            self._outputs = _from_number(self._outputs, self._next)


def _from_number(
    frames: dict[int, UInt8[Tensor, "h w c"]], first: int
) -> dict[int, UInt8[Tensor, "h w c"]]:
    """Drop frames before number `first`."""
    return {number: frame for number, frame in frames.items() if number >= first}


def _to_av(frame: UInt8[Tensor, "h w c"]) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(frame.cpu().contiguous().numpy(), format="rgb24")


def _from_av(picture: av.VideoFrame) -> UInt8[Tensor, "h w c"]:
    return torch.from_numpy(picture.to_ndarray(format="rgb24").copy())
