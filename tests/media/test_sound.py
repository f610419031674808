"""Audio is copied packet by packet, in time, over many segments."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

from skyloom.media.sandbox_client import AudioFormat
from skyloom.media.sound import AudioTrack
from skyloom.media.source import open_source
from skyloom.media.write import open_video

PACKET = 1024 / 48_000


def clicks(path: Path) -> list[float]:
    """When the clicks of a file are heard, in seconds."""
    heard = []
    with av.open(str(path)) as container:
        for frame in container.decode(container.streams.audio[0]):
            loud = np.abs(frame.to_ndarray()[0])
            if loud.max() > 0.2:
                heard.append(
                    frame.pts * frame.time_base + Fraction(int(loud.argmax()), frame.sample_rate)
                )
    return [
        float(time)
        for number, time in enumerate(heard)
        if not number or time - heard[number - 1] > 0.1
    ]


def packets(path: Path) -> list[bytes]:
    """The packets of a file's sound."""
    with av.open(str(path)) as container:
        return [
            bytes(packet) for packet in container.demux(container.streams.audio[0]) if packet.size
        ]


def test_a_whole_sound_is_copied_packet_by_packet(tmp_path, film):
    path = film(tmp_path / "a.mp4", count=72, sound=True)
    source = open_source(path)
    assert source.audio
    assert source.sound == AudioFormat("aac", 48_000, 2)
    with open_video(tmp_path / "b.mp4", source.fps) as writer:
        for run in source.stream():
            writer.append(run)
        assert writer.add_sound(source.sound, source.sound_packets(0, source.frames), 0)
    there, here = packets(path), packets(tmp_path / "b.mp4")
    assert len(here) >= len(there) - 2
    assert set(here) <= set(there)
    for before, after in zip(clicks(path), clicks(tmp_path / "b.mp4"), strict=True):
        assert abs(before - after) <= PACKET
    assert open_source(tmp_path / "b.mp4").frames == 72


def test_sound_stays_with_its_pictures_over_many_segments(tmp_path, film):
    source = open_source(film(tmp_path / "a.mp4", count=12 * 24, sound=True, size=(32, 32)))
    assert source.sound
    with open_video(tmp_path / "b.mp4", source.fps) as writer:
        for second in range(1, 11):  # half a second round a click
            begin, end = second * 24 + 12 - 7, second * 24 + 12 + 5
            assert writer.add_sound(source.sound, source.sound_packets(begin, end), writer.frames)
            writer.append(source.read(begin, end))
    heard = clicks(tmp_path / "b.mp4")
    assert len(heard) == 10
    for number, time in enumerate(heard):
        assert abs(time - (number * 12 + 7) / 24) <= PACKET < 1 / 24, (
            "less than a frame, and it does not grow"
        )


def test_a_range_has_the_packets_whose_middle_is_in_it(tmp_path, film):
    source = open_source(film(tmp_path / "a.mp4", count=48, sound=True))
    found = list(source.sound_packets(12, 36))
    assert abs(len(found) - 1 / PACKET) <= 1
    assert all(0 <= packet.at + packet.lasts / 2 < 1 for packet in found)
    assert [packet.at for packet in found] == sorted(packet.at for packet in found)
    whole = {packet.at: packet.data for packet in source.sound_packets(0, 48)}
    assert [packet.data for packet in found] == [
        whole[packet.at + Fraction(1, 2)] for packet in found
    ]


def test_webm_sound_goes_into_an_mp4(tmp_path, film):
    source = open_source(film(tmp_path / "a.webm", "libvpx", count=48, sound=True))
    assert source.sound == AudioFormat("opus", 48_000, 2)
    with open_video(tmp_path / "b.mp4", source.fps) as writer:
        writer.append(source.read(0, 48))
        assert writer.add_sound(source.sound, source.sound_packets(0, 48), 0)
    assert [round(time, 1) for time in clicks(tmp_path / "b.mp4")] == [0.5, 1.5]


def test_what_cannot_be_held_is_left_out_and_said(tmp_path, film):
    source = open_source(film(tmp_path / "a.mp4", count=4, sound=True))
    assert source.sound
    with open_video(tmp_path / "b.mkv", source.fps) as writer:
        writer.append(source.read(0, 4))
        assert not writer.add_sound(source.sound, source.sound_packets(0, 4), 0)
    assert not open_source(tmp_path / "b.mkv").audio
    track = AudioTrack()
    assert track.add(source.sound, [], Fraction(0))
    assert not track.add(AudioFormat("aac", 44_100, 2), [], Fraction(1))
    assert not AudioTrack().add(AudioFormat("", 0, 0), [], Fraction(0))


def test_a_silent_video_has_no_sound(tmp_path, film):
    source = open_source(film(tmp_path / "a.mp4", count=4))
    assert (source.audio, source.sound) == (False, None)
    assert list(source.sound_packets(0, 4)) == []


def test_lossless_files_hold_the_very_same_frames(tmp_path):
    for height, width in ((33, 47), (1, 1), (64, 96)):
        frames = torch.randint(0, 256, (7, height, width, 3), dtype=torch.uint8)
        with open_video(tmp_path / "a.mkv", 16) as writer:
            writer.append(frames[:3])
            writer.append(frames[3:])
            writer.receipt = {"skyloom": "0", "seed": 3}
        source = open_source(tmp_path / "a.mkv")
        assert torch.equal(source.read(0, 7), frames)
        assert (source.fps, source.receipt["seed"], source.notices) == (16, 3, ())
