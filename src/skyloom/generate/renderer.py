# pyright: basic
"""Render a run: sample its windows, decode them, blend seams and composite under a mask.

Everything streams: a run reads only the frames that condition it, start it or lie under its mask,
so memory does not grow with the length of the sources.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from einops import rearrange
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from skyloom.generate.conditioning import Conditioning
from skyloom.generate.decoding import StreamingDecoder
from skyloom.generate.denoiser import Denoiser
from skyloom.generate.sampling import SamplingSpec, WindowStep, generate_windows
from skyloom.generate.seam_blending import SeamBlender
from skyloom.generate.window_review import WindowReviewer
from skyloom.generate.windows import RunPlan, decode_whole


@dataclass(frozen=True, eq=False)
class RenderedFrames:
    """Frames of the video in order.

    Generated ones are watermarked, in the pixels of `mask` if there is one; kept ones are not.
    """

    frames: UInt8[Tensor, "t h w c"]
    generated: bool = True
    mask: Bool[Tensor, "t h w"] | None = None


@dataclass
class RunRenderer:
    """Renders one run. `frame_offset` is the index of the first frame of windows without a cache.

    `reviewer` scores every window if the request has a critic.
    """

    run: RunPlan
    conditioning: Conditioning
    sampling: SamplingSpec
    denoiser: Denoiser
    decoder: StreamingDecoder
    frame_offset: int
    reviewer: WindowReviewer | None = None
    _finished: dict[int, tuple[WindowStep, Tensor]] = field(default_factory=dict)

    def render(self) -> Iterator[WindowStep | RenderedFrames]:
        """Yield the sampler steps, and the frames as they are decoded, in order of time."""
        run = self.run
        compositor = Compositor(run, self.conditioning)
        before = self.conditioning.before
        if before is not None:
            display = (run.lead_frames, run.lead_frames + run.frames)
            self.decoder.put(before, decode_whole(0, run.known_before, display))
        self._prepare_denoiser(before)
        position = run.known_before
        for step in generate_windows(self.sampling, self.denoiser):
            yield step
            if step.generated is not None:
                yield from map(compositor.finish, self.decoder.ready(max_pending=0))
                position = self._decode(step, step.generated, position)
            yield from map(compositor.finish, self.decoder.ready())
        yield from map(compositor.finish, self.decoder.ready(max_pending=0))

    def _prepare_denoiser(self, before: Float[Tensor, "1 c t h w"] | None) -> None:
        """Cache the kept frames before a run, or place windows without a cache in their video."""
        run = self.run
        if not run.uses_cache:
            self.denoiser.set_frame_offset(self.frame_offset)
        elif before is not None:
            rollout = self.sampling.rollout
            clip = run.spans[0].before
            assert rollout is not None and clip is not None
            self.denoiser.skip_frames(clip.start // self.conditioning.scale.time, rollout)
            self.denoiser.cache_frames(before, rollout, rollout.context_sigma)

    def _decode(self, step: WindowStep, latent: Float[Tensor, "1 c t h w"], position: int) -> int:
        """Queue generated latent frames for decoding, in order of time.

        `position` is the first latent frame of an edit that is not queued; returns the next one.
        """
        if self.reviewer is not None:
            self.reviewer.accept(step)
        if self.run.uses_cache:
            self.decoder.put(latent, step.window)
            return position
        first = step.window.generated[0]
        self.conditioning.add_known(first, latent[0])
        self._finished[first] = (step, latent)
        while position in self._finished:
            finished, run = self._finished.pop(position)
            self.decoder.put(run, finished.window)
            position += run.shape[2]
        return position


class Compositor:
    """Blends generated frames at the seams and composites them over the source under the mask.

    Inside the mask pixels are generated, at its soft edge mixed, outside copied bit for bit.
    """

    def __init__(self, run: RunPlan, conditioning: Conditioning) -> None:
        self._run = run
        self._sources = conditioning.sources
        self._blender = SeamBlender(run.frames, *conditioning.neighbours())
        self._position = 0

    def finish(self, frames: UInt8[Tensor, "t h w c"]) -> RenderedFrames:
        """The next output frames of the run; frames near a seam may be held back."""
        frames = self._blender.blend(frames)
        start = self._position
        self._position += len(frames)
        span = self._run.spans[0]
        if not span.masked or not len(frames):
            return RenderedFrames(frames)
        opened = self._sources
        assert opened is not None and opened.mask is not None
        clip = span.init_clips[0]
        begin = clip.start + start
        end = clip.start + self._position
        source = opened.sources[clip.source].read(begin, end)
        soft_mask = opened.soft_mask(begin, end)
        weight = rearrange(soft_mask, "t h w -> t h w 1")
        mixed = torch.lerp(source.float(), frames.float(), weight).round().to(torch.uint8)
        composed = torch.where(weight > 0, mixed, source)
        return RenderedFrames(composed, mask=rearrange(weight > 0, "t h w 1 -> t h w"))
