"""Convert frames (uint8 [t h w c]) to model pixels (float [-1, 1], [c t h w]) and back; resize."""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor


def to_pixels(frames: UInt8[Tensor, "t h w c"]) -> Float[Tensor, "c t h w"]:
    """Convert frames to model pixels in [-1, 1]."""
    return rearrange(frames, "t h w c -> c t h w").float() / 127.5 - 1


def to_frames(pixels: Float[Tensor, "c t h w"]) -> UInt8[Tensor, "t h w c"]:
    """Convert model pixels to frames; values outside [-1, 1] are clamped."""
    scaled = (pixels.float().clamp(-1, 1) + 1) * 127.5
    return rearrange(scaled.round().to(torch.uint8), "c t h w -> t h w c")


def cover(frames: UInt8[Tensor, "t h w c"], height: int, width: int) -> UInt8[Tensor, "t y x c"]:
    """Resize frames to cover height x width, keeping the aspect ratio, and crop the centre."""
    source_height, source_width = frames.shape[1:3]
    scale = min(source_height / height, source_width / width)
    crop_height = max(1, round(height * scale))
    crop_width = max(1, round(width * scale))
    top = (source_height - crop_height) // 2
    left = (source_width - crop_width) // 2
    crop = frames[:, top : top + crop_height, left : left + crop_width]
    if (crop_height, crop_width) == (height, width):
        return crop.clone()
    pixels = rearrange(crop, "t h w c -> t c h w").float()
    resized = F.interpolate(
        pixels, (height, width), mode="bicubic", antialias=True, align_corners=False
    )
    return rearrange(resized.round().clamp(0, 255).to(torch.uint8), "t c h w -> t h w c")
