"""Sandboxed decoder process: reads commands from stdin, writes frames and sound to stdout.

Without torch, network and other files. A command is a line of JSON; a reply is one or more messages
of `sandbox.py` (a JSON header and raw bytes). Errors are sent as short codes; the parent formats
the message. Exits after 3 s idle.
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

from skyloom.core.types import AUDIO_LAYOUTS, MAX_AUDIO_RATE, MIN_AUDIO_RATE
from skyloom.media.sandbox import DecoderError
from skyloom.media.sandbox_limits import (
    MAX_COMMENT,
    MAX_FRAMES,
    MAX_PACKET,
    MAX_SECONDS,
    MAX_STREAMS,
    MAX_VIDEO_PIXELS,
    PICTURE_MEMORY,
    VIDEO_MEMORY,
    confine,
    set_cpu_timeout,
)

VIDEO_CODECS = {
    *("h264", "hevc", "vp8", "vp9", "libvpx", "libvpx-vp9", "libdav1d", "av1", "ffv1", "mpeg4"),
    *("prores", "gif", "mjpeg", "png", "webp"),
}
AUDIO_CODECS = {"aac": "aac", "mp3": "mp3", "mp3float": "mp3", "opus": "opus", "libopus": "opus"}
SAMPLE_CODECS = {*AUDIO_CODECS, "vorbis", "libvorbis", "flac", "alac", "pcm_s16le"}
_PREROLL = Fraction(1, 2)  # seconds that are decoded before a range
_CPU_TIMEOUT = 10.0  # CPU seconds without progress
_IDLE_TIMEOUT = 3.0
_INDEX_TIMEOUT = 60.0
_MAX_CPU_SECONDS = 300.0  # then the process exits and the parent starts another
_PROGRESS_INTERVAL = 0.5

_TimedFrame = tuple[int, av.VideoFrame]


def main(kind: str, format_name: str, descriptor: int) -> None:
    """Serve commands about one open file until the parent is silent."""
    if kind == "picture":
        from skyloom.media import image_decode
    confine(PICTURE_MEMORY if kind == "picture" else VIDEO_MEMORY)
    file = os.fdopen(descriptor, "rb", buffering=0)
    try:
        set_cpu_timeout(_CPU_TIMEOUT)
        if kind == "picture":
            pixels = image_decode.decode_image(file, format_name)
            _send({"height": pixels.shape[0], "width": pixels.shape[1]}, pixels)
            return
        decoder = VideoDecoder(file, format_name)
        set_cpu_timeout(0)
        while (command := _next_command()) is not None:
            set_cpu_timeout(_CPU_TIMEOUT)
            decoder.run(command)
            set_cpu_timeout(0)
    except DecoderError as error:
        _send({"error": error.code, **error.values})
    except MemoryError:
        _send({"error": "memory"})
    except Exception:  # parsers raise undocumented exceptions
        _send({"error": "unreadable"})


def _next_command() -> dict[str, Any] | None:
    """Read a command; None if the parent closed its end or the idle or CPU limit is reached."""
    if time.process_time() > _MAX_CPU_SECONDS or not select.select([0], [], [], _IDLE_TIMEOUT)[0]:
        return None
    line = b""
    while not line.endswith(b"\n"):
        chunk = os.read(0, 2**16)
        if not chunk:
            return None
        line += chunk
    return json.loads(line)


def _send(header: Mapping[str, Any], payload: np.ndarray | bytes = b"") -> None:
    """Write a message: header length, header, payload. The CPU timeout is off meanwhile."""
    set_cpu_timeout(0)
    if isinstance(payload, bytes):
        raw = memoryview(payload)
    else:
        raw = np.ascontiguousarray(payload).data.cast("B")
    text = json.dumps({**header, "bytes": len(raw)}).encode()
    for data in (struct.pack(">I", len(text)) + text, raw):
        view = memoryview(data)
        while view:
            view = view[os.write(1, view) :]
    set_cpu_timeout(_CPU_TIMEOUT)


class VideoDecoder:
    """Index and exact frame access of a video file.

    A frame is the same after a seek as when decoding from the start.
    """

    def __init__(self, file: BinaryIO, demuxer: str) -> None:
        self._file = file
        self._demuxer = demuxer
        self._restart()

    def run(self, command: Mapping[str, Any]) -> None:
        """Run a command of sandbox_client.py and send its reply."""
        if command["command"] == "index":
            self._send_index()
        elif command["command"] == "audio":
            start = Fraction(*command["start"])
            self._send_audio(start, Fraction(*command["stop"]), command["origin"])
        elif command["command"] == "samples":
            start = Fraction(*command["start"])
            self._send_samples(start, Fraction(*command["stop"]), command["origin"])
        else:
            self._send_frames(command["times"], command["keys"], tuple(command["size"]))

    def _restart(self) -> None:
        """Open the file at its start."""
        self._file.seek(0)
        options = {
            "protocol_whitelist": "none",
            "format_whitelist": self._demuxer,
            "max_streams": str(MAX_STREAMS + 1),
            "max_pixels": str(MAX_VIDEO_PIXELS),
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
        self._stream = self._choose_stream()
        self._decoded = self._frames()
        self._current: _TimedFrame | None = None
        self._next: _TimedFrame | None = None

    def _choose_stream(self) -> av.VideoStream:
        """Return the first video stream that is no cover picture; check codec and size."""
        if len(self._container.streams) > MAX_STREAMS:
            raise DecoderError("too many streams", maximum=MAX_STREAMS)
        streams = [
            stream
            for stream in self._container.streams.video
            if not stream.disposition & Disposition.attached_pic
        ]
        if not streams:
            raise DecoderError("no video")
        context = streams[0].codec_context
        if context is None or context.name not in VIDEO_CODECS:
            raise DecoderError("codec")
        if context.width * context.height > MAX_VIDEO_PIXELS:
            raise DecoderError(
                "too large",
                width=context.width,
                height=context.height,
                maximum=MAX_VIDEO_PIXELS // 10**6,
            )
        context.thread_count = 1
        return streams[0]

    def _frames(self) -> Iterator["_TimedFrame"]:
        """Yield frames with their times in ticks, in presentation order."""
        reached = 0
        try:
            for frame in self._container.decode(self._stream):
                set_cpu_timeout(_CPU_TIMEOUT)
                pts = frame.pts if frame.pts is not None else frame.dts
                if pts is not None:
                    reached = pts
                    yield pts, frame
        except FFmpegError as error:
            seconds = float(reached * (self._stream.time_base or 0))
            raise DecoderError("damaged", seconds=seconds) from error

    def _send_index(self) -> None:
        """Send the index: times from all packets, size and rotation from the first frame."""
        times, keys, last = self._scan()
        self._restart()
        self._next = next(self._decoded, None)
        if self._next is None or self._next[0] > times[-1]:
            raise DecoderError("no video")
        start, first = self._next
        times = times[bisect_left(times, start) :]  # earlier packets are only needed to decode
        stream = self._stream
        rates = [stream.average_rate, stream.base_rate, stream.guessed_rate]
        audio = self._container.streams.audio
        header = {
            "height": first.height,
            "width": first.width,
            "turn": round(first.rotation / 90) % 4,
            "tick": _pair(stream.time_base or Fraction(1, 1000)),
            "rates": [_pair(rate) for rate in rates if rate],
            "last": last,
            "aspect": _pair(stream.sample_aspect_ratio or Fraction(1)),
            **(_audio_header(audio[0]) if audio else {}),
        }
        _send(header, np.array(times, dtype="<i8"))
        _send({}, np.array(keys, dtype="<i8"))
        metadata = {key.lower(): value for key, value in self._container.metadata.items()}
        comment = metadata.get("comment", "").encode()
        _send({}, comment if len(comment) <= MAX_COMMENT else b"")

    def _scan(self) -> tuple[list[int], list[int], int]:
        """Return the times of frames and key frames, and the last duration (0: unknown).

        Reads the packets without decoding them.
        """
        durations: dict[int, int] = {}
        keys: set[int] = set()
        started = time.monotonic()
        reported = started
        for packet in self._container.demux(self._stream):
            pts = packet.pts if packet.pts is not None else packet.dts
            if pts is None or not packet.size or packet.is_discard or self._is_hidden(packet):
                continue
            durations[pts] = packet.duration or 0
            if packet.is_keyframe:
                keys.add(pts)
            if len(durations) > MAX_FRAMES:
                raise DecoderError("too many frames", maximum=MAX_FRAMES)
            now = time.monotonic()
            if now - reported > _PROGRESS_INTERVAL:
                if now - started > _INDEX_TIMEOUT:
                    raise DecoderError("slow")
                reported = now
                _send({"progress": len(durations)})
        if not durations:
            raise DecoderError("no video")
        times = sorted(durations)
        tick = self._stream.time_base or Fraction(1, 1000)
        if (times[-1] - times[0]) * tick > MAX_SECONDS:
            raise DecoderError("too long", hours=MAX_SECONDS // 3600)
        return times, sorted(keys), max(0, durations[times[-1]])

    def _is_hidden(self, packet: av.Packet) -> bool:
        """Return whether a VP8 packet is an invisible reference frame (a packet of its own)."""
        is_vp8 = self._stream.codec_context.name in {"vp8", "libvpx"}
        return is_vp8 and not memoryview(packet)[0] & 0x10

    def _send_frames(self, times: list[int], keys: list[int], size: tuple[int, int]) -> None:
        """Send the frames at rising times, upright RGB; `keys` are key frame times before them."""
        for moment in times:
            frame = self._frame_at(moment, keys)
            if (frame.height, frame.width) != size:
                raise DecoderError("sizes")
            pixels = frame.to_ndarray(format="rgb24", threads=1)
            _send({}, np.rot90(pixels, round(frame.rotation / 90)))

    def _frame_at(self, moment: int, keys: list[int]) -> av.VideoFrame:
        """Return the latest frame at or before a time of the index, as a player shows it."""
        if self._is_ahead(moment, keys) and (found := self._decode_until(moment)):
            return found
        step = 1
        position = bisect_right(keys, moment) - 1
        while position >= 0 and self._demuxer != "gif":  # gif frames depend on all before them
            if self._seek(keys[position]) and (found := self._decode_until(moment)):
                return found
            position -= step
            step *= 2
        self._restart()
        if found := self._decode_until(moment):
            return found
        raise DecoderError("damaged", seconds=float(moment * (self._stream.time_base or 0)))

    def _seek(self, key: int) -> bool:
        """Seek to a key frame; False if it cannot be decoded alone (periodic intra refresh)."""
        self._container.seek(key, stream=self._stream)
        self._decoded = self._frames()
        self._current = None
        self._next = next(self._decoded, None)
        return self._next is not None and self._next[1].pict_type == PictureType.I

    def _is_ahead(self, moment: int, keys: list[int]) -> bool:
        """Return whether no key frame lies between the current position and a later time."""
        here = self._current or self._next
        if here is None or here[0] > moment:
            return False
        return bisect_right(keys, moment) == bisect_right(keys, here[0])

    def _decode_until(self, moment: int) -> av.VideoFrame | None:
        """Decode forward to the latest frame at or before a time; None if all frames are later."""
        while self._current is None or self._current[0] != moment:
            self._next = self._next or next(self._decoded, None)
            if self._next is None or self._next[0] > moment:
                break
            self._current = self._next
            self._next = None
        return self._current and self._current[1]

    def _send_audio(self, start: Fraction, stop: Fraction, first_pts: int) -> None:
        """Send packets of the first audio stream whose midpoint is in [start, stop) seconds.

        Time 0 is that of the first video frame.
        """
        stream = self._container.streams.audio[0]
        if not stream.time_base or not self._stream.time_base:
            raise DecoderError("unreadable")
        tick = stream.time_base
        origin = first_pts * self._stream.time_base
        self._container.seek(max(0, int((origin + start) / tick)), stream=stream)
        for packet in self._container.demux(stream):
            set_cpu_timeout(_CPU_TIMEOUT)
            if packet.pts is None or not 0 < packet.size <= MAX_PACKET or packet.is_discard:
                continue
            at = packet.pts * tick - origin
            lasts = max(0, packet.duration or 0) * tick
            if at + lasts / 2 >= stop:
                break
            if at + lasts / 2 >= start:
                _send({"at": _pair(at), "lasts": _pair(lasts)}, bytes(packet))
        _send({"end": True})

    def _send_samples(self, start: Fraction, stop: Fraction, first_pts: int) -> None:
        """Send decoded sound of [start, stop) seconds: float32 [n channels], and index of each run.

        Sample 0 is at the time of the first video frame. Runs rise and do not overlap; what is
        between them is silent. Matroska rounds its times, so a seek would not be exact.
        """
        stream = self._container.streams.audio[0]
        if stream.codec_context is None or stream.codec_context.name not in SAMPLE_CODECS:
            raise DecoderError("sound")
        if not stream.time_base or not self._stream.time_base:
            raise DecoderError("unreadable")
        origin = first_pts * self._stream.time_base
        if self._demuxer == "mov" and start > _PREROLL:
            seconds = origin + start - _PREROLL
            self._container.seek(int(seconds / stream.time_base), stream=stream)
        reached = None
        reported = time.monotonic()
        for begin, samples, rate in self._samples(stream, origin):
            if reached is None:
                reached = int(start * rate // 1)
            end = min(begin + len(samples), int(stop * rate // 1))
            if begin > end:
                break
            if end > reached:
                first = max(begin, reached)
                header = {"at": first, "rate": rate, "channels": samples.shape[1]}
                _send(header, samples[first - begin : end - begin])
                reached = end
            elif time.monotonic() - reported > _PROGRESS_INTERVAL:
                reported = time.monotonic()
                _send({"progress": begin})
        context = stream.codec_context
        _send({"end": True, "rate": context.sample_rate, "channels": context.channels})

    def _samples(
        self, stream: av.AudioStream, origin: Fraction
    ) -> Iterator[tuple[int, np.ndarray, int]]:
        """Yield the index of the first sample, the samples [n channels] and the rate.

        A time within two ticks of the end of the previous frame, or of 0, is rounding.
        """
        tick = stream.time_base or Fraction(1, 1000)
        form = None
        position = 0
        try:
            for frame in self._container.decode(stream):
                set_cpu_timeout(_CPU_TIMEOUT)
                if frame.pts is None or not frame.samples:
                    continue
                samples = _float_samples(frame)
                form = form or (frame.sample_rate, samples.shape[1])
                if form != (frame.sample_rate, samples.shape[1]) or not _is_supported(*form):
                    raise DecoderError("sound")
                moment = round((frame.pts * (frame.time_base or tick) - origin) * form[0])
                if abs(moment - position) > 2 * tick * form[0]:
                    position = moment
                yield position, samples, form[0]
                position += len(samples)
        except FFmpegError as error:
            seconds = float(max(0, position) / form[0]) if form else 0.0
            raise DecoderError("damaged", seconds=seconds) from error


def _is_supported(rate: int, channels: int) -> bool:
    return MIN_AUDIO_RATE <= rate <= MAX_AUDIO_RATE and channels in AUDIO_LAYOUTS


def _float_samples(frame: av.AudioFrame) -> np.ndarray:
    """Convert a frame of integers or floats, planar or packed, to float32 [n channels]."""
    samples = frame.to_ndarray()
    channels = frame.layout.nb_channels
    samples = samples.T if frame.format.is_planar else samples.reshape(-1, channels)
    if samples.dtype.kind == "i":
        return samples.astype(np.float32) / np.float32(2 ** (8 * samples.dtype.itemsize - 1))
    return samples.astype(np.float32)


def _pair(number: Fraction) -> list[int]:
    return [number.numerator, number.denominator]


def _audio_header(stream: av.AudioStream) -> dict[str, Any]:
    """Return codec, rate and channels of an audio stream; codec "" if it cannot be copied."""
    context = stream.codec_context
    if context is None:
        return {"sound": ""}
    codec = AUDIO_CODECS.get(context.name, "")
    if codec == "aac" and context.profile != "LC":  # other profiles need an extra header
        codec = ""
    channels = context.layout.nb_channels
    return {"sound": codec, "rate": context.sample_rate, "channels": channels}
