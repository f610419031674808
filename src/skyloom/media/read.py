"""Read pictures and videos, within limits that a file cannot talk its way around."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from skyloom.core.errors import MediaError
from skyloom.media.video import Video

MAX_PIXELS = 64_000_000
MAX_FRAMES = 4_000


def read_image(path: Path) -> UInt8[Tensor, "1 h w c"]:
    """A picture as one upright RGB frame; transparent parts become white.

    Raises MediaError for what is no picture, is damaged, or has more than 64 million pixels.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise MediaError(
                    f"{path} has {image.width}x{image.height} pixels, more than 64 million.",
                    hint="Make it smaller.",
                )
            upright = ImageOps.exif_transpose(image).convert("RGBA")
        white = Image.new("RGBA", upright.size, "white")
        pixels = np.array(Image.alpha_composite(white, upright).convert("RGB"))
    except FileNotFoundError as error:
        raise MediaError(f"The picture {path} does not exist.", hint="Check the path.") from error
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise MediaError(f"{path} cannot be read as a picture.", hint="Use a PNG, JPEG or WebP file.") from error
    return torch.from_numpy(pixels)[None]


def read_video(path: Path, max_frames: int = MAX_FRAMES) -> Video:
    """All frames of a video's first picture stream, at its mean rate. Raises MediaError."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            if stream.width * stream.height > MAX_PIXELS:
                raise MediaError(f"{path} has {stream.width}x{stream.height} pixels.", hint="Make it smaller.")
            pictures = []
            for frame in container.decode(stream):
                if len(pictures) == max_frames:
                    raise MediaError(f"{path} has more than {max_frames} frames.", hint="Cut it shorter.")
                pictures.append(frame.to_ndarray(format="rgb24"))
            fps = Fraction(stream.average_rate or 16)
            comment = container.metadata.get("comment", "")
    except FileNotFoundError as error:
        raise MediaError(f"The video {path} does not exist.", hint="Check the path.") from error
    except (av.error.FFmpegError, IndexError, OSError, ValueError) as error:
        raise MediaError(f"{path} cannot be read as a video.") from error
    if not pictures:
        raise MediaError(f"{path} holds no frames.")
    return Video(torch.from_numpy(np.stack(pictures)), fps, {"comment": comment} if comment else {})
