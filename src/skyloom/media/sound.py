"""AudioFormat that is copied, packet by packet, from a source into an mp4: nothing is decoded and nothing is lost.

Every packet's time is counted from the frame its segment begins with, on the video's own clock, so that joints do not
add up: after any number of segments sound and picture are apart by less than one packet, about 20 ms.
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
class Segment:
    """A run of packets that begins at a time of the video, in seconds."""

    at: Fraction
    packets: Iterable[AudioPacket]


class AudioTrack:
    """The sound of a file that is being written: segments of one kind, in order. The packets are read at the end."""

    def __init__(self) -> None:
        self.sound: AudioFormat | None = None
        self._segments: list[Segment] = []

    def add(self, sound: AudioFormat, packets: Iterable[AudioPacket], at: Fraction) -> bool:
        """Take a segment; false where it is of another kind than the first, or of none that is known."""
        known = sound.codec in _ENCODERS and sound.channels in _LAYOUTS
        if not known or sound != (self.sound or sound):
            return False
        self.sound = sound
        self._segments.append(Segment(at, packets))
        return True

    def open(self, container: OutputContainer) -> Iterator[tuple[Fraction, av.Packet]]:
        """A stream for it in a file, and its packets with the times at which they play, in seconds.

        The stream's encoder is never asked for a packet: it is there for the header that describes them.
        """
        if self.sound is None:
            return iter(())
        rate = self.sound.rate
        stream = container.add_stream(
            _ENCODERS[self.sound.codec], rate=rate, layout=_LAYOUTS[self.sound.channels]
        )
        assert isinstance(stream, av.AudioStream)
        return self._packets(stream, rate)

    def _packets(self, stream: av.AudioStream, rate: int) -> Iterator[tuple[Fraction, av.Packet]]:
        last = -1
        for segment in self._segments:
            for found in segment.packets:
                last = max(last + 1, round((segment.at + found.at) * rate))
                packet = av.Packet(found.data)
                packet.stream, packet.time_base = stream, Fraction(1, rate)
                packet.pts = packet.dts = last
                packet.duration, packet.is_keyframe = round(found.lasts * rate), True
                yield Fraction(last, rate), packet
