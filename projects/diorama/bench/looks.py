"""Measure Hamming distances of 64-bit perceptual hashes: edited copies, and different pictures.

python projects/diorama/bench/looks.py --atlas .atlas [--count 200]

Pictures are rendered from seeds outside of the training data; they resemble each other more than
photographs do. Prints one JSON line: for each kind of copy, and for pairs of different pictures,
the number of pairs within each distance.
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

from diorama.world.assets import load_atlas
from diorama.world.make import make_clip
from diorama.world.vocabulary import DIORAMA
from skyloom.safety.provenance import phash

FIRST_SEED = 20_800_000
DISTANCES = (4, 6, 8, 10, 12)


def copies(picture: Image.Image) -> Iterator[tuple[str, Image.Image]]:
    """Generate edited copies of a picture, with the name of each edit."""
    width, height = picture.size
    half = (width // 2, height // 2)
    edge = width // 20
    yield "jpeg 30", coded(picture, 30)
    yield "half size, jpeg 60", coded(picture.resize(half), 60)
    yield "double size", picture.resize((2 * width, 2 * height), Image.Resampling.BICUBIC)
    yield "lighter by a tenth", picture.point(lambda value: min(255, value + 25))
    yield "cropped by a tenth", picture.crop((edge, edge, width - edge, height - edge))
    yield "mirrored", picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def coded(picture: Image.Image, quality: int) -> Image.Image:
    """Encode a picture as JPEG and decode it."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def within(distances: list[int]) -> dict[int, int]:
    """Count the values up to each bound of DISTANCES."""
    return {bound: sum(distance <= bound for distance in distances) for bound in DISTANCES}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--atlas", type=Path, default=Path(".atlas"))
    parser.add_argument("--count", type=int, default=200)
    given = parser.parse_args()
    atlas = load_atlas(given.atlas)
    frames = [
        make_clip(FIRST_SEED + index, DIORAMA, atlas, frames=1).frames[0]
        for index in range(given.count)
    ]
    hashes = [int(phash(frame), 16) for frame in frames]
    distances: dict[str, list[int]] = {
        "different pictures": [(a ^ b).bit_count() for a, b in itertools.combinations(hashes, 2)]
    }
    for frame, original in zip(frames, hashes, strict=True):
        for name, copy in copies(Image.fromarray(frame.numpy())):
            other = int(phash(torch.from_numpy(np.array(copy))), 16)
            distances.setdefault(name, []).append((original ^ other).bit_count())
    counts = {name: within(values) for name, values in distances.items()}
    print(json.dumps({"pictures": given.count, **counts}))


if __name__ == "__main__":
    main()
