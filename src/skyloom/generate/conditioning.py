"""Pictures and videos pinned to a time of a shot: the latent frames that a canvas knows.

Latent frames hold several frames: what is pinned inside one is repeated back to where that begins, so that it stands
where it should, and frames at its end that do not fill one are left to the model.
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
class Pin:
    """Latent frames of a shot that are known from `start` on; they may move as far as `strength` says."""

    shot: int
    start: int
    latent: Float[Tensor, "c t h w"]
    strength: float = 0.0

    @property
    def cells(self) -> frozenset[tuple[int, int]]:
        """(Shot, latent frame) pairs that may not move."""
        held = 0 if self.strength else self.latent.shape[1]
        return frozenset((self.shot, self.start + number) for number in range(held))

    def on(self, canvas: Canvas, window: Window) -> Canvas:
        """A window's canvas with those of the pin's frames that it holds."""
        first, end = (
            max(self.start, window.start),
            min(self.start + self.latent.shape[1], window.stop),
        )
        if self.shot != window.shot or first >= end:
            return canvas
        known = self.latent[:, first - self.start : end - self.start]
        kept = canvas.set_known(first - window.start, known)
        if not self.strength:
            return kept
        strength = torch.ones(canvas.frames) if canvas.strength is None else canvas.strength.clone()
        strength[first - window.start : end - window.start] = self.strength
        return replace(kept, denoise_mask=canvas.denoise_mask, strength=strength)


def read_pinned(placed: PlacedCard, shape: VideoShape, fps: int) -> UInt8[Tensor, "t h w c"]:
    """A card's picture, filling the frame, or as much of its video as there is room for, at the model's rate."""
    card = placed.card
    if card.image is not None:
        return cover(read_image(Path(card.image)), shape.height, shape.width)
    assert card.video is not None
    return sample_frames(Path(card.video), fps, shape.frames - placed.frame)


def sample_frames(path: Path, fps: int, most: int) -> UInt8[Tensor, "t h w c"]:
    """A video's frames at another rate: each moment shows the latest frame; at most so many."""
    source = open_source(path, fps=Fraction(fps))
    return source.read(0, min(most, source.frames))


def fit_cells(
    frames: UInt8[Tensor, "t h w c"], offset: int, scale: ScaleFactors
) -> tuple[UInt8[Tensor, "u h w c"], int, int]:
    """Frames to encode for what begins at frame `offset` of a shot, the first latent frame they are for, and how many
    of the latent frames that come out are none of it."""
    cell = -(-offset // scale.time)
    if cell == 0:
        whole = scale.time * ((len(frames) - 1) // scale.time) + 1
        return frames[:whole], 0, 0
    before = offset - scale.video_frames(cell)
    padded = torch.cat([repeat(frames[0], "h w c -> n h w c", n=before + 1), frames])
    short = -(len(padded) - 1) % scale.time
    if len(padded) - 1 < scale.time:  # less than one latent frame: the last one stands still in it
        padded = torch.cat([padded, repeat(padded[-1], "h w c -> n h w c", n=short)])
    whole = scale.time * ((len(padded) - 1) // scale.time) + 1
    return padded[:whole], cell, 1
