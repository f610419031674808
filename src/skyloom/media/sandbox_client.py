"""Commands to the sandboxed video decoder; every value of a reply is validated."""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np

from skyloom.media.sandbox import Sandbox
from skyloom.media.sandbox_limits import (
    CHANNELS,
    MAX_COMMENT,
    MAX_FRAMES,
    MAX_PACKET,
    MAX_SIDE,
)

_MAX_INTEGER = 2**62
_MAX_RATES = 4
_MAX_KEYS = 64
_AUDIO_CODECS = ("aac", "mp3", "opus")
_MAX_AUDIO_RATE = 2**20
_MAX_CHANNELS = 8
_DEFAULT_FRAME_SECONDS = Fraction(1, 10)  # of a single frame without a duration


@dataclass(frozen=True)
class AudioFormat:
    """Format of an audio stream; `codec` is empty if its packets cannot be copied into an mp4."""

    codec: str
    rate: int
    channels: int


@dataclass(frozen=True)
class AudioPacket:
    """An encoded audio packet; `at` and `lasts` in seconds."""

    at: Fraction
    lasts: Fraction
    data: bytes


@dataclass(frozen=True, eq=False)
class VideoIndex:
    """Index of a video file.

    `pts` are the times of all frames and `keys` those of key frames, in ticks of `tick` seconds.
    `last` is the duration of the last frame in ticks (0: unknown). `rates` are candidate frame
    rates. `height` and `width` are as stored, `turn` the number of quarter turns to the left that
    make frames upright, `aspect` the pixel aspect ratio.
    """

    pts: np.ndarray
    keys: np.ndarray
    last: int
    tick: Fraction
    rates: tuple[Fraction, ...]
    height: int
    width: int
    turn: int
    aspect: Fraction
    sound: AudioFormat | None
    comment: bytes

    @property
    def upright(self) -> tuple[int, int]:
        """Height and width of upright frames."""
        return (self.width, self.height) if self.turn % 2 else (self.height, self.width)

    @cached_property
    def rate(self) -> tuple[Fraction, bool]:
        """Frames per second, and whether the rate is constant; if not, it is the mean rate."""
        ticks = self.pts - self.pts[0]
        count = len(ticks)
        span = (int(ticks[-1]) + self.last) * self.tick if self.last else Fraction(0)
        mean = (count - 1) / (int(ticks[-1]) * self.tick) if count > 1 else None
        for rate in self._candidate_rates(span, mean):
            if rate > 0:
                expected = np.arange(count) / float(rate * self.tick)
                if np.abs(ticks - expected).max() <= 1:  # rounded or truncated to ticks
                    return rate.limit_denominator(1001), True
        variable = count / span if span else mean or 1 / _DEFAULT_FRAME_SECONDS
        return variable.limit_denominator(1001), False

    def _candidate_rates(self, span: Fraction, mean: Fraction | None) -> list[Fraction]:
        common = [rate for rate in self.rates if rate.denominator in {1, 1001}]
        if mean:
            return [*common, Fraction(round(mean)), *self.rates, mean]
        return [*common, *self.rates, *([1 / span] if span else [])]

    @cached_property
    def begins(self) -> list[Fraction]:
        """Start time of each frame in seconds after the first."""
        rate, constant = self.rate
        if constant:
            return [number / rate for number in range(len(self.pts))]
        return [int(ticks) * self.tick for ticks in self.pts - self.pts[0]]

    @property
    def seconds(self) -> Fraction:
        """Duration from the start of the first frame to the end of the last."""
        rate, constant = self.rate
        last = 1 / rate if constant or not self.last else self.last * self.tick
        return self.begins[-1] + last


def read_index(child: Sandbox) -> VideoIndex:
    """Read the index of the child's file. Raises MediaError."""
    child.send({"command": "index"})
    header, pts = _receive(child, 8 * MAX_FRAMES)
    _, keys = _receive(child, 8 * MAX_FRAMES)
    _, comment = _receive(child, MAX_COMMENT)
    try:
        index = VideoIndex(
            pts=np.frombuffer(pts, "<i8"),
            keys=np.frombuffer(keys, "<i8"),
            last=_integer(header["last"], 0, _MAX_INTEGER),
            tick=_fraction(header["tick"]),
            rates=tuple(_fraction(rate) for rate in header["rates"][:_MAX_RATES]),
            height=_integer(header["height"], 1, MAX_SIDE),
            width=_integer(header["width"], 1, MAX_SIDE),
            turn=_integer(header["turn"], 0, 3),
            aspect=_fraction(header["aspect"]),
            sound=_audio_format(header),
            comment=bytes(comment),
        )
        times = index.pts
        if (
            not len(times)
            or abs(times[[0, -1]]).max() > _MAX_INTEGER
            or (np.diff(times) <= 0).any()
        ):
            raise ValueError("times must rise")
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise child.fail("crash") from error
    return index


