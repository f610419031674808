"""Generated sound: written with the frames, read back at the same time, mixed with copied sound."""

import io
import math
import tracemalloc
import weakref
from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
import pytest
import torch

from skyloom.core.audio import Audio, samples_at
from skyloom.core.errors import MediaError, RequestError
from skyloom.media import source as source_module
from skyloom.media.sandbox_client import AudioFormat
from skyloom.media.sound import ENCODED_AGAIN
from skyloom.media.source import open_source
from skyloom.media.video import Video
from skyloom.media.write import open_pipe, open_video, write_video

FPS = Fraction(16)
COUNT = 37
SECONDS = COUNT / FPS
AUDIO_FRAME = Fraction(1024, 16_000)  # the longest of the tests


def tones(seconds, rate, channels=2, pitch=440):
    """Sweeps, another one in each channel: no shift of one looks like itself. 5.1 has a low LFE."""
    time = torch.arange(samples_at(Fraction(seconds), rate), dtype=torch.float64) / rate
    pitches = [pitch * (1 + channel) for channel in range(channels)]
    if channels == 6:
        pitches[3] = 40
    rise = [min(150, one / 16) for one in pitches]
    sweeps = [
        torch.sin(math.tau * (one + more * time) * time)
        for one, more in zip(pitches, rise, strict=True)
    ]
    return Audio((0.5 * torch.stack(sweeps)).float(), rate)


def blank(count=COUNT, size=32):
    return torch.zeros(count, size, size, 3, dtype=torch.uint8)


def at_rate(audio, rate):
    """Samples at another rate by linear interpolation."""
    moments = np.arange(samples_at(audio.seconds, rate)) / rate
    known = np.arange(audio.samples.shape[1]) / audio.rate
    rows = [np.interp(moments, known, row) for row in audio.samples.numpy()]
    return torch.from_numpy(np.stack(rows)).float()


def correlation(before, after):
    """Smallest correlation over the channels, at equal times."""
    assert before.channels == after.channels
    after = at_rate(after, before.rate)
    count = min(before.samples.shape[1], after.shape[1])
    return min(
        float(torch.corrcoef(torch.stack([one[:count], other[:count]]))[0, 1])
        for one, other in zip(before.samples, after, strict=True)
    )


def lag(before, after):
    """Samples by which the first channel of `after` is late."""
    one, other = before.samples[0], at_rate(after, before.rate)[0]
    size = 2 * max(len(one), len(other))
    product = torch.fft.rfft(other, size) * torch.fft.rfft(one, size).conj()
    best = int(torch.fft.irfft(product, size).argmax())
    return best - size if best > size // 2 else best


def ends(path):
    """End of the last packet of each stream in seconds; one without a duration is a frame."""
    with av.open(str(path)) as container:
        ends = dict.fromkeys((stream.type for stream in container.streams), Fraction(0))
        for packet in container.demux():
            if packet.pts is not None and packet.size:
                lasts = packet.duration * packet.time_base or 1 / FPS
                end = packet.pts * packet.time_base + lasts
                ends[packet.stream.type] = max(ends[packet.stream.type], end)
    return ends


def video_packets(path):
    with av.open(str(path)) as container:
        return [
            (packet.pts, packet.dts, bytes(packet))
            for packet in container.demux(container.streams.video[0])
        ]


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".mkv"])
@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_sound_survives_the_file_in_time(tmp_path, suffix, rate, channels):
    sound = tones(SECONDS, rate, channels)
    video = Video(blank(), FPS, {"skyloom": "0"}, sound)
    path = video.save(tmp_path / f"a{suffix}")
    source = open_source(path)
    back = source.read_audio()
    assert back is not None
    assert back.seconds == Fraction(samples_at(SECONDS, back.rate), back.rate)
    assert (back.rate, back.channels) == (48_000 if suffix == ".webm" else rate, channels)
    assert correlation(sound, back) > 0.99
    assert abs(lag(sound, back)) <= 1
    assert (source.frames, source.fps, source.has_sound) == (COUNT, FPS, True)
    assert source.receipt == {"skyloom": "0"}
    finished = ends(path)
    assert abs(finished["audio"] - SECONDS) <= AUDIO_FRAME
    assert abs(finished["video"] - SECONDS) <= Fraction(1, 500)


