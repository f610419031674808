"""Plan a request before any work: shapes, timeline, windows, steps, or a RequestError."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

from skyloom.core.errors import RequestError
from skyloom.core.types import ScaleFactors, VideoShape
from skyloom.generate.edit_sources import EditSources, open_edit_sources
from skyloom.generate.edit_spec import check_source_limits
from skyloom.generate.edit_verbs import EDIT_VERBS
from skyloom.generate.loras import LoraFile
from skyloom.generate.request import Request
from skyloom.generate.storyboard import storyboard_spans
from skyloom.generate.timeline import Generate, Media, SourceSpan, Timeline, make_timeline
from skyloom.generate.validate import (
    MAX_SECONDS,
    ResolvedRequest,
    count_frames,
    length_notice,
    resolve_defaults,
)
from skyloom.generate.windows import RunPlan, Window, plan_runs
from skyloom.media.read import read_image
from skyloom.models.family import Schedule
from skyloom.models.registry import ModelInfo


@dataclass(frozen=True)
class Plan:
    """A request with every default filled in.

    `shape` is what the model generates at its own rate; every `keep_every`-th frame is output, at
    `fps`. `timeline` is the whole video; `runs` are its generated spans, as they are sampled. An
    edit has its open `sources`. `loras` are files that the pipeline has found.
    """

    request: Request
    shape: VideoShape
    fps: Fraction
    keep_every: int
    num_steps: int
    guidance_scale: float
    schedule: Schedule
    seed: int
    timeline: Timeline
    runs: tuple[RunPlan, ...]
    student: bool = False
    loras: tuple[LoraFile, ...] = ()
    sources: EditSources | None = field(default=None, repr=False, compare=False)

    @property
    def seconds(self) -> float:
        """Length from the first to the last frame; a request of this length gives this plan."""
        return (self.shape.frames - 1) / float(self.fps * self.keep_every)

    @property
    def notices(self) -> tuple[str, ...]:
        """Sentences for the user: converted sources, prompts of an edit, lengths not trained."""
        converted = () if self.sources is None else self.sources.notices
        return (*converted, *self.timeline.notices)

    @property
    def windows(self) -> tuple[Window, ...]:
        """The windows of all runs."""
        return tuple(window for run in self.runs for window in run.windows)

    @property
    def segments(self) -> tuple[SourceSpan | RunPlan, ...]:
        """Kept and filtered spans, and runs, in order of time."""
        firsts = {id(run.spans[0]): run for run in self.runs}
        found = (
            span if isinstance(span, SourceSpan) else firsts.get(id(span))
            for span in self.timeline.spans
        )
        return tuple(segment for segment in found if segment is not None)


def make_plan(request: Request, model: ModelInfo, scale: ScaleFactors) -> Plan:
    """Check a request against a model and plan it. Raises RequestError or SafetyError."""
    request = request.with_seed()
    resolved = resolve_defaults(request, model)
    guided = request.needs_model and resolved.guidance_scale != 1.0
    if guided and not request.negative_prompt:
        request = request.with_fields({"negative_prompt": model.record.negative_prompt})
    native = scale.latent_frames(model.frames)
    if request.edit is not None:
        return _plan_edit(request, resolved, model, scale, native)
    shape = VideoShape(count_frames(request, model, scale), resolved.height, resolved.width)
    timeline = replace(_generated_timeline(request, shape, model.fps), fps=Fraction(model.fps))
    runs = plan_runs(timeline, scale, native, model.rollout)
    assert request.seed is not None
    return Plan(
        request,
        shape,
        fps=Fraction(model.fps, resolved.keep_every),
        keep_every=resolved.keep_every,
        num_steps=resolved.num_steps,
        guidance_scale=resolved.guidance_scale,
        schedule=resolved.schedule,
        seed=request.seed,
        timeline=_with_length_notice(timeline, runs, model),
        runs=runs,
        student=resolved.quality.student,
    )


def _generated_timeline(request: Request, shape: VideoShape, fps: int) -> Timeline:
    """The timeline of a prompt, with its first picture, or of a storyboard."""
    if request.cards:
        return make_timeline(storyboard_spans(request.cards, request.prompt, shape, fps))
    media = None
    if request.image is not None:
        read_image(Path(request.image))
        media = Media(request.image)
    return make_timeline([Generate(shape.frames, request.prompt, media=media)])


def _with_length_notice(timeline: Timeline, runs: Sequence[RunPlan], model: ModelInfo) -> Timeline:
    """The timeline; it says so if a model without a rollout makes a shot in several windows."""
    shots = [(number, window.shot) for number, run in enumerate(runs) for window in run.windows]
    if model.rollout is not None or len(shots) == len(set(shots)):
        return timeline
    return replace(timeline, notices=(*timeline.notices, length_notice(model)))


def _plan_edit(
    request: Request,
    resolved: ResolvedRequest,
    model: ModelInfo,
    scale: ScaleFactors,
    native: int,
) -> Plan:
    """Open the sources of an edit and plan its generated spans."""
    edit = request.edit
    assert edit is not None
    size = None if request.size is None else (resolved.height, resolved.width)
    opened = open_edit_sources(edit, model.fps, model.size_rule, size)
    source = opened.sources[0]
    fps = source.fps
    check_source_limits(
        edit, width=source.width, height=source.height, fps=fps, frames=source.frames
    )
    timeline = EDIT_VERBS[edit.verb].build(edit, request.prompt.strip(), opened.sources, fps)
    if timeline.frames > MAX_SECONDS * fps:
        length = f"{float(timeline.frames / fps):.0f}"
        raise RequestError(
            f"The edited video must be at most {MAX_SECONDS} seconds long, got {length}."
        )
    timeline = replace(timeline, fps=timeline.fps or fps)
    shape = VideoShape(timeline.frames, *(timeline.size or (source.height, source.width)))
    runs = plan_runs(timeline, scale, native, model.rollout)
    return Plan(
        request,
        shape,
        fps=timeline.fps,
        keep_every=1,
        num_steps=resolved.num_steps,
        guidance_scale=resolved.guidance_scale,
        schedule=resolved.schedule,
        seed=request.seed or 0,  # an edit without sampling has no seed
        timeline=_with_length_notice(timeline, runs, model),
        runs=runs,
        student=resolved.quality.student,
        sources=opened,
    )
