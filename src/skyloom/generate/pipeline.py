"""The pipeline: a plan's timeline becomes frames; every finished unit of work is yielded.

A timeline is what text to video, storyboards and edits have in common: kept and filtered spans are
read from a source, generated ones are sampled as runs of windows. The same request, seed and
version give the same frames: noise is drawn from the request's seed, and several requests run one
after another.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from skyloom.core.device import choose_device, choose_dtype
from skyloom.core.errors import RequestError
from skyloom.core.paths import cache_folder
from skyloom.core.seeds import derive_seed
from skyloom.generate.conditioning import Conditioning
from skyloom.generate.decoding import StreamingDecoder, check_decoder
from skyloom.generate.denoiser import Denoiser
from skyloom.generate.executor import DeterministicExecutor
from skyloom.generate.export import ExportOptions, check_ready, export_steps
from skyloom.generate.latent_store import WindowCache, WindowStore
from skyloom.generate.loras import LoraFile, attach_loras, find_loras
from skyloom.generate.memory import MemoryGuard, make_planner, measure_free_memory
from skyloom.generate.output import OutputStage, Step
from skyloom.generate.plan import Plan, make_plan
from skyloom.generate.prompt_encoding import Texts, encode_prompts, text_conditions, truncations
from skyloom.generate.receipt import make_receipt, weights_digest
from skyloom.generate.renderer import (
    RenderedFrames,
    RenderedSound,
    RunRenderer,
    WindowSound,
    make_silence,
)
from skyloom.generate.request import Request
from skyloom.generate.sampling import (
    Critic,
    SamplingSpec,
    WindowStep,
    model_levels,
    schedule_sigmas,
)
from skyloom.generate.window_keys import window_keys
from skyloom.generate.window_review import WindowReviewer
from skyloom.generate.windows import RunPlan, Window
from skyloom.media.video import Video
from skyloom.media.write import check_target
from skyloom.models.base import ModelBundle, TextContext, Transformer, find_loader
from skyloom.models.checkpoint import verify_manifest
from skyloom.models.memory import PartName, Rung
from skyloom.models.registry import DEFAULT_MODEL, ModelInfo, find_model
from skyloom.safety.consent import check_media_consent
from skyloom.safety.frame_moderation import StreamModerator, check_files, load_frame_moderator


@dataclass(frozen=True, eq=False)
class Generation:
    """A video being generated: its plan, output, memory, a store per run, critic, start noise."""

    plan: Plan
    output: OutputStage
    memory: MemoryGuard
    stores: Sequence[WindowStore]
    critic: Critic | None
    noise: Float[Tensor, "1 c t h w"] | None


class Pipeline:
    """A loaded model that generates videos; `loras` are those of generate/loras.find_loras."""

    def __init__(self, bundle: ModelBundle, loras: Mapping[str, str] | None = None) -> None:
        self.bundle = bundle
        self.loras = loras
        self.info = bundle.info
        self.text_encoder = bundle.text_encoder
        self.transformer = bundle.transformer
        self.lora_notices: tuple[str, ...] = ()
        self.autoencoder = bundle.autoencoder
        self.sound = bundle.sound
        self.device = bundle.device
        self.dtype = bundle.dtype
        self.executor = DeterministicExecutor(bundle.device)

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
        plan = make_plan(request, self.info, self.autoencoder.scale)
        return replace(plan, loras=find_loras(plan.request.loras, self.loras))

    def generate(self, request: Request | str, **fields: Any) -> Video:
        """Generate a video from a Request, or from a prompt and fields of a Request."""
        for step in self.stream(request, **fields):
            if step.video is not None:
                return step.video
        raise AssertionError("a stream ends with a video")

    def export(
        self,
        request: Request | str,
        path: str | Path,
        *,
        options: ExportOptions | None = None,
        **fields: Any,
    ) -> dict[str, object]:
        """Generate a video into a signed and registered file; return its receipt.

        Memory does not grow with the length. Raises MediaError before any work if the file cannot
        be written or signed.
        """
        options = options or ExportOptions()
        check_target(Path(path))
        check_ready(credentials=options.credentials)
        plan = self._planned(request, fields)
        steps = self.stream(plan, collect=False)
        receipts = (step.receipt for step in export_steps(steps, plan, Path(path), options))
        return [receipt for receipt in receipts if receipt is not None][-1]

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
        noise: Float[Tensor, "c t h w"] | None = None,
        check_memory: bool = True,
        check_consent: bool = True,
        **fields: Any,
    ) -> Iterator[Step]:
        """Generate a video step by step; stop iterating to cancel.

        The request and its media are checked first; a Plan of this pipeline is used as it is.
        Frames are moderated as they are decoded (SafetyError; checkpoints are then deleted).

        collect: return all frames as the last step's `video`. Without it, memory is constant.
        resume: folder of checkpoints. The same request and seed continue where they stopped and
            give the same frames. Checkpoints are written at most every `save_every` seconds, and
            when the iterator is closed.
        critic: scores every window (skyloom.evaluate.window_quality has one). Windows that exceed
            its bounds are sampled again up to `retakes` times; the receipt lists all scores.
        noise: the noise that sampling starts from, in place of the seed's; for a prompt only. The
            latent frames of all windows, which may be more than the video's.
        check_memory: raise CapacityError at once if memory is expected to be too small.
        check_consent: False where consent for the media was checked before, as by the server.
        """
        plan = self._planned(request, fields)
        start = self._start_noise(plan, noise)
        if check_consent:
            media = plan.request.media
            check_media_consent(plan.request.consent, has_media=bool(media))
        moderator = _moderator(plan)
        notes = _notes(plan, critic, start)
        receipt = make_receipt(plan, self.info, self.device, self.dtype, notes=notes)
        memory = self._memory_guard(plan, check=check_memory)
        output = OutputStage(plan, receipt, moderator, collect=collect)
        output.add_final_notes(memory.notes)
        store = WindowStore(resume, receipt.to_dict(), save_every, cache=_window_cache(plan))
        stores = self._run_stores(plan, store, critic)
        pipeline = self._with_loras(plan)
        steps = pipeline._run(Generation(plan, output, memory, stores, critic, start))
        return store.guard(steps)

    def _with_loras(self, plan: Plan) -> "Pipeline":
        """This pipeline, or a copy whose transformer has the plan's LoRAs. Raises RequestError."""
        if not plan.loras:
            return self
        pipeline = copy(self)
        pipeline.transformer, pipeline.lora_notices = self.attach_loras(plan.loras)
        return pipeline

    def attach_loras(self, loras: Sequence[LoraFile]) -> tuple[Transformer, tuple[str, ...]]:
        """Return the transformer with LoRAs, and notices about their files. Raises RequestError."""
        return attach_loras(
            self.transformer,
            loras,
            family=self.info.record.name,
            base=weights_digest(self.info.file_hashes),
            device=self.device,
        )

    def _planned(self, request: Request | Plan | str, fields: Mapping[str, Any]) -> Plan:
        if isinstance(request, Plan):
            return self.plan(request.request.with_fields(fields)) if fields else request
        if isinstance(request, str):
            request = Request(request)
        return self.plan(request.with_fields(fields))

    def _memory_guard(self, plan: Plan, *, check: bool) -> MemoryGuard:
        """Plan the memory of a video and place the parts. Raises CapacityError if `check`."""
        planner = make_planner(
            plan,
            self.info,
            find_loader(self.info).read_network_cost(self.info),
            device=self.device,
            dtype=self.dtype,
            free=measure_free_memory(self.device, self.bundle),
        )
        if planner is None:
            return MemoryGuard(self.bundle, self.executor)
        chosen = planner.choose()
        if check:
            chosen.check()
        self.bundle.arrange(chosen.rungs)
        return MemoryGuard(self.bundle, self.executor, planner, chosen)

    def _start_noise(self, plan: Plan, noise: Tensor | None) -> Tensor | None:
        """The start noise of a plan with a batch axis. Raises RequestError for another shape."""
        if noise is None:
            return None
        if plan.request.edit is not None or plan.request.cards:
            raise RequestError(
                "noise must be left out for an edit or a storyboard.",
                hint="Use seed.",
                field="noise",
            )
        latent = self.autoencoder.scale.latent_shape(plan.shape)
        channels = self.autoencoder.latent_channels
        expected = (channels, plan.windows[-1].stop, latent.height, latent.width)
        if tuple(noise.shape) != expected:
            raise RequestError(
                f"noise must have shape {expected} (channels, latent frames, height, width), "
                f"got {tuple(noise.shape)}.",
                field="noise",
            )
        return noise.detach().float().cpu()[None]

    def _run(self, generation: Generation) -> Iterator[Step]:
        """Encode the prompts, then render."""
        plan = generation.plan
        memory = generation.memory
        texts: Texts = {}
        if plan.runs:
            context = encode_prompts(plan, self.text_encoder, memory.phase("text"))
            yield Step("text", 1, 1, notice=_notice(plan, context, self.lora_notices))
            texts = text_conditions(plan, context, self.transformer, memory.phase("denoise"))
            if self.info.record.trial_decode:
                check_decoder(self.autoencoder, memory.phase("decode"), plan.shape)
        for step in self._render(generation, texts):
            notice = memory.take_notice()
            notices = " ".join(filter(None, (step.notice, notice))) or None
            yield step if notice is None else replace(step, notice=notices)

    def _render(self, generation: Generation, texts: Texts) -> Iterator[Step]:
        """Render the segments of the timeline in order."""
        plan = generation.plan
        runs_done = 0
        windows_done = 0
        frame = 0
        for segment in plan.segments:
            if isinstance(segment, RunPlan):
                renderer = self._renderer(generation, runs_done, texts, first_frame=frame)
                for item in renderer.render():
                    if isinstance(item, WindowStep):
                        yield self._denoise_step(plan, item, windows_done)
                    elif isinstance(item, RenderedSound):
                        generation.output.add_sound(item.audio)
                    elif len(item.frames):
                        yield generation.output.process(item)
                windows_done += len(segment.windows)
                runs_done += 1
            else:
                assert plan.sources is not None
                if self.sound is not None:  # the exporter copies the sound of the source
                    stop = frame + segment.frames
                    silence = make_silence(self.sound, plan.timeline.fps, frame, stop)
                    generation.output.add_sound(silence)
                for frames in segment.stream(plan.sources.sources[segment.clip.source]):
                    yield generation.output.process(RenderedFrames(frames, generated=False))
            frame += segment.frames

    def _renderer(
        self, generation: Generation, number: int, texts: Texts, *, first_frame: int
    ) -> RunRenderer:
        """The renderer of a run, with a new denoiser and decoder."""
        plan = generation.plan
        run = plan.runs[number]
        memory = generation.memory
        conditioning = self._conditioning(plan, run, memory)
        decoder = StreamingDecoder(
            self.autoencoder, memory.phase("decode"), self.info.steadiness, conditioning.fixed
        )
        reviewer = None
        if generation.critic is not None and plan.request.edit is None:
            reviewer = WindowReviewer(generation.critic, decoder)
            generation.output.add_final_notes(reviewer.notes)
        conditions = [texts[span.prompt] for span in run.spans]
        with self.bundle.use("transformer"):  # it asks where the transformer runs
            denoiser = Denoiser(
                self.transformer,
                memory.phase("denoise"),
                conditions[0],
                plan.guidance_scale,
                student=plan.student,
                model_levels=model_levels(plan.schedule, plan.num_steps),
            )

        def set_prompt(window: Window) -> None:
            if not run.uses_cache:
                inside = None if run.opens_shot(window) else self.transformer.uncached_frame_offset
                denoiser.set_frame_offset(inside)
            previous = conditions[window.span - 1] if window.prompt_fade else None
            denoiser.set_prompt(conditions[window.span], previous, window.prompt_fade)

        sampling = replace(
            self._sampling_spec(plan, run, conditioning),
            store=generation.stores[number],
            set_prompt=set_prompt,
            score_window=None if reviewer is None else reviewer.score,
            start_noise=generation.noise,
        )
        sound = None
        if self.sound is not None:
            sound = WindowSound(
                self.sound,
                self.executor,
                conditioning,
                [one[0] for one in conditions],
                first_frame=first_frame,
                seed=sampling.seed,
            )
        return RunRenderer(
            run,
            conditioning,
            sampling,
            denoiser,
            decoder,
            reviewer=reviewer,
            sound=sound,
        )

    def _sampling_spec(self, plan: Plan, run: RunPlan, conditioning: Conditioning) -> SamplingSpec:
        """The sampling settings of a run, as far as the plan determines them."""
        name = run.spans[0].name
        return SamplingSpec(
            windows=run.windows,
            canvas_at=conditioning.canvas,
            sigmas=schedule_sigmas(plan.schedule, plan.num_steps),
            solver=plan.schedule.solver,
            seed=derive_seed(plan.seed, "span", name) if name else plan.seed,
            rollout=self.info.rollout,
            span_seeds={
                index: span.seed for index, span in enumerate(run.spans) if span.seed is not None
            },
            noise_correlation=self.info.noise_correlation,
            retakes=plan.request.retakes or 0,
            uses_cache=run.uses_cache,
        )

    def _conditioning(self, plan: Plan, run: RunPlan, memory: MemoryGuard) -> Conditioning:
        """What the windows of a run know."""
        return Conditioning(
            run,
            plan.shape,
            fps=plan.timeline.fps,
            scale=self.autoencoder.scale,
            channels=self.autoencoder.latent_channels,
            encode=partial(self._encode_pixels, memory.phase("encode")),
            sources=plan.sources,
            known_sigma=0.0 if self.info.record.frame_levels else 1.0,
        )

    def _run_stores(
        self, plan: Plan, store: WindowStore, critic: Critic | None
    ) -> Sequence[WindowStore]:
        """A store for each run, with the cache's keys of its windows."""
        bounds = None if critic is None else critic.bounds
        keys: Sequence[Sequence[str]] = [()] * len(plan.runs)
        if store.cache is not None:
            keys = [
                window_keys(plan, run, self.info, self.device, self.dtype, bounds=bounds)
                for run in plan.runs
            ]
        return [store.run(number, of_run) for number, of_run in enumerate(keys)]

    def _denoise_step(self, plan: Plan, step: WindowStep, windows_before: int) -> Step:
        """The Step of a sampler step; `windows_before` counts windows of earlier runs."""
        index = (windows_before + step.window.index) * plan.num_steps + step.step.index + 1
        total = len(plan.windows) * plan.num_steps
        latent = step.step.denoised[0]
        return Step("denoise", index, total, latent, autoencoder=self.autoencoder)

    def _encode_pixels(
        self, executor: DeterministicExecutor, pixels: Float[Tensor, "1 3 t h w"]
    ) -> Float[Tensor, "1 c u y x"]:
        def encode() -> Tensor:
            return self.autoencoder.encode(pixels.to(self.autoencoder.device))

        return executor.run_one(encode).cpu()