def test_a_lossless_file_holds_the_samples_to_24_bits(tmp_path):
    sound = tones(SECONDS, 44_100)
    path = write_video(blank(), FPS, tmp_path / "a.mkv", audio=sound)
    back = open_source(path).read_audio()
    assert (back.samples - sound.samples).abs().max() <= 2**-23


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".mkv"])
def test_frames_are_the_same_with_and_without_sound(tmp_path, suffix):
    frames = (torch.rand(COUNT, 32, 48, 3) * 255).to(torch.uint8)
    silent = write_video(frames, FPS, tmp_path / f"a{suffix}")
    heard = write_video(frames, FPS, tmp_path / f"b{suffix}", audio=tones(SECONDS, 48_000))
    assert torch.equal(open_source(silent).read(), open_source(heard).read())
    assert [data for _, _, data in video_packets(silent)] == [
        data for _, _, data in video_packets(heard)
    ]
    assert set(ends(silent)) == {"video"}
    assert open_source(silent).read_audio() is None


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".mkv"])
def test_sound_is_cut_or_padded_to_the_frames(tmp_path, suffix):
    for seconds in (SECONDS / 3, 2 * SECONDS):
        sound = tones(seconds, 48_000)
        path = write_video(blank(), FPS, tmp_path / f"a{suffix}", audio=sound)
        assert abs(ends(path)["audio"] - SECONDS) <= AUDIO_FRAME
        back = open_source(path).read_audio()
        assert correlation(sound, back) > 0.99
        rest = back.slice(seconds + AUDIO_FRAME, SECONDS).samples if seconds < SECONDS else None
        assert rest is None or (rest.numel() and rest.abs().max() < 1e-3)


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".mkv"])
def test_a_range_is_the_same_as_in_the_whole(tmp_path, suffix):
    fps = Fraction(24_000, 1001)
    path = write_video(blank(120), fps, tmp_path / f"a{suffix}", audio=tones(120 / fps, 44_100))
    source = open_source(path)
    whole = source.read_audio()
    bounds = [0, 7, 50, 51, 101, 120]
    pieces = [source.read_audio(start, stop) for start, stop in pairwise(bounds)]
    assert torch.equal(Audio.concatenate(pieces).samples, whole.samples)


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".mkv"])
def test_long_sound_is_written_and_read_in_constant_memory(tmp_path, suffix):
    def peak(seconds):
        fps = 2
        pieces = []
        tracemalloc.start()
        with open_video(tmp_path / f"a{suffix}", fps) as writer:
            for second in range(seconds):
                samples = tones(1, 48_000, pitch=200 + second).samples
                pieces.append(weakref.ref(samples))
                writer.add_audio(samples, 48_000)
                writer.append(blank(fps, 16))
                del samples
                assert sum(piece() is not None for piece in pieces) <= 1
        held = 0
        count = 0
        for piece in open_source(tmp_path / f"a{suffix}").stream_audio():
            held = max(held, piece.samples.nbytes)
            count += piece.samples.shape[1]
        assert count == 48_000 * seconds
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used + held

    peak(1)  # imports
    short = peak(5)
    assert peak(60) < short + 200_000  # less than a second of sound


def test_a_gif_drops_sound_and_says_so(tmp_path):
    with pytest.warns(UserWarning, match=r"a \.gif holds none"):
        Video(blank(), FPS, audio=tones(1, 48_000)).save(tmp_path / "a.gif")
    with open_video(tmp_path / "b.gif", FPS) as writer:
        writer.append(blank())
        assert not writer.add_audio(tones(1, 48_000).samples, 48_000)
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()


def test_sound_that_changes_its_format_is_refused(tmp_path):
    with (
        pytest.raises(MediaError, match="2 channels at 48000 Hz, got 1 at 48000"),
        open_video(tmp_path / "a.mp4", FPS) as writer,
    ):
        writer.append(blank())
        writer.add_audio(tones(1, 48_000).samples, 48_000)
        writer.add_audio(tones(1, 48_000, 1).samples, 48_000)
    assert not list(tmp_path.iterdir())


def test_a_notebook_plays_sound():
    heard = Video(blank(), FPS, audio=tones(1, 48_000))
    assert "muted" not in heard._repr_html_()
    assert "muted" in Video(blank(), FPS)._repr_html_()
    assert repr(heard) == "Video(37 frames of 32x32, 16 fps, with sound)"


