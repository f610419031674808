# pyright: basic
"""Generate the spans of a timeline, conditioned on the kept frames around them.

Everything streams: a span reads only the frames that condition it, start it or lie under its mask,
so memory does not grow with the length of the sources. Noise depends on the seed and the span's
name, not on its position.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from skyloom.core.seeds import derive_seed
from skyloom.core.types import LatentShape
from skyloom.core.version import __version__
from skyloom.diffusion.canvas import Canvas, to_latent_mask
from skyloom.generate.denoiser import Denoiser
from skyloom.generate.executor import DeterministicExecutor
from skyloom.generate.layout import SpanLayout
from skyloom.generate.plan import Plan
from skyloom.generate.receipt import hash_source_file, weights_digest
from skyloom.generate.resume import WindowStore
from skyloom.generate.rollout import (
    SamplingSpec,
    StreamingDecoder,
    Window,
    WindowStep,
    generate_windows,
)
from skyloom.generate.seam_blending import SeamBlender
from skyloom.generate.span_cache import SpanIdentity, SpanStore
from skyloom.generate.timeline import Filter, Generate, SourceClip
from skyloom.media.filters import interpolate, upscale
from skyloom.media.frames import to_pixels
from skyloom.media.masks import Mask, feather
from skyloom.media.source import VideoSource
from skyloom.models.diorama.v1.autoencoder import Vae
from skyloom.models.registry import ModelInfo

Frames = UInt8[Tensor, "t h w c"]


@dataclass(frozen=True, eq=False)
class TimelineRenderer:
    """Renders generated spans at `size` (height, width) with the parts of a model.

    `make_denoiser` returns a new denoiser for a prompt. `sampling` is completed per span. `mark`
    watermarks frames, or the pixels of a mask. `cache` holds latents of earlier spans.
    `frame_offset` is the position, in latent frames, of windows without a cache; the model's
    prompt-based latent prediction ends before it.
    """

    vae: Vae
    executor: DeterministicExecutor
    device: torch.device
    sources: Sequence[VideoSource]
    sampling: SamplingSpec
    make_denoiser: Callable[[str], Denoiser]
    mark: Callable[[Frames, Bool[Tensor, "t h w"] | None], Frames]
    smoothing_level: float
    frame_offset: int
    size: tuple[int, int]
    mask: Mask | None = None
    feather: int = 0
    cache: SpanStore | None = None

    def render(
        self, span: Generate, layout: SpanLayout, store: WindowStore | None = None
    ) -> Iterator[WindowStep | Frames]:
        """Yield the sampler steps of a span and its frames as they are decoded.

        Windows that `store` has are not sampled again.
        """
        context = SpanContext(span, layout, self)
        known = frozenset((0, cell) for cell in range(layout.known_before))
        blender = SeamBlender(span.frames, *context.neighbours())
        compositor = MaskCompositor(span, self, blender)
        decoder = StreamingDecoder(
            self.vae, self.executor, self.device, self.smoothing_level, known
        )
        display = (layout.lead_frames, layout.lead_frames + span.frames)
        end = layout.known_before + layout.generated
        if layout.known_before:
            latent = context.encode(0, layout.known_before)[None]
            decoder.put(latent, _decode_window(0, layout.known_before, display))
        for first, item in self._latents(span, layout, context, store):
            if isinstance(item, WindowStep):
                yield item
                continue
            yield from map(compositor.finish, decoder.ready(max_pending=0))
            stop = min(first + item.shape[2], end)
            decoder.put(item, _decode_window(first, stop, display))
            yield from map(compositor.finish, decoder.ready())
        yield from map(compositor.finish, decoder.ready(max_pending=0))

    def _latents(
        self,
        span: Generate,
        layout: SpanLayout,
        context: "SpanContext",
        store: WindowStore | None,
    ) -> Iterator[tuple[int, WindowStep | Tensor]]:
        """Yield sampler steps, and runs of generated latent frames with the index of their first.

        Runs come in order of time.
        """
        offset = layout.known_before
        cached = None if self.cache is None else self.cache.load(span)
        if cached is not None:
            for first, end in sorted(layout.generated_ranges):  # same chunks, hence the same bits
                yield first, cached[:, :, first - offset : end - offset]
            return
        finished: dict[int, Tensor] = {}
        whole: list[Tensor] = []
        position = offset
        for step in self._sample(span, layout, context, store):
            yield 0, step
            if step.finished is None:
                continue
            first, end = layout.generated_ranges[step.window.index]
            run = step.finished[:, :, first - step.window.start : end - step.window.start]
            context.add_known(first, run[0])
            finished[first] = run
            while position in finished:
                whole.append(finished.pop(position))
                yield position, whole[-1]
                position += whole[-1].shape[2]
        if self.cache is not None:
            self.cache.save(span, torch.cat(whole, dim=2))

    def _sample(
        self,
        span: Generate,
        layout: SpanLayout,
        context: "SpanContext",
        store: WindowStore | None,
    ) -> Iterator[WindowStep]:
        """Sample the windows of a span."""
        denoiser = self.make_denoiser(span.prompt)
        rollout = self.sampling.rollout
        if layout.uses_cache and layout.known_before:
            assert rollout is not None and span.before is not None
            denoiser.skip_frames(span.before.start // self.vae.config.scale.time, rollout)
            known = context.encode(0, layout.known_before)[None]
            denoiser.cache_frames(known, rollout, rollout.context_sigma)
        if not layout.uses_cache:
            denoiser.set_frame_offset(self.frame_offset)
        spec = replace(
            self.sampling,
            windows=layout.windows,
            canvas_at=context.canvas,
            seed=derive_seed(self.sampling.seed, "span", span.name),
            store=store,
        )
        yield from generate_windows(spec, denoiser)


@dataclass
class SpanContext:
    """Frames and latent frames around a span: before it, under it (its initial clips), after it.

    Local frame numbers start at the first known frame; `layout.lead_frames` is the span's first.
    """

    span: Generate
    layout: SpanLayout
    renderer: TimelineRenderer
    _known: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Encode the known latent frames on both sides."""
        layout = self.layout
        end = layout.known_before + layout.generated
        for first, stop in ((0, layout.known_before), (end, layout.latent_frames)):
            if first < stop:
                self.add_known(first, self.encode(first, stop))

    def add_known(self, first: int, run: Float[Tensor, "c t h w"]) -> None:
        """Add latent frames that later windows may be conditioned on."""
        self._known.update({first + index: cell for index, cell in enumerate(run.unbind(1))})

    def canvas(self, window: Window) -> Canvas:
        """The canvas of a window: known latent frames, and the initial clips under the others."""
        span = self.span
        first, end = self.layout.generated_ranges[window.index]
        config = self.renderer.vae.config
        height, width = (side // config.scale.space for side in self.renderer.size)
        shape = LatentShape(window.stop - window.start, height, width)
        canvas = Canvas.text_to_video(config.latent_channels, shape)
        for cell in range(window.start, window.stop):
            if not first <= cell < end:
                canvas = canvas.set_known(cell - window.start, self._known[cell][:, None])
        if not span.init_clips:
            return canvas
        latent = canvas.latent.clone()
        mask = canvas.denoise_mask.clone()
        generated = slice(first - window.start, end - window.start)
        latent[:, generated] = self.encode(first, end)
        if span.masked:
            mask[generated] = self._latent_mask(first, end)
        strength = torch.ones(canvas.frames)
        strength[generated] = span.strength
        return replace(
            canvas,
            latent=latent,
            denoise_mask=mask,
            strength=strength if span.strength < 1 else None,
        )

    @torch.no_grad()
    def encode(self, first: int, end: int) -> Float[Tensor, "c t h w"]:
        """Latent frames [first, end) of the source frames; each is encoded independently."""
        start, stop = self._video_range(first, end)
        frames = self.read(start, stop)
        if first:
            frames = torch.cat([frames[:1], frames])
        pixels = to_pixels(frames)[None].to(self.renderer.device)
        vae = self.renderer.vae
        latent = self.renderer.executor.run_one(partial(vae.encode, pixels))[0].cpu()
        return latent[:, 1:] if first else latent

    def read(self, start: int, stop: int) -> Frames:
        """Local frames [start, stop). After the last known frame, that frame is repeated."""
        lead = self.layout.lead_frames
        count = self.span.frames
        parts: list[Frames] = []
        if start < lead:
            assert self.span.before is not None
            shift = self.span.before.frames - lead
            parts.append(self._clip(self.span.before, start + shift, min(stop, lead) + shift))
        begin = max(start, lead) - lead
        end = min(stop, lead + count) - lead
        if begin < end and self.span.init_clips:
            parts.append(self._initial_frames(begin, end))
        elif begin < end:
            parts.append(self._blank(end - begin))
        begin = max(start - lead - count, 0)
        end = stop - lead - count
        if end > 0:
            after = self.span.after
            available = 0 if after is None else min(end, after.frames)
            if after is not None and begin < available:
                parts.append(self._clip(after, begin, available))
            missing = end - max(begin, available)
            if missing:
                still = parts[-1][-1:] if parts else self._blank(1)
                parts.append(still.expand(missing, -1, -1, -1))
        return torch.cat(parts)

    def neighbours(self) -> tuple[UInt8[Tensor, "h w c"] | None, UInt8[Tensor, "h w c"] | None]:
        """The kept frames directly before and after the span."""
        before = self.span.before
        after = self.span.after
        return (
            self._clip(before, before.frames - 1, before.frames)[0]
            if before and before.frames
            else None,
            self._clip(after, 0, 1)[0] if after and after.frames else None,
        )

    def _video_range(self, first: int, end: int) -> tuple[int, int]:
        """Video frames of the latent frames [first, end)."""
        scale = self.renderer.vae.config.scale
        return (scale.video_frames(first) if first else 0), scale.video_frames(end)

    def _latent_mask(self, first: int, end: int) -> Bool[Tensor, "t h w"]:
        """The edit's mask on latent frames [first, end)."""
        start, stop = self._video_range(first, end)
        mask = self._mask(start, stop)
        padded = torch.cat([mask[:1], mask]) if first else mask
        cells = to_latent_mask(padded, self.renderer.vae.config.scale)
        return cells[1:] if first else cells

    def _mask(self, start: int, stop: int) -> Bool[Tensor, "t h w"]:
        """The edit's mask on local frames; False outside the span."""
        assert self.renderer.mask is not None and self.span.init_clips
        lead = self.layout.lead_frames
        origin = self.span.init_clips[0].start
        begin = max(start, lead)
        end = min(stop, lead + self.span.frames)
        inside = self.renderer.mask.read(origin + begin - lead, origin + end - lead)
        outside = inside.new_zeros(1, *inside.shape[1:])
        return torch.cat(
            [outside.expand(begin - start, -1, -1), inside, outside.expand(stop - end, -1, -1)]
        )

    def _initial_frames(self, start: int, stop: int) -> Frames:
        """Frames [start, stop) that the span starts from: one clip, or a mix of two."""
        clips = self.span.init_clips
        first = self._clip(clips[0], start, stop)
        if len(clips) == 1:
            return first
        second = self._clip(clips[1], start, stop).float()
        shares = rearrange(torch.tensor(self.span.mix_shares[start:stop]), "t -> t 1 1 1")
        return torch.lerp(first.float(), second, shares).round().to(torch.uint8)

    def _clip(self, clip: SourceClip, start: int, stop: int) -> Frames:
        return self.renderer.sources[clip.source].read(clip.start + start, clip.start + stop)

    def _blank(self, count: int) -> Frames:
        return torch.zeros(count, *self.renderer.size, 3, dtype=torch.uint8)


@dataclass
class MaskCompositor:
    """Blends generated frames at the seams, composites them over the source and watermarks them.

    Inside the mask pixels are generated, at its soft edge mixed, outside copied bit for bit.
    """

    span: Generate
    renderer: TimelineRenderer
    blender: SeamBlender
    _position: int = 0

    def finish(self, frames: Frames) -> Frames:
        """The next output frames of the span; frames near a seam may be held back."""
        frames = self.blender.blend(frames)
        start = self._position
        self._position += len(frames)
        if not self.span.masked or not len(frames):
            return self.renderer.mark(frames, None)
        assert self.renderer.mask is not None
        clip = self.span.init_clips[0]
        begin = clip.start + start
        end = clip.start + self._position
        source = self.renderer.sources[clip.source].read(begin, end)
        soft_mask = feather(self.renderer.mask.read(begin, end), self.renderer.feather)
        weight = rearrange(soft_mask, "t h w -> t h w 1")
        mixed = torch.lerp(source.float(), frames.float(), weight).round().to(torch.uint8)
        composed = torch.where(weight > 0, mixed, source)
        return self.renderer.mark(composed, rearrange(weight > 0, "t h w 1 -> t h w"))


def _decode_window(start: int, stop: int, display: tuple[int, int]) -> Window:
    """A run of latent frames to decode."""
    return Window(0, start, stop, decode_until=stop, cache_until=stop, display_range=display)


def filter_frames(source: VideoSource, span: Filter) -> Iterator[Frames]:
    """The frames of a clip after its filter."""
    frames = source.stream(span.clip.start, span.clip.stop)
    if span.size is not None:
        return upscale(frames, span.size)
    return interpolate(frames, source.fps, source.fps * span.rate_factor)


def span_identity(
    plan: Plan, info: ModelInfo, device: torch.device, dtype: torch.dtype
) -> SpanIdentity:
    """Build the cache key of an edit's spans; its names are those of existing caches."""
    opened = plan.edit_sources
    edit = plan.request.edit
    assert opened is not None and edit is not None
    settings = {
        "skyloom": __version__,
        "weights": weights_digest(info.manifest.get("files", {})),
        "made with": f"{device.type} {dtype}",
        "seed": plan.seed,
        "steps": plan.num_steps,
        "guidance": plan.guidance_scale,
        "student": plan.student,
        "negative": plan.request.negative_prompt,
        "mask": edit.region if edit.mask is None else hash_source_file(Path(edit.mask)),
        "size": plan.shape.size,
    }
    source_ids = [
        f"{source.sha256} {source.fps} {source.width}x{source.height}" for source in opened.sources
    ]
    return SpanIdentity(settings, source_ids)