def load(
    model: str = DEFAULT_MODEL,
    *,
    device: str | None = None,
    dtype: str | None = None,
    verify: bool = True,
    loras: Mapping[str, str] | None = None,
) -> Pipeline:
    """Load a model by name or folder; `verify` checks its file hashes.

    loras: paths of the LoRAs that requests may use, by name; by default any path, and the files in
    the data folder's `loras`.

    Raises RequestError for an unknown model, CheckpointError for a damaged one.
    """
    info = find_model(model)
    if verify:
        verify_manifest(info.folder, trust_cache=True)
    where = choose_device(device)
    precision = choose_dtype(where, dtype)
    rungs = _usual_rungs(info, where, precision)
    return Pipeline(ModelBundle.load(info, where, precision, rungs=rungs), loras)


def _usual_rungs(
    info: ModelInfo, device: torch.device, dtype: torch.dtype
) -> Mapping[PartName, Rung] | None:
    """Where the parts lie for a video of the model's own size; None: all on the device."""
    if device.type == "cpu":
        return None
    cost = find_loader(info).read_network_cost(info)
    plan = make_plan(Request("a video"), info, cost.scale)
    free = measure_free_memory(device)
    planner = make_planner(plan, info, cost, device=device, dtype=dtype, free=free)
    return None if planner is None else planner.choose().rungs


