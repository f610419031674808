"""Read pictures and receipts."""

import json
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from skyloom.core.errors import MediaError
from skyloom.media.sandbox import Sandbox
from skyloom.media.sandbox_limits import CHANNELS, MAX_COMMENT, MAX_PICTURE_PIXELS
from skyloom.media.write import SIDECAR


def read_image(path: Path) -> UInt8[Tensor, "1 h w c"]:
    """Read a picture as one upright RGB frame, alpha over white; decoded in the sandbox.

    Raises MediaError for a file that is no picture, is damaged, or has more than 64 million pixels.
    """
    with Sandbox(path, "picture") as child:
        header, pixels = child.receive(MAX_PICTURE_PIXELS * CHANNELS) or ({}, bytearray())
        height = header.get("height")
        width = header.get("width")
        if not (isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0):
            raise child.fail("crash")
        if height * width * CHANNELS != len(pixels):
            raise child.fail("crash")
    return torch.from_numpy(np.frombuffer(pixels, np.uint8).reshape(1, height, width, CHANNELS))


def is_sidecar(path: Path) -> bool:
    """Return whether a path has the name of a receipt sidecar (`video.mp4.receipt.json`)."""
    return path.name.endswith(SIDECAR)


def read_sidecar(path: Path) -> dict[str, object]:
    """Read the receipt in a sidecar.

    Raises MediaError for a file that is missing, larger than 1 MiB, or no receipt.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_COMMENT + 1)
    except OSError as error:
        raise MediaError(
            f"{path} cannot be read ({error.strerror}).", hint="Check the path."
        ) from error
    receipt = parse_receipt(content)
    if not receipt:
        raise MediaError(f"{path} is not a skyloom receipt.", hint="Choose another file.")
    return receipt


def parse_receipt(text: str | bytes) -> dict[str, object]:
    """Parse a receipt; empty if the text is not a receipt or longer than 1 MiB."""
    try:
        receipt = json.loads(text) if len(text) <= MAX_COMMENT else {}
    except (ValueError, RecursionError):
        return {}
    return receipt if isinstance(receipt, dict) and "skyloom" in receipt else {}
