"""Pictures are read upright and in full depth; bombs and damaged files are refused."""

import struct
import zlib

import av
import numpy as np
import pytest
from PIL import Image

from skyloom.core.errors import MediaError
from skyloom.media.read import read_image
from skyloom.media.source import open_source


def _png_that_claims(width, height):
    """Return a PNG of a few bytes with any size in its header."""

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


def test_postscript_is_refused(tmp_path):
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


def test_sixteen_bit_grey_is_scaled(tmp_path):
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


def test_other_comments_are_no_receipts(tmp_path):
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
        assert open_source(path).receipt == {}
