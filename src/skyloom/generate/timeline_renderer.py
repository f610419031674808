"""The executor of timelines: frames that are kept pass by, spans that are made are made between them.

Everything streams: a span reads only the frames that it sees, starts from or covers, and what is kept of a film of an
hour never lies in memory at once. Noise hangs on the seed and the span's name, never on where in the video it lies.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from skyloom import __version__
from skyloom.core.seeds import derive_seed
from skyloom.core.types import LatentShape
from skyloom.diffusion.canvas import Canvas, to_latent_mask
from skyloom.generate.denoiser import Denoiser
from skyloom.generate.executor import Lanes
from skyloom.generate.layout import Layout
from skyloom.generate.plan import Plan
from skyloom.generate.receipt import hash_picture, weights_digest
from skyloom.generate.resume import WindowStore
from skyloom.generate.rollout import Job, Projector, Window, WindowStep, roll_out
from skyloom.generate.seam_blending import Fade
from skyloom.generate.span_cache import SpanIdentity, SpanStore
from skyloom.generate.timeline import Clip, Filter, Generate
from skyloom.media.filters import interpolate, upscale
from skyloom.media.frames import to_pixels
from skyloom.media.masks import Mask, feather
from skyloom.media.source import Source
from skyloom.models.registry import ModelInfo
from skyloom.models.vae import Vae

Frames = UInt8[Tensor, "t h w c"]


@dataclass(frozen=True, eq=False)
class Splicer:
    """What spans are made with, at a `size` of height and width.

    `speaker` gives a fresh denoiser that says a prompt; `job` is a rollout's but for what is made; `mark` puts the
    watermark on frames, or where it is told; `kept` finds and keeps the latents of spans that were made before. Windows
    in the middle of something stand at latent frame `horizon`, where no sketch of the prompt fights with what is known.
    """

    vae: Vae
    lanes: Lanes
    device: torch.device
    sources: Sequence[Source]
    job: Job
    speaker: Callable[[str], Denoiser]
    mark: Callable[[Frames, Bool[Tensor, "t h w"] | None], Frames]
    steadiness: float
    horizon: int
    size: tuple[int, int]
    mask: Mask | None = None
    softness: int = 0
    kept: SpanStore | None = None

    def make(
        self, span: Generate, layout: Layout, store: WindowStore | None = None
    ) -> Iterator[WindowStep | Frames]:
        """The steps of a span's windows, and its frames as they are done; what a `store` has is not made again."""
        tape = Tape(span, layout, self)
        known = frozenset((0, cell) for cell in range(layout.left))
        screen = _Composer(span, self, Fade(span.frames, *tape.beside()))
        projector = Projector(self.vae, self.lanes, self.device, self.steadiness, known)
        shown = (layout.lead, layout.lead + span.frames)
        if layout.left:
            projector.put(tape.known(0, layout.left)[None], _part(0, layout.left, shown))
        for at, made in self._windows(span, layout, tape, store):
            if isinstance(made, WindowStep):
                yield made
                continue
            yield from map(screen.finish, projector.ready(most_waiting=0))
            projector.put(
                made, _part(at, min(at + made.shape[2], layout.left + layout.made), shown)
            )
            yield from map(screen.finish, projector.ready())
        yield from map(screen.finish, projector.ready(most_waiting=0))

    def _windows(
        self, span: Generate, layout: Layout, tape: "Tape", store: WindowStore | None
    ) -> Iterator[tuple[int, WindowStep | Tensor]]:
        """Steps, and runs of made latent frames in the order of time with the number of their first."""
        before = None if self.kept is None else self.kept.load(span)
        if before is not None:
            for first, end in sorted(
                layout.makes
            ):  # as they were made: they are decoded to the same bits
                yield first, before[:, :, first - layout.left : end - layout.left]
            return
        done: dict[int, Tensor] = {}
        whole: list[Tensor] = []
        at = layout.left
        for step in self._roll_out(span, layout, tape, store):
            yield 0, step
            if step.finished is None:
                continue
            first, end = layout.makes[step.window.index]
            run = step.finished[:, :, first - step.window.start : end - step.window.start]
            tape.learn(first, run[0])
            done[first] = run
            while at in done:
                whole.append(done.pop(at))
                yield at, whole[-1]
                at += whole[-1].shape[2]
        if self.kept is not None:
            self.kept.save(span, torch.cat(whole, dim=2))

    def _roll_out(
        self, span: Generate, layout: Layout, tape: "Tape", store: WindowStore | None
    ) -> Iterator[WindowStep]:
        denoiser = self.speaker(span.prompt)
        rollout = self.job.rollout
        if layout.memory and layout.left:
            assert rollout is not None and span.before is not None
            denoiser.pass_by(span.before.start // self.vae.config.scale.time, rollout)
            denoiser.remember(tape.known(0, layout.left)[None], rollout, rollout.context_sigma)
        if not layout.memory:
            denoiser.stand(self.horizon)
        seed = derive_seed(self.job.seed, "span", span.name)
        own = replace(
            self.job, windows=layout.windows, canvas_at=tape.canvas, seed=seed, store=store
        )
        yield from roll_out(own, denoiser)


@dataclass
class Tape:
    """The frames and latent frames around a span: what is before, what lies under it, what is after."""

    span: Generate
    layout: Layout
    tools: Splicer
    _cells: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """What is known is read once."""
        layout = self.layout
        for first, end in ((0, layout.left), (layout.left + layout.made, layout.cells)):
            if first < end:
                self.learn(first, self.known(first, end))

    def learn(self, first: int, run: Float[Tensor, "c t h w"]) -> None:
        """Latent frames that are known now."""
        self._cells.update({first + index: cell for index, cell in enumerate(run.unbind(1))})

    def canvas(self, window: Window) -> Canvas:
        """What a window begins with: known and made latent frames, and what lies under those it is to make."""
        span, layout = self.span, self.layout
        first, end = layout.makes[window.index]
        scale, config = self.tools.vae.config.scale, self.tools.vae.config
        height, width = (side // scale.space for side in self.tools.size)
        canvas = Canvas.text_to_video(
            config.latent_channels, LatentShape(window.stop - window.start, height, width)
        )
        for cell in range(window.start, window.stop):
            if not first <= cell < end:
                canvas = canvas.keep(cell - window.start, self._cells[cell][:, None])
        if not span.init_clips:
            return canvas
        latent, mask = canvas.latent.clone(), canvas.denoise_mask.clone()
        here = slice(first - window.start, end - window.start)
        latent[:, here] = self.known(first, end)
        if span.masked:
            mask[here] = self._mask_cells(first, end)
        strength = torch.ones(canvas.frames)
        strength[here] = span.strength
        return replace(
            canvas,
            latent=latent,
            denoise_mask=mask,
            strength=strength if span.strength < 1 else None,
        )

    @torch.no_grad()
    def known(self, first: int, end: int) -> Float[Tensor, "c t h w"]:
        """Latent frames `first` to `end` of the sources' frames: the encoder takes each by itself."""
        start, stop = self._frames_of(first, end)
        frames = self.read(start, stop)
        if first:
            frames = torch.cat([frames[:1], frames])
        pixels = to_pixels(frames)[None].to(self.tools.device)
        latent = self.tools.lanes.run_one(partial(self.tools.vae.encode, pixels))[0].cpu()
        return latent[:, 1:] if first else latent

    def _frames_of(self, first: int, end: int) -> tuple[int, int]:
        scale = self.tools.vae.config.scale
        return (scale.video_frames(first) if first else 0), scale.video_frames(end)

    def _mask_cells(self, first: int, end: int) -> Bool[Tensor, "t h w"]:
        assert self.tools.mask is not None and self.span.init_clips
        start, stop = self._frames_of(first, end)
        mask = self._mask(start, stop)
        cells = to_latent_mask(
            torch.cat([mask[:1], mask]) if first else mask, self.tools.vae.config.scale
        )
        return cells[1:] if first else cells

    def _mask(self, start: int, stop: int) -> Bool[Tensor, "t h w"]:
        """The mask of local frames; beside the span nothing is masked."""
        lead, count, origin = self.layout.lead, self.span.frames, self.span.init_clips[0].start
        begin, end = max(start, lead), min(stop, lead + count)
        assert self.tools.mask is not None
        inside = self.tools.mask.read(origin + begin - lead, origin + end - lead)
        none = inside.new_zeros(1, *inside.shape[1:])
        return torch.cat(
            [none.expand(begin - start, -1, -1), inside, none.expand(stop - end, -1, -1)]
        )

    def read(self, start: int, stop: int) -> Frames:
        """Local frames: number `lead` is the span's first. Beyond the last known one, that stands still."""
        lead, count = self.layout.lead, self.span.frames
        parts = []
        if start < lead:
            assert self.span.before is not None
            back = self.span.before.frames - lead
            parts.append(self._clip(self.span.before, start + back, min(stop, lead) + back))
        begin, end = max(start, lead) - lead, min(stop, lead + count) - lead
        if begin < end and self.span.init_clips:
            parts.append(self.underlay(begin, end))
        elif begin < end:
            parts.append(self._blank(end - begin))
        begin, end = max(start - lead - count, 0), stop - lead - count
        if end > 0:
            after = self.span.after
            there = 0 if after is None else min(end, after.frames)
            if after is not None and begin < there:
                parts.append(self._clip(after, begin, there))
            missing = end - max(begin, there)
            if missing:
                still = parts[-1][-1:] if parts else self._blank(1)
                parts.append(still.expand(missing, -1, -1, -1))
        return torch.cat(parts)

    def beside(self) -> tuple[UInt8[Tensor, "h w c"] | None, UInt8[Tensor, "h w c"] | None]:
        """The kept frames right before and right after the span, as far as it may look at them."""
        before, after = self.span.before, self.span.after
        return (
            self._clip(before, before.frames - 1, before.frames)[0]
            if before and before.frames
            else None,
            self._clip(after, 0, 1)[0] if after and after.frames else None,
        )

    def underlay(self, start: int, stop: int) -> Frames:
        """What lies under frames `start` to `stop` of the span: one source's frames, or a mix of two."""
        first = self._clip(self.span.init_clips[0], start, stop)
        if len(self.span.init_clips) == 1:
            return first
        other = self._clip(self.span.init_clips[1], start, stop).float()
        shares = rearrange(torch.tensor(self.span.mix_shares[start:stop]), "t -> t 1 1 1")
        return torch.lerp(first.float(), other, shares).round().to(torch.uint8)

    def _clip(self, clip: Clip, start: int, stop: int) -> Frames:
        return self.tools.sources[clip.source].read(clip.start + start, clip.start + stop)

    def _blank(self, count: int) -> Frames:
        return torch.zeros(count, *self.tools.size, 3, dtype=torch.uint8)


@dataclass
class _Composer:
    """Fades made frames into those beside them and puts them over their source: inside of the mask, softly at its
    edge; outside, not a bit changes."""

    span: Generate
    tools: Splicer
    fade: Fade
    _at: int = 0

    def finish(self, frames: Frames) -> Frames:
        """The next frames of the span as they are shown; some may wait for those after them."""
        frames, start = self.fade.take(frames), self._at
        self._at += len(frames)
        if not self.span.masked or not len(frames):
            return self.tools.mark(frames, None)
        assert self.tools.mask is not None
        clip = self.span.init_clips[0]
        begin, end = clip.start + start, clip.start + self._at
        source = self.tools.sources[clip.source].read(begin, end)
        weight = rearrange(
            feather(self.tools.mask.read(begin, end), self.tools.softness), "t h w -> t h w 1"
        )
        mixed = torch.lerp(source.float(), frames.float(), weight).round().to(torch.uint8)
        composed = torch.where(weight > 0, mixed, source)
        return self.tools.mark(composed, rearrange(weight > 0, "t h w 1 -> t h w"))


def _part(start: int, stop: int, shown: tuple[int, int]) -> Window:
    """A run of latent frames to decode."""
    return Window(0, start, stop, stop, stop, shown)


def filtered(source: Source, span: Filter) -> Iterator[Frames]:
    """A clip's frames gone over by a filter."""
    frames = source.stream(span.clip.start, span.clip.stop)
    return (
        upscale(frames, span.size)
        if span.size is not None
        else interpolate(frames, source.fps, source.fps * span.rate_factor)
    )


def span_identity(
    plan: Plan, info: ModelInfo, device: torch.device, dtype: torch.dtype
) -> SpanIdentity:
    """What the made spans of an edit's plan hang on."""
    footage, edit = plan.footage, plan.request.edit
    assert footage is not None and edit is not None
    about = {
        "skyloom": __version__,
        "weights": weights_digest(info.manifest.get("files", {})),
        "made with": f"{device.type} {dtype}",
        "seed": plan.seed,
        "steps": plan.num_steps,
        "guidance": plan.guidance_scale,
        "student": plan.student,
        "negative": plan.request.negative_prompt,
        "mask": edit.region if edit.mask is None else hash_picture(Path(edit.mask)),
        "size": plan.shape.size,
    }
    clips = [
        f"{source.sha256} {source.fps} {source.width}x{source.height}" for source in footage.sources
    ]
    return SpanIdentity(about, clips)
