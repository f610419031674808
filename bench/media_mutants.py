"""Fuzz the media decoders: mutated files must decode or raise one MediaError; measures the time.

`python bench/media_mutants.py 2000` (`make fuzz`) reads 2000 mutants and prints one JSON line.
Mutants are determined by the seed.
"""

import json
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from skyloom.core.errors import MediaError
from skyloom.media.read import read_image
from skyloom.media.source import open_source

CODECS = {
    ".mp4": ("libx264", "yuv420p"),
    ".webm": ("libvpx-vp9", "yuv420p"),
    ".mkv": ("ffv1", "bgr0"),
}
PICTURES = {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP"}
MAX_FRAMES = 64


def originals() -> dict[str, bytes]:
    """Encode a small valid file of each format."""
    still = np.kron(np.eye(8, dtype=np.uint8)[..., None] * 200, np.ones((4, 6, 3), np.uint8))
    drift = [np.roll(still, number, 1) for number in range(12)]
    images = [Image.fromarray(picture) for picture in drift]
    with tempfile.TemporaryDirectory() as folder:
        for suffix, (codec, pixel_format) in CODECS.items():
            with av.open(f"{folder}/a{suffix}", "w") as container:
                stream = container.add_stream(codec, rate=12)
                stream.height, stream.width, stream.pix_fmt = 32, 48, pixel_format
                for picture in drift:
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
                container.mux(stream.encode(None))
        images[0].save(f"{folder}/a.gif", save_all=True, append_images=images[1:], duration=80)
        for suffix, name in PICTURES.items():
            images[0].save(f"{folder}/a{suffix}", name)
        return {path.suffix: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def mutants(count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Generate suffix and content of `count` mutants, alternating between formats."""
    rng = random.Random(seed)
    files = list(originals().items())
    for number in range(count):
        suffix, content = files[number % len(files)]
        yield suffix, _mutate(content, rng)


def _mutate(content: bytes, rng: random.Random) -> bytes:
    """Apply one to eight changes: flip, set, insert, delete or repeat bytes, or truncate."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        place = rng.randrange(len(changed))
        length = rng.randint(1, 32)
        kind = rng.randrange(6)
        if kind == 0:
            changed[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[place] = rng.choice([0, 1, 127, 128, 255])
        elif kind == 2:
            changed[place:place] = rng.randbytes(length)
        elif kind == 3 and len(changed) > 2 * length:
            del changed[place : place + length]
        elif kind == 4:
            changed[place:place] = changed[place : place + length]
        elif kind == 5 and rng.random() < 0.3:
            del changed[max(16, place) :]
    return bytes(changed)


def read(path: Path) -> str:
    """Read a file; return "frames" or the message of its MediaError. Other errors propagate."""
    try:
        if path.suffix in PICTURES:
            read_image(path)
            return "frames"
        source = open_source(path, fps=Fraction(12))
        for _ in source.stream(0, min(source.frames, MAX_FRAMES)):
            pass
        return "frames"
    except MediaError as error:
        return error.message.removeprefix(str(path)).strip()


def main(count: int) -> None:
    """Read `count` mutants and print one JSON line."""
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for suffix, content in mutants(count):
            path = Path(folder) / f"mutant{suffix}"
            path.write_bytes(content)
            started = time.perf_counter()
            outcomes["".join(letter for letter in read(path) if not letter.isdigit())] += 1
            slowest = max(slowest, time.perf_counter() - started)
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    took = {
        "seconds": round(time.perf_counter() - begun),
        "slowest": round(slowest, 2),
        "largest_child_mib": memory,
    }
    print(
        json.dumps(
            {
                "bench": "media_mutants",
                "mutants": count,
                **took,
                "outcomes": dict(outcomes.most_common()),
            }
        )
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
