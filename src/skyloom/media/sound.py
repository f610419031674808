"""Copy encoded audio packets from sources into an mp4, without decoding.

Packet times are computed from the start frame of each segment on the clock of the video, so errors
do not add up: audio and video differ by less than one packet (about 20 ms) after any number of
segments.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import av
from av.container import OutputContainer

from skyloom.media.sandbox_client import AudioFormat, AudioPacket

_ENCODERS = {"aac": "aac", "mp3": "libmp3lame", "opus": "libopus"}
_LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1"}


@dataclass(frozen=True, eq=False)
class AudioSegment:
    """Packets that start at a time of the output video, in seconds."""

    at: Fraction
    packets: Iterable[AudioPacket]


class AudioTrack:
    """Audio of an output file: segments of one format, in order; packets are read when written."""

    def __init__(self) -> None:
        self.sound: AudioFormat | None = None
        self._segments: list[AudioSegment] = []

    def add(self, sound: AudioFormat, packets: Iterable[AudioPacket], at: Fraction) -> bool:
        """Add a segment; False if its format is unsupported or differs from the first segment's."""
        supported = sound.codec in _ENCODERS and sound.channels in _LAYOUTS
        if not supported or sound != (self.sound or sound):
            return False
        self.sound = sound
        self._segments.append(AudioSegment(at, packets))
        return True

    def open(self, container: OutputContainer) -> Iterator[tuple[Fraction, av.Packet]]:
        """Add the audio stream to a container and return its packets with start times in seconds.

        The encoder of the stream is used for its header only.
        """
        if self.sound is None:
            return iter(())
        rate = self.sound.rate
        layout = _LAYOUTS[self.sound.channels]
        stream = container.add_stream(_ENCODERS[self.sound.codec], rate=rate, layout=layout)
        assert isinstance(stream, av.AudioStream)
        return self._packets(stream, rate)

    def _packets(self, stream: av.AudioStream, rate: int) -> Iterator[tuple[Fraction, av.Packet]]:
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