@pytest.mark.parametrize("ahead", [Fraction(0), Fraction(1), Fraction(-1, 8)])
def test_a_player_at_a_pipe_hears_the_sound(tmp_path, ahead):
    frames = blank(100)
    sound = tones(100 / FPS, 48_000)
    pipe = io.BytesIO()
    lengths = []
    with open_pipe(pipe, FPS) as writer:
        heard = Fraction(0)
        for start in range(0, 100, 10):
            until = (start + 10) / FPS + ahead
            piece = sound.slice(heard, until)
            heard = until
            assert writer.add_audio(piece.samples, 48_000)
            writer.append(frames[start : start + 10])
            lengths.append(pipe.tell())
    assert lengths[-2] > lengths[4] > 0
    path = tmp_path / "a.mp4"
    path.write_bytes(pipe.getvalue())
    source = open_source(path)
    back = source.read_audio()
    assert source.frames == 100
    assert back.seconds == 100 / FPS
    assert lag(sound, back) == 0
    assert correlation(sound.slice(Fraction(0), 6 + ahead * (ahead < 0)), back) > 0.99
    assert abs(ends(path)["audio"] - 100 / FPS) <= AUDIO_FRAME


def test_sound_at_a_pipe_begins_with_the_frames():
    with open_pipe(io.BytesIO(), FPS) as writer:
        writer.append(blank())
        with pytest.raises(MediaError, match="before the first frames"):
            writer.add_audio(tones(1, 48_000).samples, 48_000)
    with open_pipe(io.BytesIO(), FPS) as writer:
        writer.add_audio(tones(1, 48_000).samples, 48_000)
        with pytest.raises(MediaError, match="2 channels at 48000 Hz"):
            writer.add_audio(tones(1, 44_100).samples, 44_100)


def kept(path, rate=48_000, channels=2, *, pitch=900, count=COUNT):
    """A source with sound."""
    sound = tones(count / FPS, rate, channels, pitch)
    return open_source(write_video(blank(count), FPS, path, audio=sound))


@pytest.mark.parametrize("rate", [48_000, 44_100, 16_000])
def test_copied_sound_is_heard_within_generated_sound(tmp_path, rate):
    source = kept(tmp_path / "a.mp4", rate)
    generated = tones(6, 48_000)
    with open_video(tmp_path / "b.mp4", FPS) as writer:
        writer.append(blank(96))
        assert writer.add_sound(source.sound, source.sound_packets(8, 24), 40)
        writer.add_audio(generated.samples, 48_000)
    assert writer.notices == ()
    result = open_source(tmp_path / "b.mp4")
    assert result.sound == AudioFormat("aac", rate, 2)
    back = result.read_audio()
    edge = Fraction(2 * 1024, rate)
    start, stop = 40 / FPS, 56 / FPS
    for begin, end in ((Fraction(0), start - edge), (stop + edge, Fraction(6))):
        assert correlation(generated.slice(begin, end), back.slice(begin, end)) > 0.98
    inside = back.slice(start + edge, stop - edge)
    expected = source.read_audio().slice(8 / FPS + edge, 24 / FPS - edge)
    assert abs(lag(expected, inside)) <= 1024
    with av.open(str(tmp_path / "b.mp4")) as container:
        written = {bytes(packet) for packet in container.demux(container.streams.audio[0])}
    packets = [packet.data for packet in source.sound_packets(8, 24)]
    assert set(packets) <= written


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".mkv"])
def test_sources_of_several_formats_are_encoded_again(tmp_path, suffix):
    sources = [
        kept(tmp_path / "a.mp4", 44_100, 1),
        kept(tmp_path / "b.mkv", 48_000, 2, pitch=1200),
    ]
    assert [source.sound is None for source in sources] == [False, True]
    generated = tones(6, 48_000)
    with open_video(tmp_path / f"c{suffix}", FPS) as writer:
        writer.append(blank(96))
        for at, source in zip((16, 48), sources, strict=True):
            packets = source.sound_packets(0, 24)
            decoded = source.stream_audio(0, 24)
            assert writer.add_sound(source.sound, packets, at, decoded=decoded)
        writer.add_audio(generated.samples, 48_000)
    assert writer.notices == (ENCODED_AGAIN,)
    back = open_source(tmp_path / f"c{suffix}").read_audio()
    for begin, end in ((0, 1), (Fraction(5, 2), 3), (Fraction(9, 2), 6)):
        there = generated.slice(Fraction(begin), Fraction(end))
        assert correlation(there, back.slice(Fraction(begin), Fraction(end))) > 0.98
    for at, source in zip((1, 3), sources, strict=True):
        expected = source.read_audio(0, 24)
        heard = back.slice(Fraction(at), Fraction(at) + 24 / FPS)
        mono = Audio(heard.samples[: expected.channels].contiguous(), heard.rate)
        assert correlation(expected, mono) > 0.98
        assert abs(lag(expected, mono)) <= 1