def _moderator(plan: Plan) -> StreamModerator | None:
    """The moderator of the frames, if the policy has one. Raises SafetyError for the media."""
    moderator = load_frame_moderator()
    if moderator is None:
        return None
    check_files(moderator, map(Path, plan.request.media))
    return StreamModerator(moderator, plan.fps)


def _notes(plan: Plan, critic: Critic | None, noise: Tensor | None) -> dict[str, Any]:
    """Notes of the receipt that are known before the first step."""
    if plan.request.retakes is not None and critic is None:
        raise RequestError(
            f"critic must be given for retakes = {plan.request.retakes}, got None.",
            hint="Pass critic=, or leave retakes out.",
        )
    notes: dict[str, Any] = {}
    if critic is not None:
        notes["critic"] = {"bounds": dict(critic.bounds)}
    if noise is not None:
        notes["noise"] = hashlib.sha256(noise.numpy().tobytes()).hexdigest()
    return notes


def _window_cache(plan: Plan) -> WindowCache | None:
    """The cache of an edit or storyboard, of which a changed version reuses what did not change."""
    folder = cache_folder()
    if folder is None or not (plan.request.edit is not None or len(plan.request.cards) > 1):
        return None
    return WindowCache(folder / "spans")


def _notice(plan: Plan, context: TextContext, further: Sequence[str]) -> str | None:
    """Warnings for the user: truncated prompts, dropped frames, converted sources, `further`."""
    notices = list(truncations(plan, context))
    if plan.keep_every > 1:
        notices.append(f"Of the frames, one in {plan.keep_every} is kept.")
    notices.extend(plan.notices)
    notices.extend(further)
    return " ".join(notices) or None
