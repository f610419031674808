"""Sound of an output file: packets copied from sources, and samples that are encoded.

Generated samples wait in a temporary file. When the video file is written, they are encoded into
the format of the copied packets and fill the time between them. Sources of several formats, or of
a format that the file cannot hold, are decoded and encoded again together with the samples.

Times are computed from the start of each segment on the clock of the video, so errors do not add
up: audio and video differ by less than one packet (about 20 ms) after any number of segments.
"""

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
from av.audio.resampler import AudioResampler
from av.container import OutputContainer
from jaxtyping import Float
from torch import Tensor

from skyloom.core.audio import Audio, samples_at
from skyloom.core.errors import MediaError
from skyloom.core.types import AUDIO_LAYOUTS
from skyloom.media.sandbox_client import AudioFormat, AudioPacket

ENCODED_AGAIN = (
    "sound of the sources was encoded again: it has several formats, or the file needs another"
)
_COPY_ENCODERS = {"aac": "aac", "mp3": "libmp3lame", "opus": "libopus"}
_FILE_CODECS = {".mp4": "aac", ".webm": "opus", ".mkv": "flac"}
_ENCODERS = {**_COPY_ENCODERS, "flac": "flac"}
_DEFAULT_RATE = 48_000
_BIT_RATE = 96_000  # per channel
_TimedPacket = tuple[Fraction, av.Packet]


@dataclass(frozen=True, eq=False)
class AudioSegment:
    """Sound that starts at a time of the output video, in seconds: packets, and decoded pieces."""

    at: Fraction
    packets: Iterable[AudioPacket]
    decoded: Iterable[Audio] | None = None


