"""Random access to the frames and sound of untrusted videos, decoded in the sandbox.

Frame N is the same whether it is reached by a seek or from the start. Time 0 is the first frame's
time. At another rate each moment shows the latest frame, as in a player.
"""

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from skyloom.core.audio import Audio
from skyloom.core.errors import RequestError
from skyloom.core.files import sha256_file
from skyloom.media.frames import cover
from skyloom.media.read import parse_receipt
from skyloom.media.sandbox import OpenedFile, Sandbox, media_error
from skyloom.media.sandbox_client import (
    AudioFormat,
    AudioPacket,
    VideoIndex,
    read_audio,
    read_frames,
    read_index,
    read_samples,
)
from skyloom.media.sandbox_limits import CHANNELS, MAX_FRAMES, MAX_SIDE

MAX_FPS = 240
MAX_READ_BYTES = 3 * 10**9
_BATCH_BYTES = 2**24
_BATCH_FRAMES = 64
_BOMB_BYTES = 2**30
_BOMB_RATIO = 20_000
_TIME_TOLERANCE = Fraction(1, 1000)  # webm rounds its times to milliseconds


def open_source(
    path: str | Path, *, fps: Fraction | None = None, size: tuple[int, int] | None = None
) -> "VideoSource":
    """Open a video at its own or another rate and size (height, width; scaled and cropped).

    Indexes all packets and decodes one frame. Raises MediaError for a file that is no video, cannot
    be decoded, or is a decompression bomb; RequestError for an invalid rate or size.
    """
    if fps is not None and not 0 < fps <= MAX_FPS:
        raise RequestError(f"fps must be above 0 and at most {MAX_FPS}, got {float(fps):g}.")
    if size is not None and not all(0 < side <= MAX_SIDE for side in size):
        raise RequestError(
            f"width and height must be 1 to {MAX_SIDE} pixels, got {size[1]}x{size[0]}."
        )
    child = Sandbox(Path(path), "video")
    index = read_index(child)
    _check_bomb(child.opened, index)
    return VideoSource(child, index, None if fps is None else Fraction(fps), size)


