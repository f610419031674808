"""The invisible mark: a 48-bit id in the luma of every made frame, by spread spectrum, without any network.

A mark is one pattern per id and size, constant for 32 frames and nearly so after them, so that marking can be cut
anywhere and costs next to nothing. `carriers` knows where its signs are, `detector` reads it.

It is a label, not a lock: who knows the key can remove or forge it. docs/provenance.md has its figures.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Int16, UInt8
from torch import Tensor

from skyloom.safety.watermark_layout import (
    GRID,
    ID_BITS,
    KEY,
    activity_of,
    layout_of,
    luma_of,
    middle_of,
    picture_of,
    transform,
    word_of,
)

MIN_SIDE = 64
_STRENGTH = 2.0  # root mean square in a frame of 128 pixels, of 255: 42.1 dB
_FALL = 0.125
_REFIT = 32  # frames that have one pattern
_AGAINST = 0.2  # of what the picture itself says against an id, how much is made up for
_SHAPE, _BUSY = (
    0.15,
    25.0,
)  # strength goes with this power of the activity around, up to that activity


def watermark_id(text: str) -> str:
    """The id of whatever a text describes: 12 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()[: ID_BITS // 4]


def watermark_id_of_receipt(receipt: Mapping[str, Any]) -> str:
    """The id of the video that a receipt (Receipt.to_dict) tells of: the same wherever and whenever it is made again,
    so without paths, versions and device."""
    asked = {key: value for key, value in (receipt.get("request") or {}).items() if key != "image"}
    edit = asked.get("edit")
    if edit:
        asked["edit"] = {key: value for key, value in edit.items() if key not in ("videos", "mask")}
    asked["cards"] = [
        {key: value for key, value in card.items() if key not in ("image", "video")}
        for card in asked.get("cards", [])
    ]
    said = [asked, receipt.get("weights"), receipt.get("image"), receipt.get("parents")]
    return watermark_id(json.dumps(said, sort_keys=True))


class SpreadSpectrumWatermarker:
    """Marks the made frames of one video, in order, some at a time, with an id of 12 hex digits.

    Every 32 frames the pattern is fitted to the frame that comes: with more of the frequencies that speak against the
    id, and fainter on flat skies, of the same strength as a whole. So the same video, id and key give the same bits,
    however it is cut into runs.
    """

    def __init__(self, identity: str, key: str = KEY) -> None:
        self.identity, self._key, self._count = identity, key, 0
        self._pattern: Tensor | None = None

    def mark(
        self, frames: UInt8[Tensor, "t h w c"], where: Bool[Tensor, "t h w"] | None = None
    ) -> UInt8[Tensor, "t h w c"]:
        """The next frames, marked. `where` is True for what was made; everything else stays bit for bit.

        Frames with a side of less than 64 pixels hold no mark and come back as they are.
        """
        if not len(frames) or min(frames.shape[1:3]) < MIN_SIDE:
            return frames
        marked: list[Tensor] = []
        for begin, end in self._spans(len(frames)):
            if self._pattern is None or self._count % _REFIT == 0:
                self._pattern = _fitted(frames[begin], self.identity, self._key)
            added = self._pattern[None] if where is None else self._pattern[None] * where[begin:end]
            marked.append(frames[begin:end].to(torch.int16) + rearrange(added, "t h w -> t h w 1"))
            self._count += end - begin
        return torch.cat(marked).clamp(0, 255).to(torch.uint8)

    def _spans(self, count: int) -> Iterator[tuple[int, int]]:
        """Runs of the next frames that have one pattern."""
        begin = 0
        while begin < count:
            end = min(count, begin + _REFIT - self._count % _REFIT)
            yield begin, end
            begin = end


def embed(
    frames: UInt8[Tensor, "t h w c"], identity: str, key: str = KEY
) -> UInt8[Tensor, "t h w c"]:
    """A whole video, marked."""
    return SpreadSpectrumWatermarker(identity, key).mark(frames)


def _fitted(frame: UInt8[Tensor, "h w c"], identity: str, key: str) -> Int16[Tensor, "h w"]:
    """What is added to the luma of a frame and of those after it."""
    layout = layout_of(key)
    wanted = layout.carry(word_of(identity, key))
    middle = middle_of(luma_of(frame))
    activity = activity_of(middle)
    own = layout.votes(transform(middle / activity)) * wanted
    added = layout.votes(transform(picture_of(layout.grid_of(wanted)) / activity)) * wanted
    strength = _STRENGTH * (GRID / max(GRID, min(frame.shape[:2]))) ** _FALL
    even = strength / picture_of(layout.grid_of(wanted)).square().mean().sqrt()
    shares = (1 - _AGAINST * own / (even * added.mean())).clamp(0, 3)
    pattern = picture_of(layout.grid_of(wanted * shares), *frame.shape[:2])
    shape = activity.clamp(max=_BUSY) ** _SHAPE
    pattern = (
        pattern
        * F.interpolate(shape[None, None], pattern.shape, mode="bilinear", align_corners=False)[
            0, 0
        ]
    )
    return (pattern * strength / pattern.square().mean().sqrt()).round().to(torch.int16)