def read_frames(child: Sandbox, index: VideoIndex, numbers: Sequence[int]) -> np.ndarray | None:
    """Read frames by rising numbers, uint8 [t h w 3]; None if the child has exited (idle).

    Raises MediaError.
    """
    times = [int(index.pts[number]) for number in numbers]
    end = bisect_right(index.keys, times[-1])
    keys = [int(key) for key in index.keys[max(0, end - _MAX_KEYS) : end]]
    size = [index.height, index.width]
    child.send({"command": "frames", "times": times, "keys": keys, "size": size})
    height, width = index.upright
    frames = np.empty((len(numbers), height, width, CHANNELS), np.uint8)
    for position in range(len(numbers)):
        message = child.receive(frames[0].nbytes)
        if message is None and position == 0:
            return None
        if message is None or len(message[1]) != frames[0].nbytes:
            raise child.fail("crash")
        frames[position] = np.frombuffer(message[1], np.uint8).reshape(frames.shape[1:])
    return frames


def read_audio(
    child: Sandbox, index: VideoIndex, start: Fraction, stop: Fraction
) -> Iterator[AudioPacket]:
    """Yield packets of the first audio stream whose midpoint is in [start, stop).

    Times are in seconds after the first frame.
    """
    origin = int(index.pts[0])
    child.send({"command": "audio", "start": _pair(start), "stop": _pair(stop), "origin": origin})
    while True:
        header, data = _receive(child, MAX_PACKET)
        if header.get("end"):
            return
        try:
            at = _fraction(header["at"], signed=True)
            packet = AudioPacket(at, _fraction(header["lasts"]), bytes(data))
        except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
            raise child.fail("crash") from error
        if not data or not start <= packet.at + packet.lasts / 2 < stop:
            raise child.fail("crash")
        yield packet


def read_samples(
    child: Sandbox, index: VideoIndex, start: Fraction, stop: Fraction
) -> Iterator[tuple[np.ndarray, int]]:
    """Yield the decoded samples of [start, stop) seconds, float32 [n channels], and their rate.

    Sample 0 is at the time of the first frame. The pieces have floor(stop * rate) -
    floor(start * rate) samples in all, with silence where the file has no sound.
    """
    origin = int(index.pts[0])
    command = {"start": _pair(start), "stop": _pair(stop), "origin": origin}
    child.send({"command": "samples", **command})
    form = None
    position = 0
    ended = False
    while not ended:
        header, data = _receive(child, MAX_PACKET)
        ended = bool(header.get("end"))
        at, rate, samples = _sound_run(child, header, data)
        if form is None:
            form = (rate, samples.shape[1])
            position = int(start * rate // 1)
        end = int(stop * form[0] // 1)
        at = end if ended else at
        if not ended and form != (rate, samples.shape[1]):
            raise child.fail("crash")
        if not position <= at <= end - len(samples):
            raise child.fail("crash")
        yield from _silence(at - position, *form)
        yield from [(samples, rate)] if len(samples) else []
        position = at + len(samples)


def _sound_run(
    child: Sandbox, header: Mapping[str, Any], data: bytearray
) -> tuple[int, int, np.ndarray]:
    """Return the index of the first sample, the rate and the samples [n channels] of a message."""
    try:
        at = _integer(header.get("at", 0), 0, _MAX_INTEGER)
        rate = _integer(header["rate"], 1, _MAX_AUDIO_RATE)
        channels = _integer(header["channels"], 1, _MAX_CHANNELS)
        samples = np.frombuffer(data, "<f4").reshape(-1, channels)
    except (ValueError, KeyError, TypeError) as error:
        raise child.fail("crash") from error
    return at, rate, np.nan_to_num(samples, posinf=1, neginf=-1)


def _silence(count: int, rate: int, channels: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yield `count` silent samples in pieces of a second."""
    for begin in range(0, count, rate):
        yield np.zeros((min(rate, count - begin), channels), np.float32), rate


def _receive(child: Sandbox, max_bytes: int) -> tuple[dict[str, Any], bytearray]:
    message = child.receive(max_bytes)
    if message is None:
        raise child.fail("crash")
    return message


def _audio_format(header: Mapping[str, Any]) -> AudioFormat | None:
    if "sound" not in header:
        return None
    codec = header["sound"]
    if codec not in _AUDIO_CODECS:
        return AudioFormat("", 0, 0)
    rate = _integer(header["rate"], 1, _MAX_AUDIO_RATE)
    return AudioFormat(codec, rate, _integer(header["channels"], 1, _MAX_CHANNELS))


def _integer(value: object, minimum: int, maximum: int) -> int:
    if not isinstance(value, int) or not minimum <= value <= maximum:
        raise ValueError("integer out of range")
    return value


def _fraction(pair: Any, *, signed: bool = False) -> Fraction:
    """Convert [numerator, denominator] to a fraction, non-negative unless `signed`."""
    numerator, denominator = pair
    minimum = -_MAX_INTEGER if signed else 0
    return Fraction(
        _integer(numerator, minimum, _MAX_INTEGER), _integer(denominator, 1, _MAX_INTEGER)
    )


def _pair(number: Fraction) -> list[int]:
    return [number.numerator, number.denominator]
