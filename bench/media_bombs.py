"""Read decompression bombs and files with false sizes; each must raise one error quickly.

`python bench/media_bombs.py` prints two JSON lines: number of files, files that were accepted, the
slowest one, and peak memory of the decoding process; then the same for requests (wire_bombs.py).
"""

import io
import json
import resource
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import wire_bombs
from PIL import Image
from wire_bombs import GZIP_MAGIC, ZIP_MAGIC

from skyloom.core.errors import MediaError
from skyloom.media.read import read_image
from skyloom.media.source import open_source

PICTURES = {".png", ".jpg", ".webp", ".bmp"}


def png(width: int, height: int, *extra: tuple[bytes, bytes]) -> bytes:
    """Build a PNG with a false size and extra chunks before its (missing) pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    packed = [
        struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def still(name: str) -> bytearray:
    """Encode a small valid picture."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, name, **({"lossless": True} if name == "WEBP" else {}))
    return bytearray(buffer.getvalue())


def patched(content: bytearray, place: int, value: bytes) -> bytes:
    """Overwrite bytes at an offset."""
    content[place : place + len(value)] = value
    return bytes(content)


def gif(width: int, height: int, count: int) -> bytes:
    """Build a GIF with a large canvas and frames of one pixel."""
    pixel = (
        b"\x21\xf9\x04\x00\x05\x00\x00\x00\x2c\x00\x00\x00\x00\x01\x00\x01\x00\x00"
        b"\x02\x02\x44\x01\x00"
    )
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", width, height, 0x80, 0, 0)
        + bytes(6)
        + pixel * count
        + b"\x3b"
    )


def video(
    suffix: str,
    codec: str,
    size: tuple[int, int],
    *,
    repeat: int = 1,
    gap: int = 1,
    streams: int = 1,
) -> bytes:
    """Encode a black video whose second packet is repeated `repeat` times, `gap` frames apart."""
    with tempfile.TemporaryDirectory() as folder:
        with av.open(f"{folder}/a.mkv", "w") as container:
            stream = container.add_stream(
                codec, rate=24, options={"preset": "ultrafast", "bf": "0"}
            )
            stream.height, stream.width = size
            stream.pix_fmt = "yuv420p"
            for _ in range(2):
                container.mux(
                    stream.encode(av.VideoFrame.from_ndarray(np.zeros((*size, 3), np.uint8)))
                )
            container.mux(stream.encode(None))
        with av.open(f"{folder}/a.mkv") as source, av.open(f"{folder}/b{suffix}", "w") as container:
            copies = [
                container.add_stream_from_template(source.streams.video[0]) for _ in range(streams)
            ]
            first, second = [bytes(packet) for packet in source.demux(video=0) if packet.size][:2]
            for copy in copies:
                for number in range(1 + repeat):
                    packet = av.Packet(second if number else first)
                    packet.pts = packet.dts = number * gap
                    packet.time_base = Fraction(1, 24)
                    packet.stream = copy
                    packet.is_keyframe = not number
                    container.mux(packet)
        return Path(f"{folder}/b{suffix}").read_bytes()


def box(name: bytes, content: bytes, size: int | None = None) -> bytes:
    """Build an mp4 box, optionally with a false size."""
    return struct.pack(">I", 8 + len(content) if size is None else size) + name + content


def claims(name: bytes, offset: int, value: int) -> bytes:
    """Build an mp4 whose table `name` has a false number of entries."""
    content = bytearray(video(".mp4", "libx264", (32, 32)))
    return patched(content, content.index(name) + offset, struct.pack(">I", value))


