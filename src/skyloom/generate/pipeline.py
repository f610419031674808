"""The pipeline: a plan's timeline becomes frames; every finished unit of work is yielded.

A timeline is what text to video, storyboards and edits have in common: kept and filtered spans are
read from a source, generated ones are sampled as runs of windows. The same request, seed and
version give the same frames: noise is drawn from the request's seed, and several requests run one
after another.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from skyloom.core.device import choose_device, choose_dtype
from skyloom.core.errors import RequestError
from skyloom.core.paths import cache_folder
from skyloom.core.seeds import derive_seed
from skyloom.diffusion.schedule import make_sigmas
from skyloom.generate.conditioning import Conditioning
from skyloom.generate.decoding import StreamingDecoder
from skyloom.generate.denoiser import Denoiser
from skyloom.generate.executor import DeterministicExecutor
from skyloom.generate.export import ExportOptions, check_ready, export_steps
from skyloom.generate.latent_store import WindowCache, WindowStore
from skyloom.generate.output import OutputStage, Step
from skyloom.generate.plan import Plan, make_plan
from skyloom.generate.prompt_encoding import Texts, encode_prompts, text_conditions, truncations
from skyloom.generate.receipt import make_receipt
from skyloom.generate.renderer import (
    RenderedFrames,
    RenderedSound,
    RunRenderer,
    WindowSound,
    make_silence,
)
from skyloom.generate.request import Request
from skyloom.generate.sampling import Critic, SamplingSpec, WindowStep
from skyloom.generate.window_keys import window_keys
from skyloom.generate.window_review import WindowReviewer
from skyloom.generate.windows import RunPlan, Window
from skyloom.media.video import Video
from skyloom.media.write import check_target
from skyloom.models.base import ModelBundle, TextContext
from skyloom.models.checkpoint import verify_manifest
from skyloom.models.registry import DEFAULT_MODEL, find_model
from skyloom.safety.consent import check_media_consent
from skyloom.safety.frame_moderation import StreamModerator, check_files, load_frame_moderator


@dataclass(frozen=True, eq=False)
class Generation:
    """A video being generated: its plan, output stage, a store per run, critic, start noise."""

    plan: Plan
    output: OutputStage
    stores: Sequence[WindowStore]
    critic: Critic | None
    noise: Float[Tensor, "1 c t h w"] | None


class Pipeline:
    """A loaded model that generates videos."""

    def __init__(self, bundle: ModelBundle) -> None:
        self.bundle = bundle
        self.info = bundle.info
        self.text_encoder = bundle.text_encoder
        self.transformer = bundle.transformer
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
        return make_plan(request, self.info, self.autoencoder.scale)

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
        output = OutputStage(plan, receipt, moderator, collect=collect)
        store = WindowStore(resume, receipt.to_dict(), save_every, cache=_window_cache(plan))
        stores = self._run_stores(plan, store, critic)
        return store.guard(self._run(Generation(plan, output, stores, critic, start)))

    def _planned(self, request: Request | Plan | str, fields: Mapping[str, Any]) -> Plan:
        if isinstance(request, Plan):
            return self.plan(request.request.with_fields(fields)) if fields else request
        if isinstance(request, str):
            request = Request(request)
        return self.plan(request.with_fields(fields))

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
        texts: Texts = {}
        if plan.runs:
            with self.bundle.use("text_encoder"):
                context = encode_prompts(plan, self.text_encoder, self.executor)
            yield Step("text", 1, 1, notice=_notice(plan, context))
            with self.bundle.use("transformer"), self.bundle.use("autoencoder"):
                texts = text_conditions(plan, context, self.transformer, self.executor)
                yield from self._render(generation, texts)
        else:
            yield from self._render(generation, texts)

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
        conditioning = self._conditioning(plan, run)
        decoder = StreamingDecoder(
            self.autoencoder, self.executor, self.info.steadiness, conditioning.fixed
        )
        reviewer = None
        if generation.critic is not None and plan.request.edit is None:
            reviewer = WindowReviewer(generation.critic, decoder)
            generation.output.add_final_notes(reviewer.notes)
        conditions = [texts[span.prompt] for span in run.spans]
        denoiser = Denoiser(
            self.transformer,
            self.executor,
            conditions[0],
            plan.guidance_scale,
            student=plan.student,
        )

        def set_prompt(window: Window) -> None:
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
            frame_offset=self.transformer.uncached_frame_offset,
            reviewer=reviewer,
            sound=sound,
        )

    def _sampling_spec(self, plan: Plan, run: RunPlan, conditioning: Conditioning) -> SamplingSpec:
        """The sampling settings of a run, as far as the plan determines them."""
        name = run.spans[0].name
        return SamplingSpec(
            windows=run.windows,
            canvas_at=conditioning.canvas,
            sigmas=make_sigmas(plan.num_steps, self.info.shift),
            seed=derive_seed(plan.seed, "span", name) if name else plan.seed,
            rollout=self.info.rollout,
            span_seeds={
                index: span.seed for index, span in enumerate(run.spans) if span.seed is not None
            },
            noise_correlation=self.info.noise_correlation,
            retakes=plan.request.retakes or 0,
            uses_cache=run.uses_cache,
        )

    def _conditioning(self, plan: Plan, run: RunPlan) -> Conditioning:
        """What the windows of a run know."""
        return Conditioning(
            run,
            plan.shape,
            fps=plan.timeline.fps,
            scale=self.autoencoder.scale,
            channels=self.autoencoder.latent_channels,
            encode=self._encode_pixels,
            sources=plan.sources,
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

    def _encode_pixels(self, pixels: Float[Tensor, "1 3 t h w"]) -> Float[Tensor, "1 c u y x"]:
        encode = partial(self.autoencoder.encode, pixels.to(self.autoencoder.device))
        return self.executor.run_one(encode).cpu()


def load(
    model: str = DEFAULT_MODEL,
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
    return Pipeline(ModelBundle.load(info, where, choose_dtype(where, dtype)))


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


def _notice(plan: Plan, context: TextContext) -> str | None:
    """Warnings for the user: truncated prompts, dropped frames, converted sources."""
    notices = list(truncations(plan, context))
    if plan.keep_every > 1:
        notices.append(f"Of the frames, one in {plan.keep_every} is kept.")
    if plan.sources is not None:
        notices.extend(plan.sources.notices)
    notices.extend(plan.timeline.notices)
    return " ".join(notices) or None
