"""Soft joins: made frames begin, and end, in the light and the colours of the kept frames beside them.

What the model makes first differs from the kept frame before it above all in the large: light, colours, where the mass
of a thing is (docs/log.md). That difference, blurred until no edge of it shows, is laid over the made frames beside the
join, less of it from frame to frame. Kept frames are not touched.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

FADE = 4  # made frames beside a join over which the difference goes to nothing; six cost short retakes their prompt
BLUR = 16  # the blur reaches this part of the frame's height, twice
_BRIGHTEST = 255


@dataclass
class Fade:
    """The `count` made frames of a span, which come in order, between the kept frame `before` them and that `after`
    (None: nothing is kept there)."""

    count: int
    before: UInt8[Tensor, "h w c"] | None
    after: UInt8[Tensor, "h w c"] | None
    _came: int = 0
    _opening: Float[Tensor, "h w c"] | None = None
    _waiting: UInt8[Tensor, "t h w c"] | None = None

    @property
    def length(self) -> int:
        """Frames that change on each side; the two sides do not meet."""
        sides = (self.before is not None) + (self.after is not None)
        return min(FADE, self.count // max(1, sides))

    def take(self, frames: UInt8[Tensor, "t h w c"]) -> UInt8[Tensor, "t h w c"]:
        """The next frames as they are shown; those beside the frame after wait until all have come."""
        if not len(frames) or not self.length:
            return frames
        opened = self._open(frames) if self.before is not None else frames
        self._came += len(frames)
        if self.after is None:
            return opened
        waiting = opened if self._waiting is None else torch.cat([self._waiting, opened])
        if self._came == self.count:
            return self._close(waiting, self.after)
        firm = max(0, self.count - self.length - (self._came - len(waiting)))
        self._waiting = waiting[firm:]
        return waiting[:firm]

    def _open(self, frames: UInt8[Tensor, "t h w c"]) -> UInt8[Tensor, "t h w c"]:
        if self._opening is None:
            assert self.before is not None
            self._opening = _blurred(self.before.float() - frames[0].float())
        numbers = torch.arange(self._came, self._came + len(frames))
        return _over(frames, self._opening, 1 - numbers / self.length)

    def _close(
        self, frames: UInt8[Tensor, "t h w c"], after: UInt8[Tensor, "h w c"]
    ) -> UInt8[Tensor, "t h w c"]:
        closing = _blurred(after.float() - frames[-1].float())
        return _over(frames, closing, 1 - torch.arange(len(frames)).flip(0) / self.length)


def _over(
    frames: UInt8[Tensor, "t h w c"],
    difference: Float[Tensor, "h w c"],
    shares: Float[Tensor, " t"],
) -> UInt8[Tensor, "t h w c"]:
    """Frames with a share of a difference over each; not a bit changes where that is 0 or less."""
    parts = [
        (frame.float() + float(share) * difference).round().clamp(0, _BRIGHTEST).to(torch.uint8)
        if share > 0
        else frame
        for frame, share in zip(frames, shares, strict=True)
    ]
    return torch.stack(parts)


def _blurred(difference: Float[Tensor, "h w c"]) -> Float[Tensor, "h w c"]:
    """The mean over a square around every pixel, twice; edges go on beyond the frame."""
    reach = max(1, len(difference) // BLUR)
    blurred = rearrange(difference, "h w c -> 1 c h w")
    for across in (True, False) * 2:
        border = (reach, reach, 0, 0) if across else (0, 0, reach, reach)
        size = (1, 2 * reach + 1) if across else (2 * reach + 1, 1)
        blurred = F.avg_pool2d(F.pad(blurred, border, mode="replicate"), size, stride=1)
    return rearrange(blurred, "1 c h w -> h w c")
