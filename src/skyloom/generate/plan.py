"""The plan of a request, before any work: exact shapes, steps and guidance, or a refusal that says what would do."""

from dataclasses import dataclass, field
from fractions import Fraction

from skyloom.core.errors import RequestError
from skyloom.core.types import ScaleFactors, VideoShape
from skyloom.generate.edit_sources import Footage, open_footage
from skyloom.generate.edit_spec import check_source_limits
from skyloom.generate.edit_verbs import EDIT_VERBS
from skyloom.generate.layout import Layout, lay_out
from skyloom.generate.request import Request
from skyloom.generate.rollout import Window, make_windows
from skyloom.generate.storyboard import PlacedCard, card_windows, place_cards
from skyloom.generate.timeline import Filter, Timeline
from skyloom.generate.validate import MAX_SECONDS, Settled, count_frames, settle
from skyloom.models.registry import ModelInfo


@dataclass(frozen=True)
class Plan:
    """A request with every default filled in. `shape` is what the model makes, at its own rate; of that, every
    `keep_every`-th frame is kept. It is made in `windows`. Of an edit, these are all windows of the spans of its
    `timeline` that are made, which lie as `layouts` say; `footage` are its sources."""

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
    layouts: tuple[Layout, ...] = ()
    footage: Footage | None = field(default=None, repr=False, compare=False)

    @property
    def seconds(self) -> float:
        """The length to ask for again: from the first frame to the last."""
        return (self.shape.frames - 1) / float(self.fps * self.keep_every)


def make_plan(request: Request, model: ModelInfo, scale: ScaleFactors) -> Plan:
    """Check a request against a model. Raises RequestError with what would fit."""
    request = request.with_seed()
    settled = settle(request, model)
    native = scale.latent_frames(model.frames)
    if request.edit is not None:
        return _plan_edit(request, settled, model, scale, native)
    shape = VideoShape(count_frames(request, model, scale), settled.height, settled.width)
    cards = place_cards(request.cards, request.prompt, shape, model.fps)
    if cards:
        windows = card_windows(cards, shape.frames, scale, native, model.rollout)
    else:
        windows = make_windows(scale.latent_frames(shape.frames), native, model.rollout)
    fps = Fraction(model.fps, settled.keep_every)
    steps, guidance, student = settled.num_steps, settled.guidance_scale, settled.quality.student
    assert request.seed is not None
    return Plan(
        request,
        shape,
        fps,
        settled.keep_every,
        steps,
        guidance,
        request.seed,
        windows,
        student,
        cards,
    )


def _plan_edit(
    request: Request, settled: Settled, model: ModelInfo, scale: ScaleFactors, native: int
) -> Plan:
    """The plan of an edit: its sources are opened, and every span that is made is laid out."""
    edit = request.edit
    assert edit is not None
    footage = open_footage(edit, model.fps, settled.height, settled.width)
    source = footage.sources[0]
    fps = source.fps
    check_source_limits(
        edit, width=source.width, height=source.height, fps=fps, frames=source.frames
    )
    timeline = EDIT_VERBS[edit.verb].build(edit, request.prompt.strip(), footage.sources, fps)
    if timeline.frames > MAX_SECONDS * fps:
        long = f"{float(timeline.frames / fps):.0f} seconds"
        raise RequestError(
            f"The edited video would have {long}.", hint=f"Cut it to {MAX_SECONDS} seconds at most."
        )
    layouts = tuple(
        lay_out(span, scale, native, model.rollout) for span in timeline.generated_spans
    )
    height, width = settled.height, settled.width
    first = timeline.spans[0]
    if isinstance(first, Filter):
        height, width = first.size or (source.height, source.width)
        fps *= first.rate_factor
    return Plan(
        request,
        VideoShape(timeline.frames, height, width),
        fps,
        1,
        settled.num_steps,
        settled.guidance_scale,
        request.seed or 0,  # none where nothing is sampled
        tuple(window for layout in layouts for window in layout.windows),
        settled.quality.student,
        timeline=timeline,
        layouts=layouts,
        footage=footage,
    )
