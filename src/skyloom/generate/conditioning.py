"""Conditioning: what the canvas of each window knows, and the frames around a run.

Pictures and videos at the start of spans, kept frames before and after a span, the frames that an
edit starts from, its mask and windows generated before are all written into the canvas here.

A latent frame holds several video frames. Media that begins inside a latent frame is repeated back
to that frame's start; trailing frames that do not fill a latent frame are left to the model.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from skyloom.core.types import LatentShape, ScaleFactors, VideoShape
from skyloom.diffusion.canvas import Canvas, to_latent_mask
from skyloom.generate.edit_sources import EditSources
from skyloom.generate.timeline import Generate, Media, SourceClip
from skyloom.generate.windows import RunPlan, Window, first_frame
from skyloom.media.frames import cover, to_pixels
from skyloom.media.read import read_image
from skyloom.media.source import open_source

Frames = UInt8[Tensor, "t h w c"]


@dataclass(frozen=True, eq=False)
class KnownFrame:
    """A known latent frame; `strength` is 0 (fixed) to 1 (free)."""

    latent: Float[Tensor, "c h w"]
    strength: float = 0.0


@dataclass
class Conditioning:
    """Fills the canvases of one run; `encode` turns pixels [1 3 t h w] into a latent on the CPU.

    `shape` is the size of the video; `channels` is that of a latent. Known latent frames enter the
    model at noise level `known_sigma` at most; they are kept by (shot, latent frame).
    """

    run: RunPlan
    shape: VideoShape
    fps: Fraction
    scale: ScaleFactors
    channels: int
    encode: Callable[[Float[Tensor, "1 3 t h w"]], Float[Tensor, "1 c u y x"]]
    sources: EditSources | None = None
    known_sigma: float = 0.0
    known: dict[tuple[int, int], KnownFrame] = field(
        default_factory=dict[tuple[int, int], KnownFrame]
    )

    def __post_init__(self) -> None:
        """Encode the media of the spans, and the known latent frames around the run."""
        self._pin_media()
        run = self.run
        end = run.known_before + run.generated
        for first, stop in ((0, run.known_before), (end, run.latent_frames)):
            if first < stop:
                self.add_known(first, self.encode_frames(first, stop))

    @property
    def fixed(self) -> frozenset[tuple[int, int]]:
        """Pairs (shot, latent frame) that must not change."""
        return frozenset(at for at, known in self.known.items() if not known.strength)

    @property
    def before(self) -> Float[Tensor, "1 c t h w"] | None:
        """The known latent frames before the run."""
        cells = [self.known[0, cell].latent for cell in range(self.run.known_before)]
        return torch.stack(cells, dim=1)[None] if cells else None

    def add_known(
        self, first: int, latent: Float[Tensor, "c t h w"], shot: int = 0, strength: float = 0.0
    ) -> None:
        """Add latent frames of a shot that windows are conditioned on."""
        for number, cell in enumerate(latent.unbind(1)):
            self.known[shot, first + number] = KnownFrame(cell, strength)

    def forget_before(self, index: int) -> None:
        """Drop known latent frames that no window from number `index` on sees."""
        later = self.run.windows[index:]
        first = {one.shot: one.start for one in reversed(later)}
        if any(one.start < first[one.shot] for one in later):
            return  # windows from the end of a span to its start
        self.known = {
            at: known for at, known in self.known.items() if at[1] >= first.get(at[0], at[1] + 1)
        }

    def canvas(self, window: Window) -> Canvas:
        """The canvas of a window: known latent frames, and the initial frames under the others."""
        height, width = (side // self.scale.space for side in (self.shape.height, self.shape.width))
        shape = LatentShape(window.stop - window.start, height, width)
        canvas = Canvas.text_to_video(self.channels, shape)
        canvas = replace(canvas, context_sigma=self.known_sigma)
        strength = torch.ones(canvas.frames)
        for number, cell in enumerate(range(window.start, window.stop)):
            known = self.known.get((window.shot, cell))
            if known is None:
                continue
            free = canvas.denoise_mask
            canvas = canvas.set_known(number, known.latent[:, None])
            if known.strength:
                canvas = replace(canvas, denoise_mask=free)
                strength[number] = known.strength
        span = self.run.spans[window.span]
        if span.init_clips:
            canvas = self._with_initial_frames(canvas, window, span)
            first, end = window.generated
            strength[first - window.start : end - window.start] = span.strength
        return replace(canvas, strength=strength if bool((strength < 1).any()) else None)

    def _with_initial_frames(self, canvas: Canvas, window: Window, span: Generate) -> Canvas:
        """Write the frames that an edit starts from, and its mask, into a canvas."""
        first, end = window.generated
        generated = slice(first - window.start, end - window.start)
        latent = canvas.latent.clone()
        mask = canvas.denoise_mask.clone()
        latent[:, generated] = self.encode_frames(first, end)
        if span.masked:
            mask[generated] = self._latent_mask(first, end)
        return replace(canvas, latent=latent, denoise_mask=mask)

    def _pin_media(self) -> None:
        """Encode the media at the start of the spans."""
        shot = 0
        offset = 0  # of the span in its shot
        position = 0  # of the span in the video
        for index, span in enumerate(self.run.spans):
            if index and not span.continues:
                shot += 1
                offset = 0
            if span.media is not None:
                frames = read_media(span.media, self.shape, self.fps, position)
                aligned, first, skip = align_to_latent_frames(frames, offset, self.scale)
                latent = self.encode(to_pixels(aligned)[None])[0, :, skip:]
                self.add_known(first, latent, shot, span.media.strength)
            offset += span.frames
            position += span.frames

    def encode_frames(self, first: int, end: int) -> Float[Tensor, "c t h w"]:
        """Latent frames [first, end) of the source frames; each is encoded independently."""
        start, stop = self._video_range(first, end)
        frames = self.read(start, stop)
        if first:
            frames = torch.cat([frames[:1], frames])
        latent = self.encode(to_pixels(frames)[None])[0]
        return latent[:, 1:] if first else latent

    def read(self, start: int, stop: int) -> Frames:
        """Frames [start, stop) around and under an edit's span, counted from the first known one.

        After the last known frame, that frame is repeated.
        """
        span = self.run.whole
        lead = self.run.lead_frames
        parts: list[Frames] = []
        if start < lead:
            assert span.before is not None
            shift = span.before.frames - lead
            parts.append(self._clip(span.before, start + shift, min(stop, lead) + shift))
        begin = max(start, lead) - lead
        end = min(stop, lead + span.frames) - lead
        if begin < end and span.init_clips:
            parts.append(self._initial_frames(begin, end))
        elif begin < end:
            parts.append(self._blank(end - begin))
        begin = max(start - lead - span.frames, 0)
        end = stop - lead - span.frames
        if end > 0:
            after = span.after
            available = 0 if after is None else min(end, after.frames)
            if after is not None and begin < available:
                parts.append(self._clip(after, begin, available))
            missing = end - max(begin, available)
            if missing:
                still = parts[-1][-1:] if parts else self._blank(1)
                parts.append(still.expand(missing, -1, -1, -1))
        return torch.cat(parts)

    def neighbours(self) -> tuple[UInt8[Tensor, "h w c"] | None, UInt8[Tensor, "h w c"] | None]:
        """The kept frames directly before and after the run."""
        before = self.run.spans[0].before
        after = self.run.spans[-1].after
        return (
            self._clip(before, before.frames - 1, before.frames)[0]
            if before and before.frames
            else None,
            self._clip(after, 0, 1)[0] if after and after.frames else None,
        )

    def _video_range(self, first: int, end: int) -> tuple[int, int]:
        """Video frames of the latent frames [first, end)."""
        return first_frame(first, self.scale), self.scale.video_frames(end)

    def _latent_mask(self, first: int, end: int) -> Bool[Tensor, "t h w"]:
        """The edit's mask on latent frames [first, end)."""
        start, stop = self._video_range(first, end)
        mask = self._mask(start, stop)
        padded = torch.cat([mask[:1], mask]) if first else mask
        cells = to_latent_mask(padded, self.scale)
        return cells[1:] if first else cells

    def _mask(self, start: int, stop: int) -> Bool[Tensor, "t h w"]:
        """The edit's mask on local frames; False outside the span."""
        span = self.run.whole
        assert self.sources is not None and self.sources.mask is not None and span.init_clips
        lead = self.run.lead_frames
        origin = span.init_clips[0].start
        begin = max(start, lead)
        end = min(stop, lead + span.frames)
        inside = self.sources.mask.read(origin + begin - lead, origin + end - lead)
        outside = inside.new_zeros(1, *inside.shape[1:])
        return torch.cat(
            [outside.expand(begin - start, -1, -1), inside, outside.expand(stop - end, -1, -1)]
        )

    def _initial_frames(self, start: int, stop: int) -> Frames:
        """Frames [start, stop) that the span starts from: one clip, or a mix of two."""
        span = self.run.whole
        first = self._clip(span.init_clips[0], start, stop)
        if len(span.init_clips) == 1:
            return first
        second = self._clip(span.init_clips[1], start, stop).float()
        shares = rearrange(torch.tensor(span.mix_shares[start:stop]), "t -> t 1 1 1")
        return torch.lerp(first.float(), second, shares).round().to(torch.uint8)

    def _clip(self, clip: SourceClip, start: int, stop: int) -> Frames:
        assert self.sources is not None
        return self.sources.sources[clip.source].read(clip.start + start, clip.start + stop)

    def _blank(self, count: int) -> Frames:
        return torch.zeros(count, self.shape.height, self.shape.width, 3, dtype=torch.uint8)


def read_media(media: Media, shape: VideoShape, fps: Fraction, position: int) -> Frames:
    """Read a picture, cropped to the frame, or a video at the model's rate.

    A video that begins at frame `position` ends with the whole video at the latest.
    """
    if not media.moving:
        return cover(read_image(Path(media.path)), shape.height, shape.width)
    source = open_source(Path(media.path), fps=fps)
    return source.read(0, min(shape.frames - position, source.frames))


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