def bombs() -> Iterator[tuple[str, bytes]]:
    """Generate file names and contents."""
    bomb = zlib.compress(bytes(200_000_000), 9)
    yield "square.png", png(60_000, 60_000)
    yield "largest.png", png(2**31 - 1, 2**31 - 1)
    yield "row.png", png(2**31 - 1, 1)
    yield "poster.png", png(12_000, 8_000)
    yield "text.png", png(16, 16, (b"zTXt", b"a\0\0" + bomb))
    yield "profile.png", png(16, 16, (b"iCCP", b"a\0\0" + bomb))
    jpeg = still("JPEG")
    yield "huge.jpg", patched(jpeg, jpeg.index(b"\xff\xc0") + 5, struct.pack(">HH", 65_500, 65_500))
    yield (
        "hollow.jpg",
        patched(jpeg, jpeg.index(b"\xff\xc0") + 5, struct.pack(">HH", 8_000, 7_900))[:400],
    )
    yield "huge.webp", patched(still("WEBP"), 21, b"\xff\xff\xff\x0f")
    yield (
        "canvas.webp",
        b"RIFF\x1a\0\0\0WEBPVP8X\x0a\0\0\0\x02\0\0\0" + b"\xff\x3f\x00" * 2 + bytes(4),
    )
    yield "huge.bmp", patched(still("BMP"), 18, struct.pack("<ii", 50_000, 50_000))
    yield "huge.gif", gif(65_535, 65_535, 2)
    yield "zip.gif", gif(3_900, 3_900, 2_000)
    yield "many.gif", gif(1_000, 1_000, 20_000)
    yield "eight_k.mp4", video(".mp4", "libx264", (4_320, 8_192))
    yield "black.mp4", video(".mp4", "libx264", (1_024, 1_024), repeat=6_000)
    yield "black.mkv", video(".mkv", "libx264", (1_024, 1_024), repeat=6_000)
    yield "days.mp4", video(".mp4", "libx264", (32, 32), gap=24 * 3600 * 30)
    yield "years.mkv", video(".mkv", "libx264", (32, 32), gap=24 * 3600 * 365)
    yield "black.webm", video(".webm", "libvpx", (1_024, 1_024), repeat=6_000)
    yield "days.mov", video(".mov", "libx264", (32, 32), gap=24 * 3600 * 30)
    yield "gzip.mp4", GZIP_MAGIC + bomb
    yield "zip.png", ZIP_MAGIC + bomb
    yield "streams.mkv", video(".mkv", "libx264", (32, 32), streams=60)
    yield "samples.mp4", claims(b"stsz", 12, 2**31 - 1)
    yield "durations.mp4", claims(b"stts", 8, 2**31 - 1)
    nested = b""
    for _ in range(3_000):
        nested = box(b"moov", nested)
    yield "deep.mp4", box(b"ftyp", b"isom\0\0\0\0") + nested
    yield "wide.mp4", box(b"ftyp", b"isom\0\0\0\0") + box(b"moov", bytes(100), 2**32 - 1)
    ebml = b"\x1aE\xdf\xa3\x8b\x42\x82\x88matroska"
    yield (
        "deep.mkv",
        ebml
        + b"\x18\x53\x80\x67\x01\xff\xff\xff\xff\xff\xff\xff"
        + b"\x12\x54\xc3\x67\x84" * 20_000,
    )
    yield (
        "wide.mkv",
        ebml
        + b"\x18\x53\x80\x67\x01\xff\xff\xff\xff\xff\xff\xff\x16\x54\xae\x6b\x08\xff\xff\xff\xff"
        * 9,
    )


def read(path: Path) -> str | None:
    """Read a file; return the error message, or None if it was accepted."""
    try:
        if path.suffix in PICTURES:
            read_image(path)
        else:
            open_source(path)
    except MediaError as error:
        return error.message
    return None


def measure(folder: Path) -> None:
    """Read all files of a folder and print one JSON line."""
    seconds: dict[str, float] = {}
    unpacked: list[str] = []
    for path in sorted(folder.iterdir()):
        begun = time.perf_counter()
        if read(path) is None:
            unpacked.append(path.name)
        seconds[path.name] = round(time.perf_counter() - begun, 2)
    slowest = max(seconds, key=lambda name: seconds[name])
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    found = {"bombs": len(seconds), "not_refused": unpacked, "slowest": [slowest, seconds[slowest]]}
    print(json.dumps({"bench": "media_bombs", **found, "largest_child_mib": memory}))


def main() -> None:
    """Write the files and read them in a new process, which has a smaller memory footprint."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in bombs():
            (Path(folder) / name).write_bytes(content)
        subprocess.run([sys.executable, __file__, folder], check=True)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(wire_bombs.measure(Path(folder))))


if __name__ == "__main__":
    measure(Path(sys.argv[1])) if sys.argv[1:] else main()
