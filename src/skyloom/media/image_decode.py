"""Decode one picture, in the child of `decoder.py`. Everything that Pillow loads late is imported here, in time."""

import warnings
from importlib import import_module
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from skyloom.media.sandbox import RefusedError

Image.preinit()
for _name in ("Mpo", "Tiff", "WebP"):  # Tiff reads Exif
    import_module(f"PIL.{_name}ImagePlugin")

MAX_PIXELS = 64_000_000


def decode_image(file: BinaryIO, format_name: str) -> np.ndarray:
    """A picture as upright uint8 [h w 3]; transparent parts become white, 16 bits of grey 8."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # large, odd or damaged metadata: the limits here are our own
        Image.MAX_IMAGE_PIXELS = None
        with Image.open(file, formats=[format_name]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise RefusedError(
                    "too large", width=image.width, height=image.height, most=MAX_PIXELS // 10**6
                )
            upright = ImageOps.exif_transpose(_to_eight_bits(image))
    if not upright.has_transparency_data:
        return np.asarray(upright.convert("RGB"))
    upright = upright.convert("RGBA")
    return np.asarray(
        Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright).convert("RGB")
    )


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, which would be clipped to white, as grey of 8."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.array(image).clip(0, 65535) / 257).round().astype(np.uint8))
