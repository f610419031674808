"""VideoSource: frames equal a full decode, resampling, resizing, and errors for invalid files."""

import random
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from skyloom.core.errors import MediaError, RequestError
from skyloom.media.frames import cover
from skyloom.media.source import open_source
from skyloom.media.write import write_video

KINDS = {
    "ordinary.mp4": ("libx264", {"g": "12", "bf": "3"}),
    "intra.mp4": ("libx264", {"g": "1"}),
    "one_key.mp4": ("libx264", {"g": "600", "bf": "2"}),
    "open_gop.mp4": ("libx264", {"g": "12", "bf": "3", "x264-params": "open-gop=1"}),
    "pyramid.mkv": ("libx264", {"g": "24", "bf": "5", "x264-params": "b-pyramid=normal"}),
    "refresh.mkv": ("libx264", {"g": "12", "x264-params": "intra-refresh=1:bframes=0"}),
    "hevc_open.mkv": ("libx265", {"x265-params": "keyint=12:open-gop=1:bframes=4:log-level=none"}),
    "hidden.webm": ("libvpx", {"g": "20", "auto-alt-ref": "1", "lag-in-frames": "16", "b": "200k"}),
    "vp9.webm": (
        "libvpx-vp9",
        {"g": "20", "auto-alt-ref": "6", "lag-in-frames": "16", "cpu-used": "5"},
    ),
    "lossless.mkv": ("ffv1", {}),
    "mpeg4.mov": ("mpeg4", {"g": "10", "bf": "2"}),
}


def decoded(path: Path) -> torch.Tensor:
    """Decode all frames from the start with PyAV, without the sandbox, as a reference."""
    with av.open(str(path)) as container:
        frames = [
            np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
            for frame in container.decode(video=0)
        ]
    return torch.from_numpy(np.stack(frames))


