"""Between frames (uint8 [t h w c]) and model pixels (float [-1, 1], [c t h w]); crops and sizes."""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor


def to_pixels(frames: UInt8[Tensor, "t h w c"]) -> Float[Tensor, "c t h w"]:
    """Frames to the floats in [-1, 1] that a model takes."""
    return rearrange(frames, "t h w c -> c t h w").float() / 127.5 - 1


def to_frames(pixels: Float[Tensor, "c t h w"]) -> UInt8[Tensor, "t h w c"]:
    """Model pixels to frames; values outside [-1, 1] are clamped."""
    scaled = (pixels.float().clamp(-1, 1) + 1) * 127.5
    return rearrange(scaled.round().to(torch.uint8), "c t h w -> t h w c")


def cover(frames: UInt8[Tensor, "t h w c"], height: int, width: int) -> UInt8[Tensor, "t y x c"]:
    """Cut the middle of the frames to the aspect of height x width, and scale it to that size."""
    _, tall, wide, _ = frames.shape
    scale = min(tall / height, wide / width)
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (tall - rows) // 2, (wide - columns) // 2
    middle = frames[:, top : top + rows, left : left + columns]
    if (rows, columns) == (height, width):
        return middle.clone()
    pixels = rearrange(middle, "t h w c -> t c h w").float()
    resized = F.interpolate(
        pixels, (height, width), mode="bicubic", antialias=True, align_corners=False
    )
    return rearrange(resized.round().clamp(0, 255).to(torch.uint8), "t c h w -> t h w c")
