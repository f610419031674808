"""Latent frames that a storyboard or first image fixes: encode media and write it into a canvas.

A latent frame holds several video frames. Media that begins inside a latent frame is repeated back
to that frame's start; trailing frames that do not fill a latent frame are left to the model.
"""

from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import torch
from einops import repeat
from jaxtyping import Float, UInt8
from torch import Tensor

from skyloom.core.types import ScaleFactors, VideoShape
from skyloom.diffusion.canvas import Canvas
from skyloom.generate.rollout import Window
from skyloom.generate.storyboard import PlacedCard
from skyloom.media.frames import cover
from skyloom.media.read import read_image
from skyloom.media.source import open_source


@dataclass(frozen=True, eq=False)
class LatentCondition:
    """Known latent frames of a shot from `start` on; `strength` is 0 (fixed) to 1 (free)."""

    shot: int
    start: int
    latent: Float[Tensor, "c t h w"]
    strength: float = 0.0

    @property
    def fixed_frames(self) -> frozenset[tuple[int, int]]:
        """Pairs (shot, latent frame) that must not change."""
        count = 0 if self.strength else self.latent.shape[1]
        return frozenset((self.shot, self.start + number) for number in range(count))

    def apply_to(self, canvas: Canvas, window: Window) -> Canvas:
        """Write the latent frames that lie in a window into its canvas."""
        first = max(self.start, window.start)
        end = min(self.start + self.latent.shape[1], window.stop)
        if self.shot != window.shot or first >= end:
            return canvas
        known = self.latent[:, first - self.start : end - self.start]
        conditioned = canvas.set_known(first - window.start, known)
        if not self.strength:
            return conditioned
        strength = torch.ones(canvas.frames) if canvas.strength is None else canvas.strength.clone()
        strength[first - window.start : end - window.start] = self.strength
        return replace(conditioned, denoise_mask=canvas.denoise_mask, strength=strength)


def read_card_media(placed: PlacedCard, shape: VideoShape, fps: int) -> UInt8[Tensor, "t h w c"]:
    """Read a card's image, cropped to the frame, or its video at the model's rate.

    The video ends with the storyboard at the latest.
    """
    card = placed.card
    if card.image is not None:
        return cover(read_image(Path(card.image)), shape.height, shape.width)
    assert card.video is not None
    source = open_source(Path(card.video), fps=Fraction(fps))
    return source.read(0, min(shape.frames - placed.frame, source.frames))


def align_to_latent_frames(
    frames: UInt8[Tensor, "t h w c"], offset: int, scale: ScaleFactors
) -> tuple[UInt8[Tensor, "u h w c"], int, int]:
    """Pad or cut frames that begin at frame `offset` of a shot to whole latent frames.

    Returns the frames to encode, the index of their first latent frame, and how many leading
    latent frames of the encoding to drop.
    """
    cell = -(-offset // scale.time)
    if cell == 0:
        whole = scale.time * ((len(frames) - 1) // scale.time) + 1
        return frames[:whole], 0, 0
    before = offset - scale.video_frames(cell)
    padded = torch.cat([repeat(frames[0], "h w c -> n h w c", n=before + 1), frames])
    missing = -(len(padded) - 1) % scale.time
    if len(padded) - 1 < scale.time:  # less than one latent frame: repeat the last frame
        padded = torch.cat([padded, repeat(padded[-1], "h w c -> n h w c", n=missing)])
    whole = scale.time * ((len(padded) - 1) // scale.time) + 1
    return padded[:whole], cell, 1
