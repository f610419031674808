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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int16, UInt8
from torch import Tensor

from skyloom.safety.watermark_layout import (
    ID_BITS,
    KEY,
    LARGE,
    LARGE_SIDE,
    SMALL,
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
_SIZE = 128  # pixels
_SIZE_EXPONENT = 0.125  # the RMS falls with this power of the frame size
_REFIT_FRAMES = 32
_COMPENSATION = 0.2  # share of the content's own correlation against the id that is compensated
_MASKING_EXPONENT = 0.15  # strength follows this power of the local energy
_MAX_ENERGY = 25.0
_MASKING_SHARE = 0.2  # of the content's RMS in the band: what a large frame hides
_MIN_STRENGTH = 1.5  # RMS of 255 in flat areas of large frames: 44.6 dB
_MAX_STRENGTH = 4.5


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

    It is the same on every machine: paths, versions, device and consent do not enter it.
    """
    request = _without(receipt.get("request") or {}, "image", "loras", "consent")
    if edit := request.get("edit"):
        request["edit"] = _without(edit, "videos", "mask")
    request["cards"] = [_without(card, "image", "video") for card in request.get("cards", [])]
    parts = [request, receipt.get("weights"), receipt.get("image"), receipt.get("parents")]
    if loras := receipt.get("loras"):
        parts.append([_without(lora, "name") for lora in loras])
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
        self._pattern: _BytePattern | None = None

    def mark(
        self, frames: UInt8[Tensor, "t h w c"], where: Bool[Tensor, "t h w"] | None = None
    ) -> UInt8[Tensor, "t h w c"]:
        """Return the next frames with the watermark; pixels where `where` is False are unchanged.

        Frames with a side below 64 pixels are returned unchanged.
        """
        if not len(frames) or min(frames.shape[1:3]) < MIN_SIDE:
            return frames
        marked = torch.empty_like(frames)
        for begin, end in self._spans(len(frames)):
            if self._pattern is None or self._count % _REFIT_FRAMES == 0:
                fitted = _fit_pattern(frames[begin], self.identity, self._key)
                self._pattern = _BytePattern.of(fitted, frames.shape[3])
            for index in range(begin, end):
                self._pattern.add(frames[index], marked[index])
            self._count += end - begin
        if where is None:
            return marked
        return torch.where(rearrange(where, "t h w -> t h w 1"), marked, frames)

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


@dataclass(frozen=True, eq=False)
class _BytePattern:
    """A pattern as bytes: what it adds and subtracts, and the highest value that it can add to."""

    added: UInt8[Tensor, "h w c"]
    subtracted: UInt8[Tensor, "h w c"]
    headroom: UInt8[Tensor, "h w c"]

    @classmethod
    def of(cls, pattern: Int16[Tensor, "h w"], channels: int) -> "_BytePattern":
        """Return a pattern, the same in each channel."""
        added, subtracted = (
            repeat(part.clamp(min=0).to(torch.uint8), "h w -> h w c", c=channels).contiguous()
            for part in (pattern, -pattern)
        )
        return cls(added, subtracted, 255 - added)

    def add(self, frame: UInt8[Tensor, "h w c"], out: UInt8[Tensor, "h w c"]) -> None:
        """Write frame plus pattern, clamped to [0, 255], to `out`, without wider integers."""
        torch.minimum(frame, self.headroom, out=out)
        out += self.added
        torch.maximum(out, self.subtracted, out=out)
        out -= self.subtracted


def _fit_pattern(frame: UInt8[Tensor, "h w c"], identity: str, key: str) -> Int16[Tensor, "h w"]:
    """Return the pattern to add to the luma of a frame and of those after it."""
    size = (frame.shape[0], frame.shape[1])
    band = LARGE if min(size) >= LARGE_SIDE else SMALL
    layout = carrier_layout(key, band)
    carried = layout.carry(codeword(identity, key))
    pattern = inverse_dct(band, layout.to_grid(carried))
    content = band_pass(band, luma(frame))
    energy = local_energy(content)
    content_votes = layout.votes(dct(band, content / energy)) * carried
    pattern_votes = layout.votes(dct(band, pattern / energy)) * carried
    strength = _STRENGTH * (_SIZE / max(_SIZE, min(size))) ** _SIZE_EXPONENT
    uniform = strength / pattern.square().mean().sqrt()
    shares = 1 - _COMPENSATION * content_votes / (uniform * pattern_votes.mean())
    fitted = inverse_dct(band, layout.to_grid(carried * shares.clamp(0, 3)), size)
    if band is LARGE:
        fitted = fitted / fitted.square().mean().sqrt()
        return (fitted * _enlarge(_masked_strength(energy), size)).round().to(torch.int16)
    masking = energy.clamp(max=_MAX_ENERGY) ** _MASKING_EXPONENT
    fitted = fitted * _enlarge(masking, size)
    return (fitted * strength / fitted.square().mean().sqrt()).round().to(torch.int16)


def _masked_strength(energy: Float[Tensor, "g g"]) -> Float[Tensor, "g g"]:
    """Return the RMS that the content of a large frame hides, in levels."""
    return (energy.sqrt() * _MASKING_SHARE).clamp(_MIN_STRENGTH, _MAX_STRENGTH)


def _enlarge(field: Float[Tensor, "g g"], size: tuple[int, int]) -> Float[Tensor, "h w"]:
    """Resize a smooth field to the frame."""
    return F.interpolate(field[None, None], size, mode="bilinear", align_corners=False)[0, 0]
