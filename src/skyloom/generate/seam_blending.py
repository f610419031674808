"""Blend generated frames into the kept frames beside them, in light and colour.

The first generated frame differs from the kept frame before it mostly in low frequencies: light,
colour, large shapes (docs/log.md). That difference is blurred and added to the generated frames
next to the seam with a weight that falls to 0. Kept frames are not changed.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

BLEND_FRAMES = 4  # generated frames that change per seam; with 6, short retakes follow prompts less
BLUR = 16  # the blur radius is the frame height divided by this, applied twice
_WHITE = 255


@dataclass
class SeamBlender:
    """Blends the `frames` generated frames of a span, which arrive in order.

    `before` and `after` are the kept frames beside the span; None if there is none.
    """

    frames: int
    before: UInt8[Tensor, "h w c"] | None
    after: UInt8[Tensor, "h w c"] | None
    _received: int = 0
    _start_difference: Float[Tensor, "h w c"] | None = None
    _waiting: UInt8[Tensor, "t h w c"] | None = None

    @property
    def length(self) -> int:
        """Frames that change per seam; the two seams do not overlap."""
        seams = (self.before is not None) + (self.after is not None)
        return min(BLEND_FRAMES, self.frames // max(1, seams))

    def blend(self, frames: UInt8[Tensor, "t h w c"]) -> UInt8[Tensor, "t h w c"]:
        """Blend the next frames. Frames near the end are held back until the span is complete."""
        if not len(frames) or not self.length:
            return frames
        blended = self._blend_start(frames) if self.before is not None else frames
        self._received += len(frames)
        if self.after is None:
            return blended
        waiting = blended if self._waiting is None else torch.cat([self._waiting, blended])
        if self._received == self.frames:
            return self._blend_end(waiting, self.after)
        done = max(0, self.frames - self.length - (self._received - len(waiting)))
        self._waiting = waiting[done:]
        return waiting[:done]

    def _blend_start(self, frames: UInt8[Tensor, "t h w c"]) -> UInt8[Tensor, "t h w c"]:
        if self._start_difference is None:
            assert self.before is not None
            self._start_difference = _blur(self.before.float() - frames[0].float())
        numbers = torch.arange(self._received, self._received + len(frames))
        return _add(frames, self._start_difference, 1 - numbers / self.length)

    def _blend_end(
        self, frames: UInt8[Tensor, "t h w c"], after: UInt8[Tensor, "h w c"]
    ) -> UInt8[Tensor, "t h w c"]:
        difference = _blur(after.float() - frames[-1].float())
        return _add(frames, difference, 1 - torch.arange(len(frames)).flip(0) / self.length)


def _add(
    frames: UInt8[Tensor, "t h w c"],
    difference: Float[Tensor, "h w c"],
    weights: Float[Tensor, " t"],
) -> UInt8[Tensor, "t h w c"]:
    """Add a weighted difference to each frame; frames of weight <= 0 are returned bit for bit."""
    blended = [
        (frame.float() + float(weight) * difference).round().clamp(0, _WHITE).to(torch.uint8)
        if weight > 0
        else frame
        for frame, weight in zip(frames, weights, strict=True)
    ]
    return torch.stack(blended)


def _blur(difference: Float[Tensor, "h w c"]) -> Float[Tensor, "h w c"]:
    """Box blur, applied twice, with replicated borders."""
    radius = max(1, len(difference) // BLUR)
    blurred = rearrange(difference, "h w c -> 1 c h w")
    for horizontal in (True, False) * 2:
        border = (radius, radius, 0, 0) if horizontal else (0, 0, radius, radius)
        size = (1, 2 * radius + 1) if horizontal else (2 * radius + 1, 1)
        blurred = F.avg_pool2d(F.pad(blurred, border, mode="replicate"), size, stride=1)
    return rearrange(blurred, "1 c h w -> h w c")
