"""Plan a request before any work: shapes, windows, steps and guidance, or a RequestError."""

from dataclasses import dataclass, field
from fractions import Fraction

from skyloom.core.errors import RequestError
from skyloom.core.types import ScaleFactors, VideoShape
from skyloom.generate.edit_sources import EditSources, open_edit_sources
from skyloom.generate.edit_spec import check_source_limits
from skyloom.generate.edit_verbs import EDIT_VERBS
from skyloom.generate.layout import SpanLayout, layout_span
from skyloom.generate.request import Request
from skyloom.generate.rollout import Window, make_windows
from skyloom.generate.storyboard import PlacedCard, card_windows, place_cards
from skyloom.generate.timeline import Filter, Timeline
from skyloom.generate.validate import MAX_SECONDS, ResolvedRequest, count_frames, resolve_defaults
from skyloom.models.registry import ModelInfo


@dataclass(frozen=True)
class Plan:
    """A request with every default filled in.

    `shape` is what the model generates at its own rate; every `keep_every`-th frame is output, at
    `fps`. `windows` are sampled in order. An edit has a `timeline`, the `layouts` of its generated
    spans, whose windows `windows` lists, and its open `edit_sources`.
    """

    request: Request
    shape: VideoShape
    fps: Fraction
    keep_every: int
    num_steps: int
    guidance_scale: float
    seed: int
    windows: tuple[Window, ...]
    student: bool = False
    cards: tuple[PlacedCard, ...] = ()
    timeline: Timeline | None = None
    layouts: tuple[SpanLayout, ...] = ()
    edit_sources: EditSources | None = field(default=None, repr=False, compare=False)

    @property
    def seconds(self) -> float:
        """Length from the first to the last frame; a request of this length gives this plan."""
        return (self.shape.frames - 1) / float(self.fps * self.keep_every)


def make_plan(request: Request, model: ModelInfo, scale: ScaleFactors) -> Plan:
    """Check a request against a model and plan it. Raises RequestError or SafetyError."""
    request = request.with_seed()
    resolved = resolve_defaults(request, model)
    native = scale.latent_frames(model.frames)
    if request.edit is not None:
        return _plan_edit(request, resolved, model, scale, native)
    shape = VideoShape(count_frames(request, model, scale), resolved.height, resolved.width)
    cards = place_cards(request.cards, request.prompt, shape, model.fps)
    if cards:
        windows = card_windows(cards, shape.frames, scale, native, model.rollout)
    else:
        windows = make_windows(scale.latent_frames(shape.frames), native, model.rollout)
    assert request.seed is not None
    return Plan(
        request,
        shape,
        fps=Fraction(model.fps, resolved.keep_every),
        keep_every=resolved.keep_every,
        num_steps=resolved.num_steps,
        guidance_scale=resolved.guidance_scale,
        seed=request.seed,
        windows=windows,
        student=resolved.quality.student,
        cards=cards,
    )


def _plan_edit(
    request: Request,
    resolved: ResolvedRequest,
    model: ModelInfo,
    scale: ScaleFactors,
    native: int,
) -> Plan:
    """Open the sources of an edit and lay out its generated spans."""
    edit = request.edit
    assert edit is not None
    opened = open_edit_sources(edit, model.fps, resolved.height, resolved.width)
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
    layouts = tuple(
        layout_span(span, scale, native, model.rollout) for span in timeline.generated_spans
    )
    shape = VideoShape(timeline.frames, resolved.height, resolved.width)
    first = timeline.spans[0]
    if isinstance(first, Filter):
        shape = VideoShape(timeline.frames, *(first.size or (source.height, source.width)))
        fps *= first.rate_factor
    return Plan(
        request,
        shape,
        fps=fps,
        keep_every=1,
        num_steps=resolved.num_steps,
        guidance_scale=resolved.guidance_scale,
        seed=request.seed or 0,  # an edit without sampling has no seed
        windows=tuple(window for layout in layouts for window in layout.windows),
        student=resolved.quality.student,
        timeline=timeline,
        layouts=layouts,
        edit_sources=opened,
    )
