"""Decode one picture with Pillow; runs in the sandbox (see sandbox_worker.py).

Pillow's plugins are imported here because the confined process cannot open files later.
"""

import warnings
from importlib import import_module
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from skyloom.media.sandbox import DecoderError
from skyloom.media.sandbox_limits import MAX_PICTURE_PIXELS

Image.preinit()
for _name in ("Mpo", "Tiff", "WebP"):  # the TIFF plugin reads EXIF data
    import_module(f"PIL.{_name}ImagePlugin")


def decode_image(file: BinaryIO, format_name: str) -> np.ndarray:
    """Decode a picture to upright uint8 [h w 3]: alpha over white, 16-bit grey as 8 bits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about large pictures and damaged metadata
        Image.MAX_IMAGE_PIXELS = None  # checked below
        with Image.open(file, formats=[format_name]) as image:
            if image.width * image.height > MAX_PICTURE_PIXELS:
                raise DecoderError(
                    "too large",
                    width=image.width,
                    height=image.height,
                    maximum=MAX_PICTURE_PIXELS // 10**6,
                )
            upright = ImageOps.exif_transpose(_to_eight_bits(image))
    if not upright.has_transparency_data:
        return np.asarray(upright.convert("RGB"))
    upright = upright.convert("RGBA")
    background = Image.new("RGBA", upright.size, "white")
    return np.asarray(Image.alpha_composite(background, upright).convert("RGB"))


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits; Pillow would clip it to white."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.array(image).clip(0, 65535) / 257).round().astype(np.uint8))
