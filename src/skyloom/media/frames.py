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
    """Scale until the frames cover height x width, and cut what stands over at both sides alike."""
    _, tall, wide, _ = frames.shape
    scale = max(height / tall, width / wide)
    size = (max(height, round(tall * scale)), max(width, round(wide * scale)))
    pixels = rearrange(frames, "t h w c -> t c h w").float()
    resized = F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    cut = resized[:, :, top : top + height, left : left + width]
    return rearrange(cut.round().clamp(0, 255).to(torch.uint8), "t c h w -> t h w c")
