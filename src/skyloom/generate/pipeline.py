"""The pipeline: encode the text, sample latents, decode frames; every step is yielded.

`Pipeline.stream` yields a Step after each unit of work; its consumer shows progress or previews, or
stops. The same request, seed and version give the same frames: noise is drawn from the request's
seed, and several requests run one after another.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from skyloom.core.device import choose_device, choose_dtype
from skyloom.core.errors import RequestError, SafetyError
from skyloom.core.paths import cache_folder
from skyloom.diffusion.canvas import Canvas
from skyloom.diffusion.schedule import make_sigmas
from skyloom.generate.cards import Card
from skyloom.generate.conditioning import (
    LatentCondition,
    align_to_latent_frames,
    read_card_media,
)
from skyloom.generate.denoiser import Denoiser
from skyloom.generate.executor import DeterministicExecutor
from skyloom.generate.plan import Plan, make_plan
from skyloom.generate.receipt import FramesHash, Receipt, make_receipt
from skyloom.generate.request import Request
from skyloom.generate.resume import WindowStore, clear
from skyloom.generate.rollout import (
    Critic,
    SamplingSpec,
    StreamingDecoder,
    Window,
    WindowStep,
    generate_windows,
)
from skyloom.generate.span_cache import SpanStore
from skyloom.generate.storyboard import PlacedCard
from skyloom.generate.timeline import Filter, Keep
from skyloom.generate.timeline_renderer import TimelineRenderer, filter_frames, span_identity
from skyloom.generate.window_review import WindowReviewer
from skyloom.media.frames import to_frames, to_pixels
from skyloom.media.seam_metric import SeamMetric
from skyloom.media.video import Video
from skyloom.models.base import ModelBundle, TextCondition, TextContext
from skyloom.models.checkpoint import verify_manifest
from skyloom.models.diorama.text_encoder import DioramaTextEncoder
from skyloom.models.diorama.v1.autoencoder import Vae, place
from skyloom.models.diorama.v1.transformer import Dit
from skyloom.models.registry import ModelInfo, find_model
from skyloom.safety.frame_moderation import StreamModerator, check_files, load_frame_moderator
from skyloom.safety.watermark import SpreadSpectrumWatermarker, watermark_id_of_receipt


@dataclass(frozen=True, eq=False)
class Step:
    """A finished unit of work: `index` (from 1) of `total` in phase "text", "denoise" or "decode".

    `notice` is a warning for the user. "decode" steps carry the next `frames`; the last step
    carries the `receipt` and, if frames are collected, the whole `video`.
    """

    phase: str
    index: int
    total: int
    latent: Float[Tensor, "c t h w"] | None = field(default=None, repr=False)
    frames: UInt8[Tensor, "t h w c"] | None = field(default=None, repr=False)
    receipt: dict[str, object] | None = field(default=None, repr=False)
    video: Video | None = field(default=None, repr=False)
    notice: str | None = None
    vae: Vae | None = field(default=None, repr=False)

    @torch.no_grad()
    def preview(self) -> UInt8[Tensor, "h w c"] | None:
        """Decode the middle latent frame of a "denoise" step into a picture."""
        if self.latent is None or self.vae is None:
            return None
        middle = self.latent.shape[1] // 2
        device = self.vae.decoder.linear.weight.device
        cell = self.latent[None, :, middle : middle + 1].to(device)
        return to_frames(self.vae.decode(cell)[0])[0]


class _OutputStage:
    """Turns decoded frames into steps: drop frames for a lower rate, watermark, moderate, hash.

    `plan.keep_every` sets which frames are dropped. Frames of an edit arrive watermarked. With
    `collect`, frames are kept for the video of the last step.
    """

    def __init__(
        self, plan: Plan, receipt: Receipt, watch: StreamModerator | None, *, collect: bool
    ) -> None:
        self._plan = plan
        self._receipt = receipt
        self._watch = watch
        self._hash = FramesHash(plan.fps)
        self._marker = SpreadSpectrumWatermarker(watermark_id_of_receipt(receipt.to_dict()))
        self._collected: list[Tensor] | None = [] if collect else None
        self._frames = 0
        self._done = 0  # decoder chunks, or frames of an edit
        self._seams: SeamMetric | None = None
        if plan.timeline is None:
            self._total = sum(len(window.decode_chunks) for window in plan.windows)
        else:
            self._total = plan.shape.frames
            self._seams = SeamMetric(plan.timeline.seams)

    def add_notes(self, notes: Mapping[str, Any]) -> None:
        """Add notes to the receipt."""
        self._receipt = replace(self._receipt, notes={**self._receipt.notes, **notes})

    @property
    def mark(self) -> Callable[[Tensor, Tensor | None], Tensor]:
        """Watermark the next generated frames of an edit."""
        return self._marker.mark

    def process(self, frames: UInt8[Tensor, "t h w c"]) -> Step:
        """The "decode" step of the next frames. Raises SafetyError if moderation blocks them."""
        every = self._plan.keep_every
        output = frames[-self._frames % every :: every].clone()
        if self._seams is None:
            output = self._marker.mark(output)
        if self._watch is not None:
            self._watch.check(output)
        self._frames += len(frames)
        self._done += 1 if self._seams is None else len(frames)
        self._hash.add(output)
        if self._seams is not None:
            self._seams.take(output)
        if self._collected is not None:
            self._collected.append(output)
        if self._done < self._total:
            return Step("decode", self._done, self._total, frames=output)
        return self._last_step(output)

    def _last_step(self, output: UInt8[Tensor, "t h w c"]) -> Step:
        notes = {**self._receipt.notes, **self._seam_notes()}
        receipt = replace(self._receipt, frames=self._hash.digest(), notes=notes).to_dict()
        video = None
        if self._collected is not None:
            video = Video(torch.cat(self._collected), self._plan.fps, receipt)
        return Step("decode", self._done, self._total, frames=output, receipt=receipt, video=video)

    def _seam_notes(self) -> dict[str, Any]:
        """Return the change at each seam over the ordinary change; also at the end of a loop."""
        if self._seams is None:
            return {}
        notes: dict[str, Any] = {
            "seams": {str(seam): round(ratio, 3) for seam, ratio in self._seams.ratios().items()}
        }
        if self._plan.timeline is not None and self._plan.timeline.loops:
            notes["closure"] = round(self._seams.closure(), 3)
        return notes


class Pipeline:
    """A loaded model that generates videos."""

    def __init__(
        self,
        info: ModelInfo,
        text: DioramaTextEncoder,
        dit: Dit,
        vae: Vae,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.info = info
        self.device = device
        self.executor = DeterministicExecutor(device)
        self.text = text
        self.dtype = dtype
        self.dit = dit.eval().to(device, dtype)
        self.vae = place(vae, device, dtype)

    def plan(self, request: Request) -> Plan:
        """Check a request and compute its plan. Raises RequestError."""
        name = request.model
        if (
            name not in (None, self.info.name)
            and Path(name).resolve() != self.info.folder.resolve()
        ):
            raise RequestError(
                f"model must be {self.info.name}, the model of this pipeline, got {name}.",
                hint=f"Use skyloom.load({name!r}).",
                field="model",
            )
        return make_plan(request, self.info, self.vae.config.scale)

    def generate(self, request: Request | str, **fields: Any) -> Video:
        """Generate a video from a Request, or from a prompt and fields of a Request."""
        for step in self.stream(request, **fields):
            if step.video is not None:
                return step.video
        raise AssertionError("a stream ends with a video")

    def generate_many(self, requests: Sequence[Request]) -> list[Video]:
        """Generate several videos in sequence, each as if it were generated alone."""
        return [self.generate(request) for request in requests]

    def stream(
        self,
        request: Request | Plan | str,
        *,
        collect: bool = True,
        resume: Path | None = None,
        save_every: float = 0.0,
        critic: Critic | None = None,
        **fields: Any,
    ) -> Iterator[Step]:
        """Generate a video step by step; stop iterating to cancel.

        The request and its media are checked before the first step. Frames are moderated as they
        are decoded (SafetyError; checkpoints are then deleted). A Plan of this pipeline is used
        without checking it again.

        collect: keep all frames and return them as the last step's `video`. Without it, memory
            does not grow with the length.
        resume: folder of checkpoints. The same request and seed continue where they stopped and
            give the same frames. Checkpoints are written at most every `save_every` seconds, and
            when the iterator is closed.
        critic: scores every window (skyloom.evaluate.window_quality has one). Windows that exceed
            its bounds are sampled again up to `retakes` times; the receipt lists all scores.
        """
        plan = self._planned(request, fields)
        judge = load_frame_moderator()
        if judge is not None:
            check_files(judge, map(Path, plan.request.media))
        conditions = self._conditions(plan)
        if plan.request.retakes is not None and critic is None:
            raise RequestError(
                f"critic must be given for retakes = {plan.request.retakes}, got None.",
                hint="Pass critic=, or leave retakes out.",
            )
        notes = None if critic is None else {"critic": {"bounds": dict(critic.bounds)}}
        receipt = make_receipt(plan, self.info, self.device, self.dtype, notes=notes)
        store = None if resume is None else WindowStore(resume, receipt.to_dict(), save_every)
        spec = self._sampling_spec(plan, conditions, store)
        watch = None if judge is None else StreamModerator(judge, plan.fps)
        output = _OutputStage(plan, receipt, watch, collect=collect)
        if plan.timeline is None:
            return _with_checkpoints(self._run(plan, spec, output, conditions, critic), store)
        identity = span_identity(plan, self.info, self.device, self.dtype)
        folder = cache_folder()
        cache = None if folder is None else SpanStore(folder / "spans", identity)
        stores = [
            None if store is None else store.span(number, identity.of(span))
            for number, span in enumerate(plan.timeline.generated_spans)
        ]
        steps = self._run_edit(plan, spec, output, cache=cache, stores=stores)
        return _with_checkpoints(steps, store, cache)

    def _planned(self, request: Request | Plan | str, fields: Mapping[str, Any]) -> Plan:
        if isinstance(request, Plan):
            return self.plan(request.request.with_fields(fields)) if fields else request
        if isinstance(request, str):
            request = Request(request)
        return self.plan(request.with_fields(fields))

    def _sampling_spec(
        self, plan: Plan, conditions: Sequence[LatentCondition], store: WindowStore | None
    ) -> SamplingSpec:
        """The sampling settings of a plan; `_run` and `_run_edit` complete them."""
        return SamplingSpec(
            windows=plan.windows,
            canvas_at=self._canvas_at(plan, conditions),
            sigmas=make_sigmas(plan.num_steps, self.info.shift),
            seed=plan.seed,
            rollout=self.info.rollout,
            store=store,
            card_seeds={
                index: placed.card.seed
                for index, placed in enumerate(plan.cards)
                if placed.card.seed is not None
            },
            noise_correlation=self.info.noise_correlation,
            retakes=plan.request.retakes or 0,
        )

    def _run(
        self,
        plan: Plan,
        spec: SamplingSpec,
        output: _OutputStage,
        conditions: Sequence[LatentCondition],
        critic: Critic | None,
    ) -> Iterator[Step]:
        """Sample the windows of a prompt or storyboard, and decode each while the next is made."""
        prompts = [placed.text for placed in plan.cards] or [plan.request.prompt]
        context = self._encode_prompts(plan, prompts)
        yield Step("text", 1, 1, notice=_notice(plan, context))
        known = frozenset[tuple[int, int]]().union(*(one.fixed_frames for one in conditions))
        decoder = StreamingDecoder(
            self.vae, self.executor, self.device, self.info.steadiness, known
        )
        reviewer = None if critic is None else WindowReviewer(critic, decoder)
        texts = [self._text_conditions(plan, context, row) for row in range(len(prompts))]
        denoiser = self._make_denoiser(plan, texts[0])

        def set_prompt(window: Window) -> None:
            previous = texts[window.card - 1] if window.prompt_fade else None
            denoiser.set_prompt(texts[window.card], previous, window.prompt_fade)

        score = None if reviewer is None else reviewer.score
        for step in generate_windows(
            replace(spec, set_prompt=set_prompt, score_window=score), denoiser
        ):
            yield self._denoise_step(plan, step)
            if step.finished is not None:
                yield from map(output.process, decoder.ready(max_pending=0))
                if reviewer is not None:
                    reviewer.accept(step)
                    output.add_notes(reviewer.notes())
                decoder.put(step.finished, step.window)
            yield from map(output.process, decoder.ready())
        yield from map(output.process, decoder.ready(max_pending=0))

    def _run_edit(
        self,
        plan: Plan,
        spec: SamplingSpec,
        output: _OutputStage,
        *,
        cache: SpanStore | None,
        stores: Sequence[WindowStore | None],
    ) -> Iterator[Step]:
        """Copy, filter or generate the spans of a timeline in order."""
        timeline = plan.timeline
        opened = plan.edit_sources
        assert timeline is not None and opened is not None
        prompts = list(dict.fromkeys(span.prompt for span in timeline.generated_spans))
        texts: dict[str, list[TextCondition]] = {}
        if prompts:
            context = self._encode_prompts(plan, prompts)
            for row, prompt in enumerate(prompts):
                texts[prompt] = self._text_conditions(plan, context, row)
            yield Step("text", 1, 1, notice=_notice(plan, context))
        renderer = TimelineRenderer(
            vae=self.vae,
            executor=self.executor,
            device=self.device,
            sources=opened.sources,
            sampling=spec,
            make_denoiser=lambda prompt: self._make_denoiser(plan, texts[prompt]),
            mark=output.mark,
            smoothing_level=self.info.steadiness,
            frame_offset=self.dit.config.horizon,
            size=(plan.shape.height, plan.shape.width),
            mask=opened.mask,
            feather=opened.feather,
            cache=cache,
        )
        layouts = zip(plan.layouts, stores, strict=True)
        windows_done = 0
        for span in timeline.spans:
            if isinstance(span, Keep):
                source = opened.sources[span.clip.source]
                frames = source.stream(span.clip.start, span.clip.stop)
                yield from map(output.process, frames)
            elif isinstance(span, Filter):
                yield from map(output.process, filter_frames(opened.sources[0], span))
            else:
                layout, store = next(layouts)
                for item in renderer.render(span, layout, store):
                    if isinstance(item, WindowStep):
                        yield self._denoise_step(plan, item, windows_done)
                    elif len(item):
                        yield output.process(item)
                windows_done += len(layout.windows)

    def _make_denoiser(self, plan: Plan, conditions: Sequence[TextCondition]) -> Denoiser:
        return Denoiser(
            self.dit, self.executor, conditions, plan.guidance_scale, student=plan.student
        )

    def _denoise_step(self, plan: Plan, step: WindowStep, windows_before: int = 0) -> Step:
        """The Step of a sampler step; `windows_before` counts windows of earlier spans."""
        index = (windows_before + step.window.index) * plan.num_steps + step.step.index + 1
        total = len(plan.windows) * plan.num_steps
        return Step("denoise", index, total, step.step.denoised[0], vae=self.vae)

    def _canvas_at(
        self, plan: Plan, conditions: Sequence[LatentCondition]
    ) -> Callable[[Window], Canvas]:
        """The function from a window to its canvas. The spans of an edit make their own."""
        if plan.timeline is not None:
            return _no_canvas
        latent_shape = self.vae.config.scale.latent_shape(plan.shape)

        def canvas_at(window: Window) -> Canvas:
            shape = replace(latent_shape, frames=window.stop - window.start)
            canvas = Canvas.text_to_video(self.vae.latent_channels, shape)
            for condition in conditions:
                canvas = condition.apply_to(canvas, window)
            return canvas

        return canvas_at

    def _conditions(self, plan: Plan) -> list[LatentCondition]:
        """Latent conditions from the first image and the media of cards."""
        placed = [one for one in plan.cards if one.media]
        if plan.request.image is not None:
            first = Card("0", "", image=plan.request.image)
            placed.insert(0, PlacedCard(first, frame=0, shot=0, offset=0, fade_frames=0, text=""))
        return [self._condition(one, plan) for one in placed]

    @torch.no_grad()
    def _condition(self, placed: PlacedCard, plan: Plan) -> LatentCondition:
        """Encode the media of a card."""
        frames = read_card_media(placed, plan.shape, self.info.fps)
        frames, start, skip = align_to_latent_frames(frames, placed.offset, self.vae.config.scale)
        pixels = to_pixels(frames)[None].to(self.device)
        latent = self.executor.run_one(partial(self.vae.encode, pixels))[0, :, skip:].cpu()
        return LatentCondition(placed.shot, start, latent, placed.card.strength)

    def _encode_prompts(self, plan: Plan, prompts: Sequence[str]) -> TextContext:
        """Encode the prompts and, as the last row, the negative prompt."""
        texts = [*prompts, plan.request.negative_prompt]
        return self.executor.run_one(partial(self.text.encode, texts))

    def _text_conditions(self, plan: Plan, context: TextContext, row: int) -> list[TextCondition]:
        """The condition of one prompt and, with guidance, of the negative prompt."""
        rows = [row] if plan.guidance_scale == 1.0 else [row, len(context.context) - 1]
        return [self.executor.run_one(partial(self._text_condition, context, one)) for one in rows]

    def _text_condition(self, context: TextContext, row: int) -> TextCondition:
        """One row of a text context, without padding."""
        length = int(context.context_mask[row].sum())
        dtype = self.dit.head.weight.dtype
        tokens = context.context[row : row + 1, :length].to(self.device, dtype)
        pooled = context.pooled[row : row + 1].to(self.device, dtype)
        return self.dit.prepare_text(tokens, None, pooled)


def load(
    model: str = "diorama",
    *,
    device: str | None = None,
    dtype: str | None = None,
    verify: bool = True,
) -> Pipeline:
    """Load a model by name or folder; `verify` checks its file hashes.

    Raises RequestError for an unknown model, CheckpointError for a damaged one.
    """
    info = find_model(model)
    if verify:
        verify_manifest(info.folder, trust_cache=True)
    where = choose_device(device)
    parts: Any = ModelBundle.load(info, where, choose_dtype(where, dtype))
    return Pipeline(
        info,
        parts.text_encoder,
        parts.transformer,
        parts.autoencoder,
        device=where,
        dtype=parts.dtype,
    )


def _with_checkpoints(
    steps: Iterator[Step], store: WindowStore | None, cache: SpanStore | None = None
) -> Iterator[Step]:
    """Flush checkpoints if the consumer stops early; delete them if moderation blocks the video."""
    try:
        yield from steps
    except GeneratorExit:
        if store is not None:
            store.flush()
        raise
    except SafetyError:
        if store is not None:
            clear(store.folder)
        if cache is not None:
            cache.remove_used()
        raise


def _no_canvas(window: Window) -> Canvas:
    raise AssertionError("the spans of an edit make their own canvases")


def _notice(plan: Plan, context: TextContext) -> str | None:
    """Warnings for the user: truncated prompts, dropped frames, converted sources."""
    *truncated, negative = context.truncated
    notices: list[str] = []
    for number, count in enumerate(truncated, start=1):
        if count:
            name = f"The prompt of card {number}" if plan.cards else "The prompt"
            notices.append(f"{name} is too long: its last {count} tokens were ignored.")
    if negative:
        notices.append(f"The negative prompt is too long: its last {negative} tokens were ignored.")
    if plan.keep_every > 1:
        notices.append(f"Of the frames, one in {plan.keep_every} is kept.")
    if plan.edit_sources is not None:
        notices.extend(plan.edit_sources.notices)
    return " ".join(notices) or None
