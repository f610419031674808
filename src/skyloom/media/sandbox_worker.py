"""The child that decodes other people's files: no torch, no files but one, no network, one question at a time.

It reads lines of JSON from its standard input and answers with messages (`sandbox.py`): headers and raw bytes. What it
cannot do it refuses by a word for which the parent has the sentence. Left alone, it goes home.
"""

import json
import os
import select
import struct
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, BinaryIO

import av
import av.subtitles.codeccontext
import av.subtitles.stream
import numpy as np
from av.error import FFmpegError
from av.stream import Disposition
from av.video.frame import PictureType

from skyloom.media.sandbox import RefusedError
from skyloom.media.sandbox_limits import confine, work_for

MAX_STREAMS = 32
MAX_FRAMES = 2_000_000
MAX_SECONDS = 24 * 3600
MAX_PIXELS = 16_000_000
MAX_COMMENT = 2**20
MAX_PACKET = 2**24
CODECS = {
    "h264",
    "hevc",
    "vp8",
    "vp9",
    "libvpx",
    "libvpx-vp9",
    "libdav1d",
    "av1",
    "ffv1",
    "mpeg4",
    "prores",
}
CODECS |= {"gif", "mjpeg", "png", "webp"}
AUDIO = {"aac": "aac", "mp3": "mp3", "mp3float": "mp3", "opus": "opus", "libopus": "opus"}
_PATIENCE, _IDLE, _INDEXING, _WORKED = 10.0, 3.0, 60.0, 300.0
_PROGRESS = 0.5
_PICTURE_MEMORY, _FILM_MEMORY = (
    2**30,
    400 * 2**20,
)  # 64 million pixels thrice over; twenty frames of 4K


def main(kind: str, format_name: str, descriptor: int) -> None:
    """Answer questions about one open file until nobody asks."""
    if kind == "picture":
        from skyloom.media import image_decode as still
    confine(_PICTURE_MEMORY if kind == "picture" else _FILM_MEMORY)
    file = os.fdopen(descriptor, "rb", buffering=0)
    try:
        work_for(_PATIENCE)
        if kind == "picture":
            picture = still.decode_image(file, format_name)
            _say({"height": picture.shape[0], "width": picture.shape[1]}, picture)
            return
        film = VideoDecoder(file, format_name)
        work_for(0)
        while (question := _next_question()) is not None:
            work_for(_PATIENCE)
            film.answer(question)
            work_for(0)
    except RefusedError as refusal:
        _say({"refused": refusal.word, **refusal.values})
    except MemoryError:
        _say({"refused": "memory"})
    except (
        Exception
    ):  # a parser fails in more ways than it says; the parent has one sentence for all
        _say({"refused": "unreadable"})


def _next_question() -> dict[str, Any] | None:
    """The next line of the parent's, or nothing when it has gone, waits too long, or this process has worked enough."""
    if time.process_time() > _WORKED or not select.select([0], [], [], _IDLE)[0]:
        return None
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(0, 2**16)
        if not piece:
            return None
        line += piece
    return json.loads(line)


def _say(header: Mapping[str, Any], payload: np.ndarray | bytes = b"") -> None:
    """A message: the header's length, the header, and the bytes it announces. The reader may take its time."""
    work_for(0)
    raw = (
        np.ascontiguousarray(payload).data.cast("B") if isinstance(payload, np.ndarray) else payload
    )
    text = json.dumps({**header, "bytes": len(raw)}).encode()
    for data in (struct.pack(">I", len(text)) + text, raw):
        view = memoryview(data)
        while view:
            view = view[os.write(1, view) :]
    work_for(_PATIENCE)


_Timed = tuple[int, av.VideoFrame]