@pytest.mark.parametrize("name", KINDS)
def test_seeked_frames_equal_a_full_decode(tmp_path, film, name):
    codec, options = KINDS[name]
    path = film(tmp_path / name, codec, options)
    whole, source = decoded(path), open_source(path)
    assert (source.frames, source.height, source.width, source.fps) == (40, 64, 96, 24)
    assert source.notices == ()
    for number in random.Random(0).sample(range(40), 12):
        assert torch.equal(source.read(number, number + 1)[0], whole[number]), number
    assert torch.equal(torch.cat(list(source.stream())), whole)
    assert torch.equal(source.read(17, 33), whole[17:33])


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
def test_written_files_are_read_with_their_receipt(tmp_path, suffix):
    frames = torch.randint(
        0, 256, (9, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    path = write_video(frames, 16, tmp_path / f"a{suffix}", {"skyloom": "0", "seed": 7})
    source = open_source(path)
    assert torch.equal(source.read(0, 9), decoded(path))
    assert (source.fps, source.receipt.get("seed"), source.audio, source.notices) == (
        16,
        7,
        False,
        (),
    )
    assert len(source.sha256) == 64


def test_resampling_shows_the_latest_frame(tmp_path, film):
    path = film(tmp_path / "a.mp4", count=24)
    whole = decoded(path)
    source = open_source(path, fps=Fraction(16))
    assert (source.frames, source.fps) == (16, 16)
    assert torch.equal(source.read(0, 16), whole[[number * 24 // 16 for number in range(16)]])
    assert source.notices == ("resampled from 24 to 16 fps",)
    doubled = open_source(path, fps=Fraction(48))
    assert torch.equal(doubled.read(0, 48), whole.repeat_interleave(2, 0))
    assert open_source(path, fps=Fraction(24)).notices == ()


def test_variable_frame_rate_keeps_times(tmp_path, film):
    path = film(
        tmp_path / "phone.mp4", times=[0, 40, 80, 400, 440, 1000], tick=Fraction(1, 1000), fps=25
    )
    whole, source = decoded(path), open_source(path, fps=Fraction(25))
    shown = [0, 1] + [2] * 8 + [3] + [4] * 14 + [5]
    assert torch.equal(source.read(0, len(shown)), whole[shown])
    assert "variable" in open_source(path).notices[0]
    assert open_source(path).frames == 6


def test_time_begins_with_the_first_frame(tmp_path, film):
    path = film(
        tmp_path / "late.mkv", times=[100 + number for number in range(12)], tick=Fraction(1, 24)
    )
    source = open_source(path)
    assert (source.frames, source.fps) == (12, 24)
    assert torch.equal(source.read(5, 7), decoded(path)[5:7])


def test_edit_lists_are_applied(tmp_path, film):
    path = film(
        tmp_path / "cut.mp4",
        options={"g": "30", "bf": "2"},
        times=range(-6, 18),
        tick=Fraction(1, 24),
        container_options={"avoid_negative_ts": "disabled", "use_editlist": "1"},
    )
    whole, source = decoded(path), open_source(path)
    assert len(whole) == source.frames < 24
    assert torch.equal(source.read(source.frames - 1, source.frames)[0], whole[-1])
    assert torch.equal(source.read(0, source.frames), whole)


def test_fragmented_mp4_without_duration_is_indexed(tmp_path, film):
    path = film(tmp_path / "live.mp4", container_options={"movflags": "+frag_keyframe+empty_moov"})
    assert open_source(path).frames == 40


def turned(path: Path) -> Path:
    """Set a rotation matrix in an mp4 header, as phones do."""
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 44
    assert content[matrix : matrix + 4] == struct.pack(">i", 1 << 16)
    content[matrix : matrix + 36] = struct.pack(
        ">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30
    )
    path.write_bytes(content)
    return path


def test_rotated_video_is_read_upright(tmp_path, film):
    path = film(tmp_path / "phone.mp4")
    lying = decoded(path)
    source = open_source(turned(path))
    assert (source.height, source.width) == (96, 64)
    assert torch.equal(source.read(3, 5), lying[3:5].rot90(-1, (1, 2)))
    assert "upright" in source.notices[0]


@pytest.mark.parametrize(
    ("pixel_format", "size"), [("yuv420p10le", (64, 96)), ("bgra", (33, 47)), ("bgr0", (1, 1))]
)
def test_ten_bits_alpha_and_odd_sizes(tmp_path, film, pixel_format, size):
    codec = "libx264" if pixel_format == "yuv420p10le" else "ffv1"
    path = film(tmp_path / "a.mkv", codec, pixel_format=pixel_format, size=size, count=5)
    source = open_source(path)
    assert source.read(0, 5).shape == (5, *size, 3)
    assert torch.equal(source.read(2, 4), decoded(path)[2:4])


def test_another_size_is_scaled_and_cropped(tmp_path, film):
    path = film(tmp_path / "a.mp4", count=4)
    source = open_source(path, size=(32, 32))
    assert torch.equal(source.read(0, 4), cover(decoded(path), 32, 32))
    assert (source.height, source.width) == (32, 32)
    assert source.notices == ("resized from 96x64 to 32x32, cropped to fill it",)


def test_ranges_outside_are_refused(tmp_path, film):
    source = open_source(film(tmp_path / "a.mp4", count=4))
    for start, stop in ((-1, 2), (0, 5), (3, 3)):
        with pytest.raises(RequestError, match=r"0\.17 seconds long"):
            source.read(start, stop)
    with pytest.raises(RequestError, match="fps"):
        open_source(source.path, fps=Fraction(10_000))
    with pytest.raises(RequestError, match="0x32"):
        open_source(source.path, size=(32, 0))


def test_an_exited_child_is_restarted(tmp_path, film):
    path = film(tmp_path / "a.mp4")
    whole, source = decoded(path), open_source(path)
    source.read(0, 2)
    assert source._child._process.stdin
    source._child._process.stdin.close()  # as after the idle timeout
    source._child._process.wait()
    assert torch.equal(source.read(20, 22), whole[20:22])


def test_a_file_that_is_changed_meanwhile_is_noticed(tmp_path, film):
    source = open_source(film(tmp_path / "a.mp4", count=4))
    source._child.close()
    film(tmp_path / "a.mp4", count=9)
    with pytest.raises(MediaError, match="changed"):
        source.read(0, 2)


def test_files_that_are_no_videos_raise_one_error(tmp_path, film):
    whole = film(tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "text.mp4").write_text("#EXTM3U\nhttp://example.com/a.ts\n")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "cut.mp4").write_bytes(whole[:300])
    (tmp_path / "folder.mp4").mkdir()
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=48_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), "fltp", "stereo")
        frame.sample_rate = 48_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    for name in ("text", "empty", "cut", "folder", "sound"):
        with pytest.raises(MediaError, match=f"{name}.mp4 cannot be read as a video"):
            open_source(tmp_path / f"{name}.mp4")
    with pytest.raises(MediaError, match="does not exist"):
        open_source(tmp_path / "none.mp4")


def test_opening_a_long_video_does_not_decode_it(tmp_path, film):
    path = film(
        tmp_path / "film.mkv",
        count=40,
        times=[number * 6_480 for number in range(40)],
        tick=Fraction(1, 24),
    )
    source = open_source(path, fps=Fraction(16))
    assert source.frames == 40 * 270 * 16
    assert torch.equal(source.read(source.frames - 1, source.frames)[0], decoded(path)[-1])
