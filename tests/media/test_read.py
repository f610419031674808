"""Pictures and videos are read upright and in full depth; bombs, fragments and other files are refused by name."""

import struct
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from skyloom.core.errors import MediaError
from skyloom.media import read
from skyloom.media.read import probe, read_frames, read_image, read_video
from skyloom.media.write import write_video


def _frames(count=6, height=32, width=48):
    steps = torch.linspace(0, 200, count).round().to(torch.uint8)
    frames = steps[:, None, None, None].repeat(1, height, width, 3)
    frames[:, :, : width // 2, 0] = 255
    return frames


def _png_that_claims(width, height):
    """A PNG of a few bytes whose header claims any size."""

    def chunk(name, content):
        return (
            struct.pack(">I", len(content))
            + name
            + content
            + struct.pack(">I", zlib.crc32(name + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    data = zlib.compress(bytes(100))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(9_000, 8_000), (12_000, 8_000), (60_000, 60_000)])
def test_bombs_are_refused_before_they_are_unpacked(tmp_path, size):
    path = tmp_path / "bomb.png"
    path.write_bytes(_png_that_claims(*size))
    with pytest.raises(MediaError, match=r"64 million pixels\. Make it smaller"):
        read_image(path)


def test_a_cut_picture_is_refused(tmp_path):
    path = tmp_path / "cut.jpg"
    Image.effect_noise((64, 64), 90).save(path)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(MediaError, match=r"cut\.jpg cannot be read as a picture"):
        read_image(path)


def test_formats_that_run_other_programs_are_refused(tmp_path):
    path = tmp_path / "page.eps"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n")
    with pytest.raises(MediaError, match="Use a PNG, JPEG"):
        read_image(path)


def test_transparent_parts_become_white(tmp_path):
    path = tmp_path / "clear.png"
    Image.new("RGBA", (3, 2), (10, 20, 30, 0)).save(path)
    frame = read_image(path)
    assert frame.shape == (1, 2, 3, 3)
    assert (frame == 255).all()


def test_sixteen_bits_of_grey_keep_their_shades(tmp_path):
    path = tmp_path / "deep.png"
    Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16)).save(path)
    assert read_image(path)[0, 0, :, 0].tolist() == [0, 128, 255]


def test_pictures_are_turned_upright(tmp_path):
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(path, exif=exif)
    assert read_image(path).shape == (1, 40, 20, 3)


def test_a_folder_is_no_picture(tmp_path):
    with pytest.raises(MediaError, match="cannot be read"):
        read_image(tmp_path)


def test_probe_tells_what_was_written(tmp_path):
    path = write_video(
        _frames(),
        Fraction(16),
        tmp_path / "a.mp4",
        {"skyloom": "0", "request": {"prompt": "caf\u00e9"}},
    )
    found = probe(path)
    assert (found.width, found.height, found.fps, found.frames, found.codec) == (
        48,
        32,
        16,
        6,
        "h264",
    )
    assert found.seconds == pytest.approx(6 / 16, abs=0.01)
    assert found.receipt["request"] == {"prompt": "caf\u00e9"}


def test_comments_of_others_are_no_receipts(tmp_path):
    for comment in ("hello", "[1]", '{"a": 1}', "[" * 100_000):
        path = tmp_path / "b.webm"
        with av.open(str(path), "w") as container:
            container.metadata["comment"] = comment
            stream = container.add_stream("libvpx-vp9", rate=8)
            stream.width = stream.height = 16
            stream.pix_fmt = "yuv420p"
            picture = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(picture))
            container.mux(stream.encode(None))
        assert read_video(path).receipt == {}


def test_a_cut_video_is_refused(tmp_path):
    path = write_video(_frames(), Fraction(16), tmp_path / "a.mp4")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(MediaError, match=r"a\.mp4 cannot be read as a video"):
        read_video(path)
    with pytest.raises(MediaError, match="does not exist"):
        probe(tmp_path / "none.mp4")


def test_long_videos_are_refused_while_they_are_read(tmp_path, monkeypatch):
    path = write_video(_frames(), Fraction(16), tmp_path / "a.mp4")
    assert len(read_video(path, max_frames=6).frames) == 6
    with pytest.raises(MediaError, match="more than 5 frames"):
        read_video(path, max_frames=5)
    monkeypatch.setattr(read, "MAX_VIDEO_PIXELS", 48 * 32 * 5)
    with pytest.raises(MediaError, match="too long"):
        read_video(path)
    monkeypatch.setattr(read, "MAX_PIXELS", 100)
    with pytest.raises(MediaError, match="48x32"):
        probe(path)


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
def test_frames_one_by_one_are_those_of_the_whole(tmp_path, suffix):
    path = write_video(_frames(), Fraction(16), tmp_path / f"a{suffix}")
    assert torch.equal(torch.stack(list(read_frames(path))), read_video(path).frames)


def test_frames_of_a_missing_or_foreign_file_are_one_clear_error(tmp_path):
    (tmp_path / "text.mp4").write_text("hello")
    for name, message in {
        "none.mp4": "does not exist",
        "text.mp4": "cannot be read as a video",
    }.items():
        with pytest.raises(MediaError, match=message):
            next(read_frames(tmp_path / name))