def test_without_generated_sound_the_rest_is_silent(tmp_path):
    source = kept(tmp_path / "a.webm", 48_000)
    with open_video(tmp_path / "b.mkv", FPS) as writer:
        writer.append(blank(96))
        decoded = source.stream_audio(0, 32)
        assert writer.add_sound(source.sound, (), 32, decoded=decoded)
    back = open_source(tmp_path / "b.mkv").read_audio()
    assert back.seconds == 6
    assert back.slice(Fraction(0), Fraction(2)).samples.abs().max() == 0
    assert back.slice(Fraction(4), Fraction(6)).samples.abs().max() == 0
    heard = back.slice(Fraction(2), Fraction(4))
    assert correlation(source.read_audio(0, 32), heard) > 0.999


def test_what_cannot_be_decoded_is_not_encoded_again(tmp_path):
    one, other = kept(tmp_path / "a.mp4", 44_100), kept(tmp_path / "b.mp4", 48_000)
    with open_video(tmp_path / "c.mp4", FPS) as writer:
        writer.append(blank(96))
        assert writer.add_sound(one.sound, one.sound_packets(0, 16), 0)
        decoded = other.stream_audio(0, 16)
        assert not writer.add_sound(other.sound, (), 32, decoded=decoded)
    assert writer.notices == ()
    assert open_source(tmp_path / "c.mp4").sound == AudioFormat("aac", 44_100, 2)


def test_sound_that_starts_late_or_ends_early_is_silent_there(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        pictures = container.add_stream("ffv1", rate=16)
        pictures.width, pictures.height, pictures.pix_fmt = 32, 32, "bgr0"
        stream = container.add_stream("flac", rate=8_000, layout="mono")
        for number in range(64):
            picture = av.VideoFrame(32, 32, "bgr0")
            picture.pts, picture.time_base = number, Fraction(1, 16)
            container.mux(pictures.encode(picture))
        container.mux(pictures.encode(None))
        wave = (tones(1, 8_000, 1).samples.numpy() * 2**15).astype("int16")
        frame = av.AudioFrame.from_ndarray(wave, "s16", "mono")
        frame.sample_rate, frame.pts, frame.time_base = 8_000, 12_000, Fraction(1, 8_000)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    source = open_source(path)
    back = source.read_audio()
    assert back.samples.shape == (1, 32_000)
    assert back.samples[:, :12_000].abs().max() == 0
    assert back.samples[:, 20_000:].abs().max() == 0
    assert correlation(tones(1, 8_000, 1), back.slice(Fraction(3, 2), Fraction(5, 2))) > 0.999
    early = source.read_audio(0, 8)
    assert early.samples.shape == (1, 4_000)
    assert early.samples.abs().max() == 0


def test_a_sound_of_another_codec_is_refused(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        pictures = container.add_stream("ffv1", rate=16)
        pictures.width, pictures.height, pictures.pix_fmt = 32, 32, "bgr0"
        stream = container.add_stream("ac3", rate=48_000, layout="stereo")
        container.mux(pictures.encode(av.VideoFrame(32, 32, "bgr0")))
        container.mux(pictures.encode(None))
        frame = av.AudioFrame("fltp", "stereo", 1536)
        frame.sample_rate, frame.pts, frame.time_base = 48_000, 0, Fraction(1, 48_000)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(MediaError, match="sound of a codec"):
        open_source(path).read_audio()


def test_a_damaged_sound_is_an_error_and_a_large_one_is_refused(tmp_path, monkeypatch):
    source = kept(tmp_path / "a.webm", 48_000)
    with pytest.raises(RequestError, match="frame range"):
        source.read_audio(0, COUNT + 1)
    monkeypatch.setattr(source_module, "MAX_READ_BYTES", 100_000)
    with pytest.raises(RequestError, match="must fit"):
        source.read_audio()
