"""Videos from outside: which frames they have, and any of them, exactly; decoded by a child that may do nothing else.

Frame N is the same whether it is reached by a seek or from the start. Time 0 is the first frame's. At another rate each
moment shows the latest frame, as a player does; timestamps are never averaged.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from skyloom.core.errors import RequestError
from skyloom.media.frames import cover
from skyloom.media.read import parse_receipt
from skyloom.media.sandbox import Opened, Sandbox, refuse
from skyloom.media.sandbox_client import (
    MAX_FRAMES,
    AudioFormat,
    AudioPacket,
    Index,
    ask_frames,
    ask_index,
    ask_sound,
)

MAX_FPS = 240
MAX_READ = 3 * 10**9
_RUN_BYTES, _RUN_FRAMES = 2**24, 64
_MAX_FRAMES, _MAX_SIDE, _MAX_COMMENT = 2_000_000, 2**14, 2**20
_BOMB_BYTES, _BOMB_RATIO = 2**30, 20_000
_CHANNELS = 3
_SLACK = Fraction(1, 1000)  # webm rounds its times to milliseconds


def open_source(
    path: str | Path, *, fps: Fraction | None = None, size: tuple[int, int] | None = None
) -> "VideoSource":
    """A video to read frames of: its own, or at another rate, or covering another size (height, width).

    Looks through the packets once and decodes one frame. Raises MediaError for a file that is no video, cannot be
    read, or would unpack to very much more than it is; RequestError for a rate or size that makes no sense.
    """
    if fps is not None and not 0 < fps <= MAX_FPS:
        raise RequestError(
            f"A video at {float(fps):g} fps cannot be read.", hint=f"Use up to {MAX_FPS} fps."
        )
    if size is not None and not all(0 < side <= _MAX_SIDE for side in size):
        raise RequestError(
            f"A video cannot be {size[1]}x{size[0]}.", hint=f"Use sides of 1 to {_MAX_SIDE} pixels."
        )
    child = Sandbox(Path(path), "video")
    index = ask_index(child)
    _check_bomb(child.opened, index)
    return VideoSource(child, index, None if fps is None else Fraction(fps), size)


class VideoSource:
    """A video's frames, by number; always the same ones. Memory holds the child's few frames and no more.

    `size` and `fps` are those of what is read; `notices` say what was changed for it.
    """

    def __init__(
        self, child: Sandbox, index: Index, fps: Fraction | None, size: tuple[int, int] | None
    ) -> None:
        self._child, self._opened, self._index = child, child.opened, index
        self.path = child.opened.path
        rate, steady = index.rate
        self.fps = fps or rate
        self._numbers = None if fps is None or (steady and fps == rate) else _at_rate(index, fps)
        self.frames = len(index.pts) if self._numbers is None else len(self._numbers)
        self._own_size = index.upright
        self.height, self.width = self._own_size if size is None else size
        self.notices = tuple(
            _notices(index, None if self._numbers is None else fps, (self.height, self.width))
        )

    @property
    def audio(self) -> bool:
        """Whether it has sound that can be copied into an mp4."""
        return self._index.sound is not None and bool(self._index.sound.codec)

    @property
    def receipt(self) -> dict[str, object]:
        """How it was made, if skyloom wrote it; empty otherwise."""
        return parse_receipt(self._index.comment)

    @cached_property
    def sha256(self) -> str:
        """The digest of the file, as lower-case hex."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def read(self, start: int, stop: int) -> UInt8[Tensor, "t h w c"]:
        """Frames start to stop, without stop. Raises RequestError for a range outside the video, or 3 GB of frames."""
        self._check_range(start, stop)
        if (stop - start) * self.height * self.width * _CHANNELS > MAX_READ:
            raise RequestError(
                f"{stop - start} frames of {self.width}x{self.height} are more than fit in memory at once.",
                hint="Read fewer at a time.",
            )
        return torch.cat(list(self.stream(start, stop)))

    def stream(self, start: int = 0, stop: int | None = None) -> Iterator[UInt8[Tensor, "n h w c"]]:
        """The same frames in small runs, at constant memory. Raises what `read` raises, MediaError also midway."""
        stop = self.frames if stop is None else stop
        self._check_range(start, stop)
        height, width = self._own_size
        run = max(1, min(_RUN_FRAMES, _RUN_BYTES // (height * width * _CHANNELS)))
        for begin in range(start, stop, run):
            wanted = range(begin, min(begin + run, stop))
            numbers = (
                list(wanted)
                if self._numbers is None
                else [int(self._numbers[number]) for number in wanted]
            )
            needed = sorted(set(numbers))
            frames = self._decode(needed)
            if numbers != needed:
                place = {number: index for index, number in enumerate(needed)}
                frames = frames[[place[number] for number in numbers]]
            yield (
                frames
                if self._own_size == (self.height, self.width)
                else cover(frames, self.height, self.width)
            )

    def sound_packets(self, start: int, stop: int) -> Iterator["AudioPacket"]:
        """Packets of the sound that belong to frames start to stop, timed from the start; none where there is none.

        Which ones is exact to one packet, about 20 ms: those whose middle lies in the range.
        """
        self._check_range(start, stop)
        if self._index.sound is None or not self.audio:
            return
        begin, end = start / self.fps, stop / self.fps
        with Sandbox(self.path, "video", same=self._opened) as child:
            for packet in ask_sound(child, self._index, begin, end):
                yield AudioPacket(packet.at - begin, packet.lasts, packet.data)

    @property
    def sound(self) -> AudioFormat | None:
        """What the sound is made of, where it can be copied."""
        return self._index.sound if self.audio else None

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start < stop <= self.frames:
            raise RequestError(
                f"{self.path} has frames 0 to {self.frames - 1}; {start} to {stop - 1} are not all of them."
                if start < stop
                else f"Frames {start} to {stop} of {self.path} are none.",
                hint=f"It is {float(self.frames / self.fps):.2f} seconds long.",
            )

    def _decode(self, numbers: Sequence[int]) -> UInt8[Tensor, "t h w c"]:
        """Frames of the file by rising numbers, from the child, or from another one if it has gone home."""
        for _ in range(2):
            frames = ask_frames(self._child, self._index, numbers)
            if frames is not None:
                return torch.from_numpy(frames)
            self._child.close()
            self._child = Sandbox(self.path, "video", same=self._opened)
        raise refuse(self.path, "video", "crash")


def _check_bomb(opened: Opened, index: Index) -> None:
    """Refuse what is small and would unpack to gigabytes: no camera makes that, and no screen recorder."""
    count = len(index.pts)
    unpacked = count * index.height * index.width * _CHANNELS
    if unpacked > _BOMB_BYTES and unpacked > _BOMB_RATIO * opened.size:
        values = {
            "bytes": opened.size,
            "frames": count,
            "width": index.width,
            "height": index.height,
        }
        raise refuse(opened.path, "video", "bomb", values)


def _at_rate(index: Index, fps: Fraction) -> np.ndarray:
    """Which frame each moment of another rate shows: the latest one."""
    count = max(1, math.ceil((index.seconds - _SLACK) * fps))
    if count > MAX_FRAMES:
        long = f"{float(index.seconds):.0f} s at {float(fps):g} fps are {count} frames, more than {MAX_FRAMES}."
        raise RequestError(long, hint="Use a lower rate.")
    shown_from = np.array([math.ceil((begin - _SLACK) * fps) for begin in index.begins])
    return np.searchsorted(shown_from, np.arange(count), side="right") - 1


def _notices(index: Index, fps: Fraction | None, size: tuple[int, int]) -> Iterator[str]:
    """What is not as in the file, one sentence each; `fps` where it is resampled."""
    rate, steady = index.rate
    if fps is not None:
        yield f"resampled from {'' if steady else 'about '}{float(rate):g} to {float(fps):g} fps"
    elif not steady:
        yield f"its rate varies: its frames are read as they come, at the mean of {float(rate):g} fps"
    if index.turn:
        yield f"turned upright by {90 * index.turn} degrees to the left"
    if index.aspect not in {0, 1}:
        yield f"its pixels are not square ({index.aspect.numerator}:{index.aspect.denominator}) and are read as stored"
    if size != index.upright:
        height, width = index.upright
        yield f"resized from {width}x{height} to {size[1]}x{size[0]}, cut to fill it"
    if index.sound is not None and not index.sound.codec:
        yield "its sound is of a kind that cannot be copied into an mp4"