class VideoDecoder:
    """A video file: which frames it has and when, and any of them, exactly as decoding from the start gives them."""

    def __init__(self, file: BinaryIO, demuxer: str) -> None:
        self._file, self._demuxer = file, demuxer
        self._restart()

    def answer(self, question: Mapping[str, Any]) -> None:
        """Answer one question with one message or more."""
        if question["ask"] == "index":
            self._index()
        elif question["ask"] == "sound":
            self._tell_sound(
                Fraction(*question["start"]), Fraction(*question["stop"]), question["origin"]
            )
        else:
            self._tell_frames(question["times"], question["keys"], tuple(question["size"]))

    def _restart(self) -> None:
        """Open the file at its start."""
        self._file.seek(0)
        options = {
            "protocol_whitelist": "none",
            "format_whitelist": self._demuxer,
            "max_streams": str(MAX_STREAMS + 1),
            "max_pixels": str(MAX_PIXELS),
            "threads": "1",
        }
        self._container = av.open(
            self._file,
            "r",
            format=self._demuxer,
            options=options,
            metadata_errors="ignore",
            buffer_size=2**18,
        )
        if len(self._container.streams) > MAX_STREAMS:
            raise RefusedError("too many streams", most=MAX_STREAMS)
        videos = [
            s for s in self._container.streams.video if not s.disposition & Disposition.attached_pic
        ]
        if not videos:
            raise RefusedError("no pictures")
        self._stream = videos[0]
        context = self._stream.codec_context
        if context is None or context.name not in CODECS:
            raise RefusedError("codec")
        if context.width * context.height > MAX_PIXELS:
            raise RefusedError(
                "too large", width=context.width, height=context.height, most=MAX_PIXELS // 10**6
            )
        context.thread_count = 1
        self._decoded = self._frames()
        self._shown: _Timed | None = None
        self._ahead: _Timed | None = None

    def _frames(self) -> Iterator["_Timed"]:
        """Frames and their times, in ticks, in the order in which they show."""
        reached = 0
        try:
            for frame in self._container.decode(self._stream):
                work_for(_PATIENCE)
                moment = frame.pts if frame.pts is not None else frame.dts
                if moment is not None:
                    reached = moment
                    yield moment, frame
        except FFmpegError as error:
            raise RefusedError(
                "damaged", seconds=float(reached * (self._stream.time_base or 0))
            ) from error

    def _index(self) -> None:
        """Say what the file holds: times of all frames from its packets, size and turn from its first frame."""
        times, keys, last = self._scan()
        self._restart()
        self._ahead = next(self._decoded, None)
        if self._ahead is None or self._ahead[0] > times[-1]:
            raise RefusedError("no pictures")
        begin, first = self._ahead
        times = times[bisect_left(times, begin) :]  # packets before the first frame only lead to it
        stream, audio = self._stream, self._container.streams.audio
        tick = stream.time_base or Fraction(1, 1000)
        aspect = stream.sample_aspect_ratio or Fraction(1)
        rates = [
            rate for rate in (stream.average_rate, stream.base_rate, stream.guessed_rate) if rate
        ]
        _say(
            {
                "height": first.height,
                "width": first.width,
                "turn": round(first.rotation / 90) % 4,
                "tick": _pair(tick),
                "rates": [_pair(rate) for rate in rates],
                "last": last,
                "aspect": _pair(aspect),
                **(_about(audio[0]) if audio else {}),
            },
            np.array(times, dtype="<i8"),
        )
        _say({}, np.array(keys, dtype="<i8"))
        comment = {key.lower(): value for key, value in self._container.metadata.items()}.get(
            "comment", ""
        ).encode()
        _say({}, comment if len(comment) <= MAX_COMMENT else b"")

    def _scan(self) -> tuple[list[int], list[int], int]:
        """Times of all frames and of key frames, from the packets alone, and how long the last lasts (0: not said)."""
        times: dict[int, int] = {}
        keys: set[int] = set()
        begun = said = time.monotonic()
        for packet in self._container.demux(self._stream):
            time_of = packet.pts if packet.pts is not None else packet.dts
            if time_of is None or not packet.size or packet.is_discard or self._is_hidden(packet):
                continue
            times[time_of] = packet.duration or 0
            if packet.is_keyframe:
                keys.add(time_of)
            if len(times) > MAX_FRAMES:
                raise RefusedError("too many frames", most=MAX_FRAMES)
            if (now := time.monotonic()) - said > _PROGRESS:
                if now - begun > _INDEXING:
                    raise RefusedError("slow")
                said = now
                _say({"progress": len(times)})
        if not times:
            raise RefusedError("no pictures")
        ordered, tick = sorted(times), self._stream.time_base or Fraction(1, 1000)
        if (ordered[-1] - ordered[0]) * tick > MAX_SECONDS:
            raise RefusedError("too long", hours=MAX_SECONDS // 3600)
        return ordered, sorted(keys), max(0, times[ordered[-1]])

    def _is_hidden(self, packet: av.Packet) -> bool:
        """Whether a packet of VP8 is a frame that only others refer to; they are packets of their own in webm."""
        return (
            self._stream.codec_context.name in {"vp8", "libvpx"}
            and not memoryview(packet)[0] & 0x10
        )

    def _tell_frames(self, times: list[int], keys: list[int], size: tuple[int, int]) -> None:
        """The frames that show at rising times, upright rgb, each as a message; key frames before them are given."""
        for moment in times:
            frame = self._at(moment, keys)
            if (frame.height, frame.width) != size:
                raise RefusedError("sizes")
            _say(
                {},
                np.rot90(frame.to_ndarray(format="rgb24", threads=1), round(frame.rotation / 90)),
            )

    def _at(self, moment: int, keys: list[int]) -> av.VideoFrame:
        """The frame that shows at a time of the index: the latest there is, as a player shows it."""
        if self._is_near(moment, keys) and (found := self._reach(moment)):
            return found
        back, place = 1, bisect_right(keys, moment) - 1
        while place >= 0 and self._demuxer != "gif":  # a gif's pictures build on all before them
            if self._seek(keys[place]) and (found := self._reach(moment)):
                return found
            place, back = place - back, 2 * back
        self._restart()
        if found := self._reach(moment):
            return found
        raise RefusedError("damaged", seconds=float(moment * (self._stream.time_base or 0)))

    def _seek(self, key: int) -> bool:
        """Go to a key frame; false where it is none that can be decoded alone, as in a stream refreshed bit by bit."""
        self._container.seek(key, stream=self._stream)
        self._decoded = self._frames()
        self._shown, self._ahead = None, next(self._decoded, None)
        return self._ahead is not None and self._ahead[1].pict_type == PictureType.I

    def _is_near(self, moment: int, keys: list[int]) -> bool:
        """Whether going on from here needs no more decoding than going back to the key frame before it would."""
        here = self._shown or self._ahead
        return (
            here is not None
            and here[0] <= moment
            and bisect_right(keys, moment) == bisect_right(keys, here[0])
        )

    def _reach(self, moment: int) -> av.VideoFrame | None:
        """The latest frame up to that time, found by decoding on; none where even the first one is later."""
        while self._shown is None or self._shown[0] != moment:
            self._ahead = self._ahead or next(self._decoded, None)
            if self._ahead is None or self._ahead[0] > moment:
                break
            self._shown, self._ahead = self._ahead, None
        return self._shown and self._shown[1]

    def _tell_sound(self, start: Fraction, stop: Fraction, first: int) -> None:
        """Packets of the first sound whose middle lies between two times after the first frame, in seconds."""
        stream = self._container.streams.audio[0]
        if not stream.time_base or not self._stream.time_base:
            raise RefusedError("unreadable")
        tick, origin = stream.time_base, first * self._stream.time_base
        self._container.seek(max(0, int((origin + start) / tick)), stream=stream)
        for packet in self._container.demux(stream):
            work_for(_PATIENCE)
            if packet.pts is None or not 0 < packet.size <= MAX_PACKET or packet.is_discard:
                continue
            begin, lasts = packet.pts * tick - origin, max(0, packet.duration or 0) * tick
            if begin + lasts / 2 >= stop:
                break
            if begin + lasts / 2 >= start:
                _say({"at": _pair(begin), "lasts": _pair(lasts)}, bytes(packet))
        _say({"end": True})


def _pair(number: Fraction) -> list[int]:
    return [number.numerator, number.denominator]


def _about(stream: av.AudioStream) -> dict[str, Any]:
    """What a copy of a sound's packets needs to be understood."""
    context = stream.codec_context
    if context is None:
        return {"sound": ""}
    codec = AUDIO.get(context.name, "")
    plain = codec != "aac" or context.profile == "LC"  # other profiles need a header of their own
    return {
        "sound": codec if plain else "",
        "rate": context.sample_rate,
        "channels": context.layout.nb_channels,
    }
