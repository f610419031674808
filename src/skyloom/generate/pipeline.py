"""The pipeline: encode the text, build the canvas, sample, decode; every step is an event.

`Pipeline.stream` yields a Step after everything that takes time; whoever consumes it shows progress, previews
or stops. The same request, seed and version give the same frames: noise comes from the request's own seed, and
several requests are made one after another.
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
from skyloom.diffusion.canvas import Canvas
from skyloom.diffusion.schedule import make_sigmas
from skyloom.generate.cards import Card
from skyloom.generate.conditioning import Pin, fit_cells, read_pinned
from skyloom.generate.denoiser import Denoiser
from skyloom.generate.executor import Lanes
from skyloom.generate.plan import Plan, make_plan
from skyloom.generate.receipt import FramesHash, Receipt, make_receipt
from skyloom.generate.request import Request
from skyloom.generate.resume import WindowStore, clear
from skyloom.generate.rollout import Critic, Job, Projector, Window, WindowStep, roll_out
from skyloom.generate.span_cache import SpanStore, cache_folder
from skyloom.generate.storyboard import PlacedCard
from skyloom.generate.timeline import Filter, Keep
from skyloom.generate.timeline_renderer import Splicer, filtered, span_identity
from skyloom.generate.window_review import Jury
from skyloom.media.frames import to_frames, to_pixels
from skyloom.media.seam_metric import SeamMeter
from skyloom.media.video import Video
from skyloom.models.checkpoint import load_into, load_part, verify_manifest
from skyloom.models.dit import Dit, DitConfig, TextCondition
from skyloom.models.registry import ModelInfo, find_model
from skyloom.models.text import TextContext, TextEncoder, load_text_encoder
from skyloom.models.vae import Vae, VaeConfig, place
from skyloom.safety.frame_moderation import Watch, check_files, find_judge
from skyloom.safety.watermark import Marker, identity_of_making


@dataclass(frozen=True, eq=False)
class Step:
    """Something is done: step `index` (from 1) of `total` in a phase: "text", "denoise" or "decode".

    `notice` says what a user should know (a prompt cut short, frames left out). Decoding brings the next `frames` of
    the video; the last step brings its `receipt`, and the whole `video`.
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
        """The middle of the video as it looks now; decoded only when asked for."""
        if self.latent is None or self.vae is None:
            return None
        middle = self.latent.shape[1] // 2
        one = self.latent[None, :, middle : middle + 1].to(self.vae.decoder.linear.weight.device)
        return to_frames(self.vae.decode(one)[0])[0]


class _Screen:
    """Counts the frames that come in, leaves out those that the asked rate does without, and marks what was made of the
    others: what is seen, hashed and written is always marked, and looked at before by the policy's `watch`."""

    def __init__(self, plan: Plan, receipt: Receipt, watch: Watch | None, *, collect: bool) -> None:
        self._plan, self._receipt, self._hash, self._watch = (
            plan,
            receipt,
            FramesHash(plan.fps),
            watch,
        )
        self._marker = Marker(identity_of_making(receipt.to_dict()))
        self._kept: list[Tensor] | None = [] if collect else None
        self._frames = self._parts = 0
        self._total = (
            plan.shape.frames
            if plan.timeline
            else sum(len(window.parts) for window in plan.windows)
        )
        self._seams = None if plan.timeline is None else SeamMeter(plan.timeline.joins)

    def note(self, notes: Mapping[str, Any]) -> None:
        """What the receipt is to say besides."""
        self._receipt = replace(self._receipt, notes={**self._receipt.notes, **notes})

    @property
    def mark(self) -> Callable[[Tensor, Tensor | None], Tensor]:
        """Puts the watermark on the next made frames of an edit."""
        return self._marker.mark

    def show(self, frames: UInt8[Tensor, "t h w c"]) -> Step:
        """The step that these frames make; those of an edit come with their marks."""
        every = self._plan.keep_every
        shown = frames[-self._frames % every :: every].clone()
        shown = self._marker.mark(shown) if self._seams is None else shown
        if self._watch is not None:
            self._watch.check(shown)
        self._frames += len(frames)
        self._parts += 1 if self._seams is None else len(frames)
        self._hash.add(shown)
        if self._seams is not None:
            self._seams.take(shown)
        if self._kept is not None:
            self._kept.append(shown)
        if self._parts < self._total:
            return Step("decode", self._parts, self._total, frames=shown)
        notes = {**self._receipt.notes, **self._measured()}
        receipt = replace(self._receipt, frames=self._hash.digest(), notes=notes).to_dict()
        video = (
            None if self._kept is None else Video(torch.cat(self._kept), self._plan.fps, receipt)
        )
        return Step("decode", self._parts, self._total, frames=shown, receipt=receipt, video=video)

    def _measured(self) -> dict[str, Any]:
        """How the joins of an edit look, change over ordinary change; a loop's closure too."""
        if self._seams is None:
            return {}
        seams = {str(join): round(ratio, 3) for join, ratio in self._seams.ratios().items()}
        loops = self._plan.timeline is not None and self._plan.timeline.loops
        closure = {"closure": round(self._seams.closure(), 3)} if loops else {}
        return {"seams": seams, **closure}


