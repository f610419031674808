"""How far looks of copies lie from those of their pictures, and looks of other pictures from each other, in bits of 64.

python bench/looks.py --atlas .atlas [--count 200]

Pictures are rendered from seeds that no training has seen; scenes of one world are more alike than photographs are.
Prints one JSON line: of each kind of copy, and of pairs of different pictures, how many lie within each distance.
"""

import argparse
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from skyloom.safety.provenance import phash
from skyloom.world.assets import load_atlas
from skyloom.world.make import make_clip
from skyloom.world.vocabulary import DIORAMA

FIRST_SEED = 20_800_000
DISTANCES = (4, 6, 8, 10, 12)


def copies(picture: Image.Image) -> Iterator[tuple[str, Image.Image]]:
    """What becomes of a picture on its way."""
    width, height = picture.size
    half, edge = (width // 2, height // 2), width // 20
    yield "jpeg 30", coded(picture, 30)
    yield "half size, jpeg 60", coded(picture.resize(half), 60)
    yield "double size", picture.resize((2 * width, 2 * height), Image.Resampling.BICUBIC)
    yield "lighter by a tenth", picture.point(lambda value: min(255, value + 25))
    yield "cropped by a tenth", picture.crop((edge, edge, width - edge, height - edge))
    yield "mirrored", picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def coded(picture: Image.Image, quality: int) -> Image.Image:
    """A picture as a jpeg shows it."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def within(distances: list[int]) -> dict[int, int]:
    """How many lie within each distance."""
    return {most: sum(one <= most for one in distances) for most in DISTANCES}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--atlas", type=Path, default=Path(".atlas"))
    parser.add_argument("--count", type=int, default=200)
    given = parser.parse_args()
    atlas = load_atlas(given.atlas)
    frames = [
        make_clip(FIRST_SEED + index, DIORAMA, atlas, frames=1).frames[0]
        for index in range(given.count)
    ]
    looks = [int(phash(frame), 16) for frame in frames]
    told: dict[str, list[int]] = {
        "different pictures": [(a ^ b).bit_count() for a, b in itertools.combinations(looks, 2)]
    }
    for frame, look in zip(frames, looks, strict=True):
        for name, copy in copies(Image.fromarray(frame.numpy())):
            other = int(phash(torch.from_numpy(np.array(copy))), 16)
            told.setdefault(name, []).append((look ^ other).bit_count())
    print(
        json.dumps(
            {
                "pictures": given.count,
                **{name: within(distances) for name, distances in told.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