class VideoSource:
    """A video with random access to its frames; memory is constant.

    `fps`, `frames`, `height` and `width` are those of the frames that are read; `notices` describe
    conversions (resampled, rotated, resized).
    """

    def __init__(
        self, child: Sandbox, index: VideoIndex, fps: Fraction | None, size: tuple[int, int] | None
    ) -> None:
        self._child = child
        self._opened = child.opened
        self._index = index
        self._target_fps = fps
        self.path = child.opened.path
        rate, constant = index.rate
        self.fps = fps or rate
        resampled = fps is not None and not (constant and fps == rate)
        self._numbers = _resample(index, self.fps) if resampled else None
        self.frames = len(index.pts) if self._numbers is None else len(self._numbers)
        self._stored_size = index.upright
        self.height, self.width = self._stored_size if size is None else size
        target_fps = self.fps if resampled else None
        self.notices = tuple(_notices(index, target_fps, (self.height, self.width)))

    @property
    def audio(self) -> bool:
        """Whether it has audio that can be copied into an mp4."""
        return self._index.sound is not None and bool(self._index.sound.codec)

    @property
    def has_sound(self) -> bool:
        """Whether it has audio that can be copied or decoded."""
        return self._index.sound is not None

    @property
    def receipt(self) -> dict[str, object]:
        """The receipt embedded by skyloom; empty for other files."""
        return parse_receipt(self._index.comment)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file, lower-case hex."""
        return sha256_file(self.path)

    def resized(self, height: int, width: int) -> "VideoSource":
        """The same open video, read at another size (scaled and cropped)."""
        return VideoSource(self._child, self._index, self._target_fps, (height, width))

    def read(self, start: int = 0, stop: int | None = None) -> UInt8[Tensor, "t h w c"]:
        """Read frames [start, stop), by default all.

        Raises RequestError for a range outside the video or of more than 3 GB.
        """
        stop = self.frames if stop is None else stop
        self._check_range(start, stop)
        if (stop - start) * self.height * self.width * CHANNELS > MAX_READ_BYTES:
            raise RequestError(
                f"A read must fit in {MAX_READ_BYTES // 10**9} GB, "
                f"got {stop - start} frames of {self.width}x{self.height}.",
                hint="Read fewer at a time.",
            )
        return torch.cat(list(self.stream(start, stop)))

    def stream(self, start: int = 0, stop: int | None = None) -> Iterator[UInt8[Tensor, "n h w c"]]:
        """Yield frames [start, stop) in batches. Raises what `read` raises, and MediaError."""
        stop = self.frames if stop is None else stop
        self._check_range(start, stop)
        height, width = self._stored_size
        batch = max(1, min(_BATCH_FRAMES, _BATCH_BYTES // (height * width * CHANNELS)))
        for begin in range(start, stop, batch):
            frames = self._read_batch(range(begin, min(begin + batch, stop)))
            if self._stored_size != (self.height, self.width):
                frames = cover(frames, self.height, self.width)
            yield frames

    def _read_batch(self, positions: range) -> UInt8[Tensor, "n h w c"]:
        """Read frames by position; several positions may show the same stored frame."""
        if self._numbers is None:
            return self._decode(list(positions))
        numbers = [int(self._numbers[position]) for position in positions]
        distinct = sorted(set(numbers))
        row = {number: index for index, number in enumerate(distinct)}
        return self._decode(distinct)[[row[number] for number in numbers]]

    def sound_packets(self, start: int, stop: int) -> Iterator["AudioPacket"]:
        """Yield the audio packets of frames [start, stop), timed from `start`; none without audio.

        A packet belongs to the range that contains its midpoint (exact to about 20 ms).
        """
        self._check_range(start, stop)
        if self._index.sound is None or not self.audio:
            return
        begin = start / self.fps
        with Sandbox(self.path, "video", same=self._opened) as child:
            for packet in read_audio(child, self._index, begin, stop / self.fps):
                yield AudioPacket(packet.at - begin, packet.lasts, packet.data)

    def stream_audio(self, start: int = 0, stop: int | None = None) -> Iterator[Audio]:
        """Yield the decoded sound of frames [start, stop) in pieces; none without sound.

        Pieces of consecutive ranges add up without drift; sound that is shorter than the frames is
        padded with silence. Raises RequestError for a range outside the video, MediaError.
        """
        stop = self.frames if stop is None else stop
        self._check_range(start, stop)
        if self._index.sound is None:
            return
        with Sandbox(self.path, "video", same=self._opened) as child:
            begin = start / self.fps
            for samples, rate in read_samples(child, self._index, begin, stop / self.fps):
                yield Audio(torch.from_numpy(samples).T, rate)

    def read_audio(self, start: int = 0, stop: int | None = None) -> Audio | None:
        """Read the sound of frames [start, stop), by default all; None without sound.

        Raises what `stream_audio` raises, and RequestError for more than 3 GB.
        """
        pieces = []
        size = 0
        for piece in self.stream_audio(start, stop):
            pieces.append(piece)
            size += piece.samples.nbytes
            if size > MAX_READ_BYTES:
                raise RequestError(
                    f"A read of sound must fit in {MAX_READ_BYTES // 10**9} GB, got more.",
                    hint="Read fewer frames at a time.",
                )
        return Audio.concatenate(pieces) if pieces else None

    @property
    def sound(self) -> AudioFormat | None:
        """Format of the audio; None if there is none that can be copied."""
        return self._index.sound if self.audio else None

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start < stop <= self.frames:
            raise RequestError(
                f"A frame range of {self.path} must be within 0 to {self.frames} and not empty, "
                f"got {start} to {stop}.",
                hint=f"It is {float(self.frames / self.fps):.2f} seconds long.",
            )

    def _decode(self, numbers: Sequence[int]) -> UInt8[Tensor, "t h w c"]:
        """Decode stored frames by rising numbers; restart a child that has exited."""
        for _ in range(2):
            frames = read_frames(self._child, self._index, numbers)
            if frames is not None:
                return torch.from_numpy(frames)
            self._child.close()
            self._child = Sandbox(self.path, "video", same=self._opened)
        raise media_error(self.path, "video", "crash")


def _check_bomb(opened: OpenedFile, index: VideoIndex) -> None:
    """Refuse a file that would decode to gigabytes and to 20,000 times its size."""
    count = len(index.pts)
    decoded = count * index.height * index.width * CHANNELS
    if decoded > _BOMB_BYTES and decoded > _BOMB_RATIO * opened.size:
        values = {
            "bytes": opened.size,
            "frames": count,
            "width": index.width,
            "height": index.height,
        }
        raise media_error(opened.path, "video", "bomb", values)


def _resample(index: VideoIndex, fps: Fraction) -> np.ndarray:
    """Return the number of the stored frame that each frame of another rate shows."""
    count = max(1, math.ceil((index.seconds - _TIME_TOLERANCE) * fps))
    if count > MAX_FRAMES:
        raise RequestError(
            f"A video must have at most {MAX_FRAMES} frames, "
            f"got {count} ({float(index.seconds):.0f} s at {float(fps):g} fps).",
            hint="Use a lower rate.",
        )
    first_shown = np.array([math.ceil((begin - _TIME_TOLERANCE) * fps) for begin in index.begins])
    return np.searchsorted(first_shown, np.arange(count), side="right") - 1


def _notices(index: VideoIndex, fps: Fraction | None, size: tuple[int, int]) -> Iterator[str]:
    """Yield a sentence per conversion; `fps` is None if frames are not resampled."""
    rate, constant = index.rate
    if fps is not None:
        yield f"resampled from {'' if constant else 'about '}{float(rate):g} to {float(fps):g} fps"
    elif not constant:
        yield f"variable frame rate: every frame is read, at the mean rate of {float(rate):g} fps"
    if index.turn:
        yield f"rotated upright by {90 * index.turn} degrees to the left"
    if index.aspect not in {0, 1}:
        ratio = f"{index.aspect.numerator}:{index.aspect.denominator}"
        yield f"pixels are not square ({ratio}) and are read as stored"
    if size != index.upright:
        height, width = index.upright
        yield f"resized from {width}x{height} to {size[1]}x{size[0]}, cropped to fill it"
    if index.sound is not None and not index.sound.codec:
        yield "the audio codec cannot be copied into an mp4"
