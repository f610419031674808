"""Invisible watermark: a 48-bit id in the luma of generated frames, by spread spectrum.

The pattern depends on id and frame size, and is refitted to the content every 32 frames, so marking
is cheap and does not depend on how a video is split into batches. `watermark_layout` places the
carriers, `watermark_detector` reads them.

It is a label and gives no protection: anyone who knows the key can remove or forge it.
docs/provenance.md has its figures.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Int16, UInt8
from torch import Tensor

from skyloom.safety.watermark_layout import (
    GRID,
    ID_BITS,
    KEY,
    band_pass,
    carrier_layout,
    codeword,
    dct,
    inverse_dct,
    local_energy,
    luma,
)

if TYPE_CHECKING:
    from skyloom.safety.watermark_detector import DetectedWatermark

MIN_SIDE = 64
_STRENGTH = 2.0  # RMS of 255 in a frame of 128 pixels: 42.1 dB
_SIZE_EXPONENT = 0.125  # the RMS falls with this power of the frame size
_REFIT_FRAMES = 32
_COMPENSATION = 0.2  # share of the content's own correlation against the id that is compensated
_MASKING_EXPONENT = 0.15  # strength follows this power of the local energy
_MAX_ENERGY = 25.0


class Watermarker(Protocol):
    """Embeds the watermark of one video; another scheme can implement it."""

    identity: str

    def mark(
        self, frames: UInt8[Tensor, "t h w c"], where: Bool[Tensor, "t h w"] | None = None
    ) -> UInt8[Tensor, "t h w c"]:
        """Return the next frames with the watermark, only where `where` is True if given."""
        ...


WatermarkDetector = Callable[[Iterable[Tensor]], "list[DetectedWatermark]"]
"""Takes the frames of a video in batches, uint8 [t h w c]; returns its watermarks in order."""


def watermark_id(text: str) -> str:
    """Return the id of a text: 12 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()[: ID_BITS // 4]


def watermark_id_of_receipt(receipt: Mapping[str, Any]) -> str:
    """Return the id of the video of a receipt (Receipt.to_dict).

    It is the same on every machine: paths, versions and device do not enter it.
    """
    request = _without(receipt.get("request") or {}, "image")
    if edit := request.get("edit"):
        request["edit"] = _without(edit, "videos", "mask")
    request["cards"] = [_without(card, "image", "video") for card in request.get("cards", [])]
    parts = [request, receipt.get("weights"), receipt.get("image"), receipt.get("parents")]
    return watermark_id(json.dumps(parts, sort_keys=True))


def _without(values: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


class SpreadSpectrumWatermarker:
    """Watermarks the frames of one video in order, in batches, with an id of 12 hex digits.

    Every 32 frames the pattern is fitted to the next frame: stronger at frequencies where the
    content opposes the id, weaker in flat areas, with the same total strength. The result does not
    depend on the batches.
    """

    def __init__(self, identity: str, key: str = KEY) -> None:
        self.identity = identity
        self._key = key
        self._count = 0
        self._pattern: Tensor | None = None

    def mark(
        self, frames: UInt8[Tensor, "t h w c"], where: Bool[Tensor, "t h w"] | None = None
    ) -> UInt8[Tensor, "t h w c"]:
        """Return the next frames with the watermark; pixels where `where` is False are unchanged.

        Frames with a side below 64 pixels are returned unchanged.
        """
        if not len(frames) or min(frames.shape[1:3]) < MIN_SIDE:
            return frames
        marked: list[Tensor] = []
        for begin, end in self._spans(len(frames)):
            if self._pattern is None or self._count % _REFIT_FRAMES == 0:
                self._pattern = _fit_pattern(frames[begin], self.identity, self._key)
            pattern = self._pattern[None]
            if where is not None:
                pattern = pattern * where[begin:end]
            pattern = rearrange(pattern, "t h w -> t h w 1")
            marked.append(frames[begin:end].to(torch.int16) + pattern)
            self._count += end - begin
        return torch.cat(marked).clamp(0, 255).to(torch.uint8)

    def _spans(self, count: int) -> Iterator[tuple[int, int]]:
        """Split the next frames at refits of the pattern."""
        begin = 0
        while begin < count:
            end = min(count, begin + _REFIT_FRAMES - self._count % _REFIT_FRAMES)
            yield begin, end
            begin = end


def embed(
    frames: UInt8[Tensor, "t h w c"], identity: str, key: str = KEY
) -> UInt8[Tensor, "t h w c"]:
    """Return a whole video with the watermark."""
    return SpreadSpectrumWatermarker(identity, key).mark(frames)


def _fit_pattern(frame: UInt8[Tensor, "h w c"], identity: str, key: str) -> Int16[Tensor, "h w"]:
    """Return the pattern to add to the luma of a frame and of those after it."""
    layout = carrier_layout(key)
    carried = layout.carry(codeword(identity, key))
    pattern = inverse_dct(layout.to_grid(carried))
    content = band_pass(luma(frame))
    energy = local_energy(content)
    content_votes = layout.votes(dct(content / energy)) * carried
    pattern_votes = layout.votes(dct(pattern / energy)) * carried
    strength = _STRENGTH * (GRID / max(GRID, min(frame.shape[:2]))) ** _SIZE_EXPONENT
    uniform = strength / pattern.square().mean().sqrt()
    shares = 1 - _COMPENSATION * content_votes / (uniform * pattern_votes.mean())
    fitted = inverse_dct(layout.to_grid(carried * shares.clamp(0, 3)), *frame.shape[:2])
    masking = energy.clamp(max=_MAX_ENERGY) ** _MASKING_EXPONENT
    masking = F.interpolate(masking[None, None], fitted.shape, mode="bilinear", align_corners=False)
    fitted = fitted * masking[0, 0]
    return (fitted * strength / fitted.square().mean().sqrt()).round().to(torch.int16)