class SampleFile:
    """Samples in a temporary file, appended in pieces of one rate and number of channels."""

    def __init__(self, folder: Path, rate: int, channels: int) -> None:
        self.rate = rate
        self.channels = channels
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, see close
        self._count = 0

    def append(self, audio: Audio) -> None:
        """Append samples. Raises MediaError for another rate or number of channels."""
        check_same_format(audio, self.rate, self.channels)
        self._file.seek(self._count * self._frame_bytes)
        self._file.write(to_pcm(audio.samples).T.tobytes())
        self._count += audio.samples.shape[1]

    def read(self, start: int, stop: int) -> Iterator[Float[np.ndarray, "c n"]]:
        """Yield samples [start, stop) in pieces of a second, silent after the last one."""
        for begin in range(start, stop, self.rate):
            end = min(begin + self.rate, stop)
            self._file.seek(begin * self._frame_bytes)
            data = self._file.read(max(0, min(end, self._count) - begin) * self._frame_bytes)
            samples = np.zeros((end - begin, self.channels), np.float32)
            samples.reshape(-1)[: len(data) // 4] = np.frombuffer(data, np.float32)
            yield samples.T

    def close(self) -> None:
        """Delete the file."""
        self._file.close()

    @property
    def _frame_bytes(self) -> int:
        return 4 * self.channels


class AudioTrack:
    """Sound of an output file: copied segments in order, and samples that start at time 0.

    `notices` describe what was done to the sound of the sources.
    """

    def __init__(self, suffix: str = ".mp4", folder: Path | None = None) -> None:
        self.sound: AudioFormat | None = None
        self.notices: list[str] = []
        self._codec = _FILE_CODECS.get(suffix)
        self._copies = suffix == ".mp4"
        self._folder = folder or Path(tempfile.gettempdir())
        self._segments: list[AudioSegment] = []
        self._samples: SampleFile | None = None

    def add(
        self,
        sound: AudioFormat | None,
        packets: Iterable[AudioPacket],
        at: Fraction,
        decoded: Iterable[Audio] | None = None,
    ) -> bool:
        """Add a segment; return False if the file cannot hold it.

        Packets are copied if the file is an mp4 and all segments have one supported format;
        otherwise `decoded`, the same sound as samples, is encoded, if all segments have it.
        """
        segment = AudioSegment(at, packets, decoded)
        copied = self._copies and _is_copyable(sound) and sound == (self.sound or sound)
        if not copied and not self._encode_again(segment):
            return False
        self.sound = sound if copied else None
        self._segments.append(segment)
        return True

    def add_samples(self, audio: Audio) -> bool:
        """Append generated samples; return False if the file holds no sound."""
        if self._codec is None:
            return False
        if self._samples is None:
            self._samples = SampleFile(self._folder, audio.rate, audio.channels)
        self._samples.append(audio)
        return True

    def open(self, container: OutputContainer, seconds: Fraction) -> Iterator[_TimedPacket]:
        """Add the audio stream to a container and return its packets with start times in seconds.

        Generated samples are cut, or padded with silence, to `seconds`.
        """
        if self._segments and self.sound is not None:
            stream = _add_stream(container, self.sound.codec, self.sound.rate, self.sound.channels)
            copied = self._packets(stream, self.sound.rate)
            return copied if self._samples is None else self._fill(copied, stream, seconds)
        if self._segments or self._samples is not None:
            return self._encode(container, seconds)
        return iter(())

    def close(self) -> None:
        """Delete the samples."""
        if self._samples is not None:
            self._samples.close()

    def _encode_again(self, segment: AudioSegment) -> bool:
        """Stop copying packets, if all segments can be decoded."""
        if self._codec is None or any(one.decoded is None for one in (*self._segments, segment)):
            return False
        self._copies = False
        self.notices = [ENCODED_AGAIN]
        return True

    def _packets(self, stream: av.AudioStream, rate: int) -> Iterator[_TimedPacket]:
        """Yield the copied packets. The encoder of the stream is used for its header only."""
        last = -1
        for segment in self._segments:
            for source in segment.packets:
                last = max(last + 1, round((segment.at + source.at) * rate))
                packet = av.Packet(source.data)
                packet.stream = stream
                packet.time_base = Fraction(1, rate)
                packet.pts = packet.dts = last
                packet.duration = round(source.lasts * rate)
                packet.is_keyframe = True
                yield Fraction(last, rate), packet

    def _fill(
        self, copied: Iterator[_TimedPacket], stream: av.AudioStream, seconds: Fraction
    ) -> Iterator[_TimedPacket]:
        """Yield copied packets, and encoded ones whose midpoint is in none of them."""
        assert self._samples is not None
        pieces = self._samples.read(0, samples_at(seconds, self._samples.rate))
        encoder = SoundEncoder(stream, self._samples.rate)
        generated = encoder.encode_all(pieces)
        waiting = next(generated, None)
        free_from = Fraction(-1)
        for at, packet in copied:
            while waiting is not None and _midpoint(waiting) < at:
                if _midpoint(waiting) >= free_from:
                    yield waiting
                waiting = next(generated, None)
            yield at, packet
            free_from = at + _lasts(packet)
        while waiting is not None:
            if _midpoint(waiting) >= free_from:
                yield waiting
            waiting = next(generated, None)

    def _encode(self, container: OutputContainer, seconds: Fraction) -> Iterator[_TimedPacket]:
        """Encode generated samples and decoded segments; where both exist, a segment is heard."""
        if self._samples is not None:
            rate, channels = self._samples.rate, self._samples.channels
        else:
            rate, channels = _DEFAULT_RATE, len("lr")
            self._samples = SampleFile(self._folder, rate, channels)
        assert self._codec is not None
        stream = _add_stream(container, self._codec, rate, channels)
        pieces = self._mix(self._samples, samples_at(seconds, rate))
        return SoundEncoder(stream, rate).encode_all(pieces)

    def _mix(self, generated: SampleFile, count: int) -> Iterator[Float[np.ndarray, "c n"]]:
        """Yield `count` samples: decoded segments, and generated samples between them."""
        rate = generated.rate
        starts = [min(count, samples_at(segment.at, rate)) for segment in self._segments]
        position = 0
        for segment, (start, end) in zip(self._segments, pairwise([*starts, count]), strict=True):
            yield from generated.read(position, start)
            position = max(position, start)
            for piece in _converted(segment.decoded or (), rate, generated.channels):
                samples = piece[:, : max(0, end - position)]
                position += samples.shape[1]
                if samples.shape[1]:
                    yield samples
                if position >= end:
                    break
        yield from generated.read(position, count)


class SoundEncoder:
    """Encodes consecutive samples of a rate for an audio stream; the first is at time 0."""

    def __init__(self, stream: av.AudioStream, rate: int) -> None:
        self._stream = stream
        self._rate = rate
        self.count = 0

    def encode(self, samples: Float[np.ndarray, "c n"]) -> Iterator[_TimedPacket]:
        """Yield the packets that the next samples complete, with their start times in seconds."""
        frame = _to_frame(samples, self._rate)
        frame.pts = self.count
        self.count += samples.shape[1]
        return _timed(self._stream.encode(frame))

    def flush(self) -> Iterator[_TimedPacket]:
        """Yield the last packets."""
        return _timed(self._stream.encode(None))

    def encode_all(self, pieces: Iterable[Float[np.ndarray, "c n"]]) -> Iterator[_TimedPacket]:
        """Yield the packets of all pieces."""
        for piece in pieces:
            yield from self.encode(piece)
        yield from self.flush()


def add_file_stream(container: OutputContainer, suffix: str, audio: Audio) -> av.AudioStream:
    """Add an audio stream for samples like `audio` in the codec of a file type."""
    return _add_stream(container, _FILE_CODECS[suffix], audio.rate, audio.channels)


def check_same_format(audio: Audio, rate: int, channels: int) -> None:
    """Raise MediaError if the rate or number of channels changes within one sound."""
    if (audio.rate, audio.channels) != (rate, channels):
        raise MediaError(
            f"All sound of a video must have {channels} channels at {rate} Hz, "
            f"got {audio.channels} at {audio.rate} Hz."
        )


def to_pcm(samples: Float[Tensor, "c n"]) -> Float[np.ndarray, "c n"]:
    """Return samples as an array, clamped to [-1, 1]."""
    return samples.detach().cpu().clamp(-1, 1).numpy()


def _add_stream(container: OutputContainer, codec: str, rate: int, channels: int) -> av.AudioStream:
    """Add an audio stream; its encoder converts to a rate that the codec supports."""
    encoder = _ENCODERS[codec]
    rates = av.Codec(encoder, "w").audio_rates
    if codec == "opus" or (rates and rate not in rates):  # FFmpeg shifts Opus of other rates
        rate = _DEFAULT_RATE
    options = {"aac_pns": "0"} if codec == "aac" else {}  # its noise differs after a seek
    layout = AUDIO_LAYOUTS[channels]
    stream = container.add_stream(encoder, rate=rate, options=options, layout=layout)
    assert isinstance(stream, av.AudioStream)
    if codec == "flac":
        stream.codec_context.format = av.AudioFormat("s32")  # 24 bits
    else:
        stream.bit_rate = _BIT_RATE * channels
    return stream


def _is_copyable(sound: AudioFormat | None) -> bool:
    return sound is not None and sound.codec in _COPY_ENCODERS and sound.channels in AUDIO_LAYOUTS


def _converted(
    pieces: Iterable[Audio], rate: int, channels: int
) -> Iterator[Float[np.ndarray, "c n"]]:
    """Convert consecutive pieces of sound to a rate and number of channels."""
    resampler = AudioResampler("fltp", AUDIO_LAYOUTS[channels], rate)
    frame = None
    position = 0
    for piece in pieces:
        if piece.samples.shape[1]:
            frame = _to_frame(to_pcm(piece.samples), piece.rate)
            frame.pts = position
            position += piece.samples.shape[1]
            yield from (one.to_ndarray() for one in resampler.resample(frame))
    if frame is not None:
        yield from (one.to_ndarray() for one in resampler.resample(None))


def _to_frame(samples: Float[np.ndarray, "c n"], rate: int) -> av.AudioFrame:
    layout = AUDIO_LAYOUTS[samples.shape[0]]
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), "fltp", layout)
    frame.sample_rate = rate
    frame.time_base = Fraction(1, rate)
    return frame


def _timed(packets: Iterable[av.Packet]) -> Iterator[_TimedPacket]:
    for packet in packets:
        assert packet.pts is not None
        yield packet.pts * packet.time_base, packet


def _lasts(packet: av.Packet) -> Fraction:
    return (packet.duration or 0) * packet.time_base


def _midpoint(timed: _TimedPacket) -> Fraction:
    return timed[0] + _lasts(timed[1]) / 2
