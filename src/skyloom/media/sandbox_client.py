"""Questions to the child about a video, and answers held to what was asked: nothing it says is taken on trust."""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np

from skyloom.media.sandbox import Sandbox

MAX_FRAMES = 2_000_000
_MAX_SIDE, _MAX_COMMENT, _MAX_PACKET = 2**14, 2**20, 2**24
_LARGEST = 2**62
_KEYS_SENT = 64
_CHANNELS = 3
_CODECS = ("aac", "mp3", "opus")
_WAIT = Fraction(1, 10)  # how long a lone frame of unknown length lasts


@dataclass(frozen=True)
class AudioFormat:
    """The first sound of a video; `codec` is empty where its packets cannot be copied into an mp4."""

    codec: str
    rate: int
    channels: int


@dataclass(frozen=True)
class AudioPacket:
    """A packet of sound: when it plays and for how long, in seconds."""

    at: Fraction
    lasts: Fraction
    data: bytes


@dataclass(frozen=True, eq=False)
class Index:
    """What is in a file: times of its frames and of key frames in ticks, how long the last one lasts (0: not said),
    size as it is stored, quarter turns to the left that make it upright, shape of a pixel, sound, comment."""

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
        """Height and width as they are shown."""
        return (self.width, self.height) if self.turn % 2 else (self.height, self.width)

    @cached_property
    def rate(self) -> tuple[Fraction, bool]:
        """Frames per second, and whether every frame lasts as long; else it is the mean."""
        ticks = self.pts - self.pts[0]
        count = len(ticks)
        span = (int(ticks[-1]) + self.last) * self.tick if self.last else Fraction(0)
        mean = (count - 1) / (int(ticks[-1]) * self.tick) if count > 1 else None
        usual = [rate for rate in self.rates if rate.denominator in {1, 1001}]
        guesses = [
            *usual,
            *([Fraction(round(mean))] if mean else []),
            *self.rates,
            *([mean] if mean else []),
        ]
        guesses += [1 / span] if span and not mean else []
        for guess in guesses:
            # the times of a steady rate, rounded or cut to ticks
            there = np.arange(count) / float(guess * self.tick) if guess > 0 else ticks - 2.0
            if np.abs(ticks - there).max() <= 1:
                return guess.limit_denominator(1001), True
        return (count / span if span else mean or 1 / _WAIT).limit_denominator(1001), False

    @cached_property
    def begins(self) -> list[Fraction]:
        """When each frame begins, in seconds after the first."""
        rate, steady = self.rate
        if steady:
            return [number / rate for number in range(len(self.pts))]
        return [int(ticks) * self.tick for ticks in self.pts - self.pts[0]]

    @property
    def seconds(self) -> Fraction:
        """From the first frame's begin to the last one's end."""
        rate, steady = self.rate
        return self.begins[-1] + (1 / rate if steady or not self.last else self.last * self.tick)


def ask_index(child: Sandbox) -> Index:
    """What is in the child's file. Raises MediaError."""
    child.ask({"ask": "index"})
    header, raw = _taken(child, 8 * MAX_FRAMES)
    _, keys = _taken(child, 8 * MAX_FRAMES)
    _, comment = _taken(child, _MAX_COMMENT)
    try:
        index = Index(
            pts=np.frombuffer(raw, "<i8"),
            keys=np.frombuffer(keys, "<i8"),
            last=_whole(header["last"], 0, _LARGEST),
            tick=_ratio(header["tick"]),
            rates=tuple(_ratio(rate) for rate in header["rates"][:4]),
            height=_whole(header["height"], 1, _MAX_SIDE),
            width=_whole(header["width"], 1, _MAX_SIDE),
            turn=_whole(header["turn"], 0, 3),
            aspect=_ratio(header["aspect"]),
            sound=_sound(header),
            comment=bytes(comment),
        )
        times = index.pts
        if not len(times) or abs(times[[0, -1]]).max() > _LARGEST or (np.diff(times) <= 0).any():
            raise ValueError("times that do not rise")
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise child.fail("crash") from error
    return index


def ask_frames(child: Sandbox, index: Index, numbers: Sequence[int]) -> np.ndarray | None:
    """Frames by rising numbers, uint8 [t h w 3]; none when the child has gone home. Raises MediaError."""
    times = [int(index.pts[number]) for number in numbers]
    until = bisect_right(index.keys, times[-1])
    keys = [int(key) for key in index.keys[max(0, until - _KEYS_SENT) : until]]
    child.ask({"ask": "frames", "times": times, "keys": keys, "size": [index.height, index.width]})
    height, width = index.upright
    frames = np.empty((len(numbers), height, width, _CHANNELS), np.uint8)
    for place in range(len(numbers)):
        message = child.take(frames[0].nbytes)
        if message is None and place == 0:
            return None
        if message is None or len(message[1]) != frames[0].nbytes:
            raise child.fail("crash")
        frames[place] = np.frombuffer(message[1], np.uint8).reshape(frames.shape[1:])
    return frames


def ask_sound(
    child: Sandbox, index: Index, start: Fraction, stop: Fraction
) -> Iterator[AudioPacket]:
    """Packets of the first sound whose middle lies between two times, in seconds after the first frame."""
    span = {"start": _pair(start), "stop": _pair(stop), "origin": int(index.pts[0])}
    child.ask({"ask": "sound", **span})
    while True:
        header, data = _taken(child, _MAX_PACKET)
        if header.get("end"):
            return
        try:
            packet = AudioPacket(
                _ratio(header["at"], signed=True), _ratio(header["lasts"]), bytes(data)
            )
        except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
            raise child.fail("crash") from error
        if not data or not start <= packet.at + packet.lasts / 2 < stop:
            raise child.fail("crash")
        yield packet


def _taken(child: Sandbox, most: int) -> tuple[dict[str, Any], bytearray]:
    message = child.take(most)
    if message is None:
        raise child.fail("crash")
    return message


def _sound(header: Mapping[str, Any]) -> AudioFormat | None:
    if "sound" not in header:
        return None
    codec = header["sound"] if header["sound"] in _CODECS else ""
    return (
        AudioFormat(codec, _whole(header["rate"], 1, 2**20), _whole(header["channels"], 1, 8))
        if codec
        else AudioFormat("", 0, 0)
    )


def _whole(value: object, least: int, most: int) -> int:
    if not isinstance(value, int) or not least <= value <= most:
        raise ValueError("a number out of bounds")
    return value


def _ratio(pair: Any, *, signed: bool = False) -> Fraction:
    """A pair of whole numbers as a fraction, not negative unless it may be."""
    above, below = pair
    return Fraction(_whole(above, -_LARGEST if signed else 0, _LARGEST), _whole(below, 1, _LARGEST))


def _pair(number: Fraction) -> list[int]:
    return [number.numerator, number.denominator]
