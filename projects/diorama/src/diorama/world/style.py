"""Recolouring of sprites, and style filters for whole videos."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diorama.world.light import Colour
from diorama.world.noise import mix, smoothstep

COLOURS: dict[str, Colour] = {
    "red": (0.92, 0.10, 0.12),
    "orange": (1.0, 0.50, 0.08),
    "yellow": (1.0, 0.85, 0.12),
    "green": (0.15, 0.72, 0.22),
    "blue": (0.12, 0.36, 0.95),
    "purple": (0.55, 0.20, 0.85),
    "pink": (1.0, 0.45, 0.72),
    "white": (0.97, 0.97, 1.0),
    "black": (0.12, 0.12, 0.14),
    "golden": (0.95, 0.72, 0.18),
}
_GREY = (0.30, 0.59, 0.11)


def recolour(sprites: Float[Tensor, "n 4 s s"], colour: str) -> Float[Tensor, "n 4 s s"]:
    """Recolour a sprite; keep its shading, darkest lines and highlights."""
    rgb = sprites[:, :3]
    alpha = sprites[:, 3:]
    paint = rgb.new_tensor(COLOURS[colour]).view(1, 3, 1, 1)
    light = (rgb * rgb.new_tensor(_GREY).view(1, 3, 1, 1)).sum(1, keepdim=True)
    saturation = rgb.amax(1, keepdim=True) - rgb.amin(1, keepdim=True)
    knee = 0.45
    shaded = torch.where(
        light < knee, paint * light / knee, paint + (1 - paint) * (light - knee) / (1 - knee) * 0.7
    )
    if colour == "black":
        shaded = paint * 0.6 + (light - 0.3).clamp(0, 1) * 0.45
    if colour == "white":
        shaded = paint * (0.55 + 0.75 * light).clamp(max=1)
    weight = smoothstep(light, 0.10, 0.26) * (1 - 0.55 * smoothstep(light, 0.86, 0.97))
    weight = weight * (0.35 + 0.65 * smoothstep(saturation, 0.03, 0.15))
    return torch.cat([mix(rgb, shaded, weight), alpha], 1)


def apply_style(frames: Float[Tensor, "t 3 h w"], style: str | None) -> Float[Tensor, "t 3 h w"]:
    """Apply a style filter to a video; None returns it unchanged."""
    return frames if style is None else STYLES[style][0](frames).clamp(0, 1)


def _grey(frames: Tensor) -> Tensor:
    return (frames * frames.new_tensor(_GREY).view(1, 3, 1, 1)).sum(1, keepdim=True)


def _black_and_white(frames: Tensor) -> Tensor:
    return ((_grey(frames) - 0.5) * 1.15 + 0.5).expand(-1, 3, -1, -1)


def _vintage(frames: Tensor) -> Tensor:
    height, width = frames.shape[-2:]
    across = torch.linspace(-1, 1, width, device=frames.device)
    down = torch.linspace(-1, 1, height, device=frames.device)[:, None]
    sepia = _grey(frames) * frames.new_tensor((1.05, 0.86, 0.62)).view(1, 3, 1, 1)
    sepia = sepia + frames.new_tensor((0.06, 0.03, 0.0)).view(1, 3, 1, 1)
    return mix(sepia, frames, 0.15) * (1 - 0.22 * (across**2 + down**2))


def _pixel_art(frames: Tensor) -> Tensor:
    height, width = frames.shape[-2:]
    size = (max(1, height // 4), max(1, width // 4))
    coarse = (F.adaptive_avg_pool2d(frames, size) * 7).round() / 7
    return F.interpolate(coarse, size=(height, width), mode="nearest")


def _watercolor(frames: Tensor) -> Tensor:
    """Kuwahara filter (mean of the quadrant with the least variance), blended with white."""
    height, width = frames.shape[-2:]
    padded = F.pad(frames, (3, 3, 3, 3), mode="replicate")
    mean = F.avg_pool2d(padded, 4, 1)
    spread = (F.avg_pool2d(padded * padded, 4, 1) - mean * mean).sum(1, keepdim=True)
    corners = [(row, column) for row in (0, 3) for column in (0, 3)]
    means = torch.stack([mean[:, :, r : r + height, c : c + width] for r, c in corners])
    spreads = torch.stack([spread[:, :, r : r + height, c : c + width] for r, c in corners])
    calmest = spreads.argmin(0, keepdim=True).expand(-1, -1, 3, -1, -1)
    return mix(torch.gather(means, 0, calmest)[0], torch.ones_like(frames), 0.22)


def _neon(frames: Tensor) -> Tensor:
    padded = F.pad(frames.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    slope_x = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    slope_y = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    edge = smoothstep((slope_x**2 + slope_y**2).sqrt(), 0.12, 0.4)
    glow = F.avg_pool2d(edge, 9, 1, 4)
    vivid = frames / (frames.amax(1, keepdim=True) + 0.05)
    dark = frames * 0.12 + frames.new_tensor((0.03, 0.0, 0.08)).view(1, 3, 1, 1)
    return dark + vivid * (0.9 * edge + 1.1 * glow)


StyleFilter = Callable[[Tensor], Tensor]

COLOURLESS = frozenset({"black and white", "vintage"})  # their captions have no colour words

# Filter of each style, and the phrases before its caption.
STYLES: dict[str, tuple[StyleFilter, tuple[str, ...]]] = {
    "black and white": (
        _black_and_white,
        ("a black and white film of", "a black and white video of"),
    ),
    "vintage": (_vintage, ("vintage film footage of", "a sepia old movie of")),
    "pixel art": (_pixel_art, ("pixel art of", "an 8-bit pixel animation of")),
    "watercolor": (_watercolor, ("a watercolor painting of", "a soft watercolor of")),
    "neon": (_neon, ("glowing neon art of", "a neon picture of")),
}
