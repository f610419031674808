# pyright: basic
"""Render a run: sample its windows, decode them, blend seams and composite under a mask.

Everything streams: a run reads only the frames that condition it, start it or lie under its mask,
so memory does not grow with the length of the sources.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial

import torch
from einops import rearrange
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from skyloom.core.audio import Audio, samples_at
from skyloom.core.seeds import derive_seed
from skyloom.generate.conditioning import Conditioning
from skyloom.generate.decoding import StreamingDecoder
from skyloom.generate.denoiser import Denoiser
from skyloom.generate.executor import DeterministicExecutor
from skyloom.generate.sampling import SamplingSpec, WindowStep, generate_windows
from skyloom.generate.seam_blending import SeamBlender
from skyloom.generate.window_review import WindowReviewer
from skyloom.generate.windows import RunPlan, Window, decode_whole, first_frame
from skyloom.models.base import SoundModel, TextCondition


@dataclass(frozen=True, eq=False)
class RenderedFrames:
    """Frames of the video in order.

    Generated ones are watermarked, in the pixels of `mask` if there is one; kept ones are not.
    """

    frames: UInt8[Tensor, "t h w c"]
    generated: bool = True
    mask: Bool[Tensor, "t h w"] | None = None


@dataclass(frozen=True, eq=False)
class RenderedSound:
    """Sound that follows the sound before it, for frames that follow."""

    audio: Audio


class WindowSound:
    """Makes the sound of a run's windows in order of time.

    `first_frame` is the run's first frame in the video. The end of a window's sound is a sample
    index computed from its last frame, so windows add up without drift.
    """

    def __init__(
        self,
        model: SoundModel,
        executor: DeterministicExecutor,
        conditioning: Conditioning,
        texts: Sequence[TextCondition],
        *,
        first_frame: int,
        seed: int,
    ) -> None:
        self._model = model
        self._executor = executor
        self._conditioning = conditioning
        self._texts = texts
        self._frame = first_frame
        self._seed = seed

    def of(self, latent: Float[Tensor, "1 c t h w"], window: Window) -> RenderedSound | None:
        """The sound of the frames that a window shows; None if it shows none."""
        scale = self._conditioning.scale
        first, end = window.display_range
        begin = max(first, first_frame(window.generated[0], scale))
        count = min(end, scale.video_frames(window.decode_until)) - begin
        if count <= 0:
            return None
        fps = self._conditioning.fps
        rate = self._model.rate
        start = samples_at(self._frame / fps, rate)
        self._frame += count
        make = partial(
            self._model.generate,
            latent,
            self._texts[window.span],
            samples_at(self._frame / fps, rate) - start,
            derive_seed(self._seed, "sound", window.index),
        )
        return RenderedSound(Audio(self._executor.run_one(make).float().cpu(), rate))


def make_silence(model: SoundModel, fps: Fraction, start: int, stop: int) -> Audio:
    """Silence for frames [start, stop) of a video."""
    begin, end = (samples_at(frame / fps, model.rate) for frame in (start, stop))
    return Audio(torch.zeros(model.channels, end - begin), model.rate)


@dataclass
class RunRenderer:
    """Renders one run.

    `reviewer` scores every window if the request has a critic; `sound` makes the sound of a family
    that has one.
    """

    run: RunPlan
    conditioning: Conditioning
    sampling: SamplingSpec
    denoiser: Denoiser
    decoder: StreamingDecoder
    reviewer: WindowReviewer | None = None
    sound: WindowSound | None = None
    _finished: dict[int, tuple[Tensor, Window]] = field(default_factory=dict)
    _order: list[int] = field(default_factory=list)  # windows to decode, in order of time

    def __post_init__(self) -> None:
        windows = sorted(self.run.windows, key=lambda one: (one.shot, one.generated[0], one.index))
        self._order = [window.index for window in windows]

    def render(self) -> Iterator[WindowStep | RenderedFrames | RenderedSound]:
        """Yield the sampler steps, and sound and frames as they are decoded, in order of time.

        The sound of a frame comes before it.
        """
        run = self.run
        compositor = Compositor(run, self.conditioning)
        before = self.conditioning.before
        if before is not None:
            display = (run.lead_frames, run.lead_frames + run.frames)
            self.decoder.put(before, decode_whole(0, run.known_before, display))
        self._prepare_denoiser(before)
        for step in generate_windows(self.sampling, self.denoiser):
            yield step
            if step.generated is not None:
                yield from map(compositor.finish, self.decoder.ready(max_pending=0))
                for latent, window in self._in_order(step, step.generated):
                    sound = None if self.sound is None else self.sound.of(latent, window)
                    if sound is not None:
                        yield sound
                    self.decoder.put(latent, window)
            yield from map(compositor.finish, self.decoder.ready())
        yield from map(compositor.finish, self.decoder.ready(max_pending=0))

    def _prepare_denoiser(self, before: Float[Tensor, "1 c t h w"] | None) -> None:
        """Cache the kept frames before a run."""
        run = self.run
        if run.uses_cache and before is not None:
            rollout = self.sampling.rollout
            clip = run.spans[0].before
            assert rollout is not None and clip is not None
            self.denoiser.skip_frames(clip.start // self.conditioning.scale.time, rollout)
            self.denoiser.cache_frames(before, rollout, rollout.context_sigma)

    def _in_order(
        self, step: WindowStep, latent: Float[Tensor, "1 c t h w"]
    ) -> Iterator[tuple[Float[Tensor, "1 c t h w"], Window]]:
        """Yield the generated latents that may be decoded now, in order of time.

        Without a cache, the final ones are known to later windows.
        """
        if self.reviewer is not None:
            self.reviewer.accept(step)
        window = step.window
        if not self.run.uses_cache:
            first = window.generated[0]
            final = latent[0, :, : max(0, window.cache_until - first)]
            self.conditioning.add_known(first, final, window.shot)
            self.conditioning.forget_before(window.index + 1)
        self._finished[window.index] = (latent, window)
        while self._order and self._order[0] in self._finished:
            yield self._finished.pop(self._order.pop(0))


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