class Pipeline:
    """A loaded model, ready to make videos."""

    def __init__(
        self,
        info: ModelInfo,
        text: TextEncoder,
        dit: Dit,
        vae: Vae,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.info = info
        self.device = device
        self.lanes = Lanes(device)
        self.text = text
        self.dtype = dtype
        self.dit = dit.eval().to(device, dtype)
        self.vae = place(vae, device, dtype)

    def plan(self, request: Request) -> Plan:
        """What the request comes to, without making it. Raises RequestError."""
        named = request.model
        if (
            named not in (None, self.info.name)
            and Path(named).resolve() != self.info.folder.resolve()
        ):
            raise RequestError(
                f"This pipeline holds {self.info.name}, not {named}.",
                hint=f"Use skyloom.load({named!r}).",
            )
        return make_plan(request, self.info, self.vae.config.scale)

    def generate(self, request: Request | str, **fields: Any) -> Video:
        """Make a video, from a Request or from a prompt and a Request's fields."""
        for step in self.stream(request, **fields):
            if step.video is not None:
                return step.video
        raise AssertionError("a stream ends with a video")

    def generate_many(self, requests: Sequence[Request]) -> list[Video]:
        """Make several videos; each is exactly what it would be alone."""
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
        """Make a video step by step; stop iterating to cancel. A request and the media that it starts from are checked
        before the first step; frames by the policy as they are made (SafetyError, and what was kept of them goes). A
        plan of this pipeline is a request that was checked, with its sources open.

        Steps of decoding carry finished frames. Without `collect` these are not kept, the last step has no `video`,
        and memory does not grow with the length. A folder to `resume` from keeps finished windows and steps: the same
        request, with its seed, goes on where it was stopped and gives the same frames; they are written every
        `save_every` seconds at most, and when the iterator is closed. A `critic` judges every window
        (skyloom.evaluate.window_quality has one); those beyond its bounds are made again as often as the request's `retakes`
        say, and the receipt tells of all of them.
        """
        plan = self._planned(request, fields)
        judge = find_judge()
        if judge is not None:
            check_files(judge, map(Path, plan.request.media))
        pins = self._pins(plan)
        if plan.request.retakes is not None and critic is None:
            raise RequestError(
                "Nobody is there to ask for retakes.", hint="Give a critic, or ask for no retakes."
            )
        notes = None if critic is None else {"critic": {"bounds": dict(critic.bounds)}}
        receipt = make_receipt(plan, self.info, self.device, self.dtype, notes=notes)
        store = None if resume is None else WindowStore(resume, receipt.to_dict(), save_every)
        seeds = {
            index: one.card.seed
            for index, one in enumerate(plan.cards)
            if one.card.seed is not None
        }
        sigmas = make_sigmas(plan.num_steps, self.info.shift)
        job = Job(
            plan.windows,
            self._canvas_at(plan, pins),
            sigmas,
            plan.seed,
            self.info.rollout,
            store,
            seeds=seeds,
            correlation=self.info.noise_correlation,
            retakes=plan.request.retakes or 0,
        )
        screen = _Screen(plan, receipt, judge and Watch(judge, plan.fps), collect=collect)
        if plan.timeline is None:
            return _kept(self._run(plan, job, screen, pins, critic), store)
        identity, cache = span_identity(plan, self.info, self.device, self.dtype), cache_folder()
        vault = None if cache is None else SpanStore(cache / "spans", identity)
        stores = [
            None if store is None else store.span(number, identity.of(span))
            for number, span in enumerate(plan.timeline.generated_spans)
        ]
        return _kept(self._run_edit(plan, job, screen, vault, stores), store, vault)

    def _planned(self, request: Request | Plan | str, fields: Mapping[str, Any]) -> Plan:
        if isinstance(request, Plan):
            return self.plan(request.request.with_fields(fields)) if fields else request
        asked = request if isinstance(request, Request) else Request(request)
        return self.plan(asked.with_fields(fields))

    def _run(
        self, plan: Plan, job: Job, screen: _Screen, pins: Sequence[Pin], critic: Critic | None
    ) -> Iterator[Step]:
        prompts = [*(one.text for one in plan.cards)] or [plan.request.prompt]
        context = self.lanes.run_one(
            partial(self.text.encode, [*prompts, plan.request.negative_prompt])
        )
        yield Step("text", 1, 1, notice=_notice(plan, context))
        pinned = frozenset[tuple[int, int]]().union(*(pin.cells for pin in pins))
        projector = Projector(self.vae, self.lanes, self.device, self.info.steadiness, pinned)
        jury = None if critic is None else Jury(critic, projector)
        scripts = [self._conditions(plan, context, row) for row in range(len(prompts))]
        denoiser = Denoiser(
            self.dit, self.lanes, scripts[0], plan.guidance_scale, student=plan.student
        )

        def speak(window: Window) -> None:
            before = scripts[window.card - 1] if window.fade else None
            denoiser.say(scripts[window.card], before, window.fade)

        for made in roll_out(
            replace(job, speak=speak, judge=jury.judge if jury else None), denoiser
        ):
            index = made.window.index * plan.num_steps + made.step.index + 1
            yield Step(
                "denoise",
                index,
                len(plan.windows) * plan.num_steps,
                made.step.denoised[0],
                vae=self.vae,
            )
            if made.finished is not None:
                yield from map(screen.show, projector.ready(most_waiting=0))
                if jury is not None:
                    jury.keep(made)
                    screen.note(jury.notes())
                projector.put(made.finished, made.window)
            yield from map(screen.show, projector.ready())
        yield from map(screen.show, projector.ready(most_waiting=0))

    def _run_edit(
        self,
        plan: Plan,
        job: Job,
        screen: _Screen,
        vault: SpanStore | None,
        stores: Sequence[WindowStore | None],
    ) -> Iterator[Step]:
        """The spans of a timeline in order: kept frames as they are, made ones as they come."""
        timeline, footage = plan.timeline, plan.footage
        assert timeline is not None and footage is not None
        prompts = list(dict.fromkeys(span.prompt for span in timeline.generated_spans))
        scripts: dict[str, list[TextCondition]] = {}
        if prompts:
            context = self.lanes.run_one(
                partial(self.text.encode, [*prompts, plan.request.negative_prompt])
            )
            scripts = {
                text: self._conditions(plan, context, row) for row, text in enumerate(prompts)
            }
            yield Step("text", 1, 1, notice=_notice(plan, context))

        def speaker(prompt: str) -> Denoiser:
            return Denoiser(
                self.dit, self.lanes, scripts[prompt], plan.guidance_scale, student=plan.student
            )

        splicer = Splicer(
            self.vae,
            self.lanes,
            self.device,
            footage.sources,
            job,
            speaker,
            screen.mark,
            self.info.steadiness,
            self.dit.config.horizon,
            (plan.shape.height, plan.shape.width),
            footage.mask,
            footage.softness,
            vault,
        )
        makings, before = zip(plan.layouts, stores, strict=True), 0
        for span in timeline.spans:
            if isinstance(span, Keep):
                clip = span.clip
                yield from map(
                    screen.show, footage.sources[clip.source].stream(clip.start, clip.stop)
                )
            elif isinstance(span, Filter):
                yield from map(screen.show, filtered(footage.sources[0], span))
            else:
                layout, store = next(makings)
                for made in splicer.make(span, layout, store):
                    if isinstance(made, WindowStep):
                        index = (before + made.window.index) * plan.num_steps + made.step.index + 1
                        total = len(plan.windows) * plan.num_steps
                        yield Step("denoise", index, total, made.step.denoised[0], vae=self.vae)
                    elif len(made):
                        yield screen.show(made)
                before += len(layout.windows)

    def _pins(self, plan: Plan) -> list[Pin]:
        """All that is known of a video that is no edit: a picture to start from, and media of cards."""
        first = plan.request.image
        cards = [] if first is None else [PlacedCard(Card("0", "", image=first), 0, 0, 0, 0, "")]
        return [self._pin(one, plan) for one in (*cards, *plan.cards) if one.pinned]

    def _canvas_at(self, plan: Plan, pins: Sequence[Pin]) -> Callable[[Window], Canvas]:
        """The canvas of every window: only what is pinned is known."""
        if plan.timeline is not None:
            return _no_canvas
        latent_shape = self.vae.config.scale.latent_shape(plan.shape)

        def canvas_at(window: Window) -> Canvas:
            shape = replace(latent_shape, frames=window.stop - window.start)
            canvas = Canvas.text_to_video(self.vae.config.latent_channels, shape)
            for pin in pins:
                canvas = pin.on(canvas, window)
            return canvas

        return canvas_at

    @torch.no_grad()
    def _pin(self, placed: PlacedCard, plan: Plan) -> Pin:
        """What a card pins, as latent frames of its shot."""
        frames = read_pinned(placed, plan.shape, self.info.fps)
        frames, start, skip = fit_cells(frames, placed.offset, self.vae.config.scale)
        pixels = to_pixels(frames)[None].to(self.device)
        latent = self.lanes.run_one(partial(self.vae.encode, pixels))[0, :, skip:].cpu()
        return Pin(placed.shot, start, latent, placed.card.strength)

    def _conditions(self, plan: Plan, context: TextContext, row: int) -> list[TextCondition]:
        """One prompt of a context and, for guidance, the negative one, which is the last."""
        rows = [row] if plan.guidance_scale == 1.0 else [row, len(context.context) - 1]
        return [self.lanes.run_one(partial(self._condition, context, one)) for one in rows]

    def _condition(self, context: TextContext, row: int) -> TextCondition:
        """One prompt of a context, without the padding that its neighbours made necessary."""
        length = int(context.context_mask[row].sum())
        dtype = self.dit.head.weight.dtype
        tokens = context.context[row : row + 1, :length].to(self.device, dtype)
        return self.dit.prepare_text(
            tokens, None, context.pooled[row : row + 1].to(self.device, dtype)
        )


def load(
    model: str = "diorama",
    *,
    device: str | None = None,
    dtype: str | None = None,
    verify: bool = True,
) -> Pipeline:
    """Load a model by name or folder. Raises RequestError (unknown) or CheckpointError (damaged)."""
    info = find_model(model)
    if verify:
        verify_manifest(info.folder)
    where = choose_device(device)
    dit_config, dit_state, _ = load_part(info.folder, "dit", DitConfig)
    vae_config, vae_state, _ = load_part(info.folder, "vae", VaeConfig)
    with torch.device("meta"):
        dit, vae = Dit(dit_config), Vae(vae_config)
    for module, state in ((dit, dit_state), (vae, vae_state)):
        module.to_empty(device="cpu")
        load_into(module, state)
    return Pipeline(
        info, load_text_encoder(info.folder), dit, vae, where, choose_dtype(where, dtype)
    )


def _kept(
    steps: Iterator[Step], store: WindowStore | None, vault: SpanStore | None = None
) -> Iterator[Step]:
    """The same steps; who leaves them early finds the last one on disk, and of a video that is refused nothing is
    kept to go on from."""
    try:
        yield from steps
    except GeneratorExit:
        if store is not None:
            store.flush()
        raise
    except SafetyError:
        if store is not None:
            clear(store.folder)
        if vault is not None:
            vault.forget()
        raise


def _no_canvas(window: Window) -> Canvas:
    raise AssertionError("the windows of an edit lie on the canvases of their spans")


def _notice(plan: Plan, context: TextContext) -> str | None:
    """What was done otherwise than a user may expect."""
    lost = context.truncated
    notices = [
        *(
            f"The prompt{f' of card {index}' if plan.cards else ''} is long: its last {count} tokens were not read."
            for index, count in enumerate(lost[:-1], start=1)
            if count
        ),
        f"The negative prompt is long: its last {lost[-1]} tokens were not read."
        if lost[-1]
        else "",
        f"Of the frames, one in {plan.keep_every} is kept." if plan.keep_every > 1 else "",
        *(() if plan.footage is None else plan.footage.notices),
    ]
    return " ".join(filter(None, notices)) or None
