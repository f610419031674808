"""The plan of a request, before any work: exact shapes, steps and guidance, or a refusal that says what would do."""

from dataclasses import dataclass, field
from fractions import Fraction

from skyloom.core.errors import RequestError
from skyloom.core.types import ScaleFactors, VideoShape
from skyloom.generate.edit import edit_timeline
from skyloom.generate.footage import FILTERS, Footage, open_footage
from skyloom.generate.layout import Layout, lay_out
from skyloom.generate.request import Request, check_seed, parse_size
from skyloom.generate.rollout import Window, make_windows
from skyloom.generate.storyboard import PlacedCard, card_windows, place_cards
from skyloom.generate.timeline import Filter, Timeline
from skyloom.models.registry import ModelInfo, Quality

MAX_PROMPT = 2_000
MAX_SECONDS = 3600
MAX_STEPS = 500
MAX_GUIDANCE = 30.0


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
    assert request.seed is not None
    if not request.prompt.strip() and not request.cards and request.edit is None:
        raise RequestError("The prompt is empty.", hint="Say what to show, like: a cat walking on the beach.")
    _check_text("prompt", request.prompt)
    _check_text("negative prompt", request.negative_prompt)
    width, height = _size(request, model)
    keep_every = _keep_every(request, model)
    quality = _quality(request, model)
    steps = quality.num_steps if request.num_steps is None else request.num_steps
    if not 1 <= steps <= MAX_STEPS:
        raise RequestError(f"{steps} steps are out of range.", hint=f"Use 1 to {MAX_STEPS} steps.")
    guidance = quality.guidance_scale if request.guidance_scale is None else request.guidance_scale
    if not 0 <= guidance <= MAX_GUIDANCE:
        raise RequestError(f"A guidance of {guidance:g} is out of range.", hint=f"Use 1 (off) to {MAX_GUIDANCE:g}.")
    if request.edit is not None:
        return _plan_edit(request, model, scale, (quality, steps, guidance), (height, width))
    shape = VideoShape(_frames(request, model, scale), height, width)
    cards = _cards(request, shape, model)
    native = scale.latent_frames(model.frames)
    if cards:
        windows = card_windows(cards, shape.frames, scale, native, model.rollout)
    else:
        windows = make_windows(scale.latent_frames(shape.frames), native, model.rollout)
    fps, seed = Fraction(model.fps, keep_every), check_seed(request.seed)
    return Plan(request, shape, fps, keep_every, steps, guidance, seed, windows, quality.student, cards)


def _plan_edit(
    request: Request,
    model: ModelInfo,
    scale: ScaleFactors,
    how: tuple[Quality, int, float],
    size: tuple[int, int],
) -> Plan:
    """The plan of an edit: its sources are opened, and every span that is made is laid out."""
    edit, seed = request.edit, request.seed
    assert edit is not None and seed is not None
    for name in ("seconds", "fps", "image"):
        if getattr(request, name) is not None:
            raise RequestError(f"An edit takes its {name} from its videos.", hint=f"Leave {name} out.")
    if request.cards:
        raise RequestError("An edit has no cards.", hint="Make the storyboard first, then edit it.")
    footage = open_footage(edit, model.fps, *size)
    fps = footage.sources[0].fps
    timeline = edit_timeline(edit, request.prompt, footage.sources, fps)
    if timeline.frames > MAX_SECONDS * fps:
        long = f"{float(timeline.frames / fps):.0f} seconds"
        raise RequestError(f"The edited video would have {long}.", hint=f"Cut it to {MAX_SECONDS} seconds at most.")
    native = scale.latent_frames(model.frames)
    layouts = tuple(lay_out(span, scale, native, model.rollout) for span in timeline.made)
    windows = tuple(window for layout in layouts for window in layout.windows)
    quality, steps, guidance = how
    height, width = size
    if edit.verb in FILTERS:
        filtered = timeline.spans[0]
        assert isinstance(filtered, Filter)
        height, width = filtered.size or (footage.sources[0].height, footage.sources[0].width)
        fps = fps * filtered.times
    shape = VideoShape(timeline.frames, height, width)
    return Plan(
        request,
        shape,
        fps,
        1,
        steps,
        guidance,
        check_seed(seed),
        windows,
        quality.student,
        timeline=timeline,
        layouts=layouts,
        footage=footage,
    )


def _cards(request: Request, shape: VideoShape, model: ModelInfo) -> tuple[PlacedCard, ...]:
    """The cards of a storyboard on their frames; none for a plain request."""
    for number, card in enumerate(request.cards, start=1):
        _check_text(f"prompt of card {number}", card.prompt)
    if request.cards and request.image is not None:
        raise RequestError("A storyboard takes its pictures from its cards.", hint="Put the image on the first card.")
    return place_cards(request.cards, request.prompt, shape, model.fps)


def _quality(request: Request, model: ModelInfo) -> Quality:
    """The asked quality, or the model's default: its student if it has one and what is asked suits a student.

    A student has its guidance and its few steps in its weights: who asks for others, or for a negative prompt,
    gets the guided model. Raises RequestError when the fast quality is asked for by name with any of these.
    """
    qualities = model.qualities
    name = request.quality
    if name is not None and name not in qualities:
        raise RequestError(f"{model.name} has no quality {name!r}.", hint=f"It has: {', '.join(qualities)}.")
    chosen = qualities[name or model.quality]
    if not chosen.student:
        return chosen
    guided = request.guidance_scale not in (None, 1.0) or bool(request.negative_prompt.strip())
    longer = request.num_steps is not None and request.num_steps > chosen.num_steps
    if not guided and not longer:
        return chosen
    if name is None:
        return qualities["best"]
    what = f"{request.num_steps} steps" if longer and not guided else "guidance or a negative prompt"
    raise RequestError(
        f"The fast quality of {model.name} cannot take {what}.",
        hint=f"Use quality best, or at most {chosen.num_steps} steps and no guidance.",
    )


def _check_text(name: str, text: str) -> None:
    if len(text) > MAX_PROMPT:
        raise RequestError(f"The {name} has {len(text):,} characters.", hint=f"Use {MAX_PROMPT:,} at most.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"The {name} is not valid Unicode.", hint="Type it as UTF-8 text.") from error


def _size(request: Request, model: ModelInfo) -> tuple[int, int]:
    if request.size is None:
        return parse_size(model.sizes[0])
    width, height = parse_size(request.size)
    if f"{width}x{height}" in model.sizes:
        return width, height
    wanted = (width, height)
    nearest = sorted(
        model.sizes, key=lambda size: sum(abs(a - b) for a, b in zip(parse_size(size), wanted, strict=True))
    )
    raise RequestError(
        f"{model.name} does not make {width}x{height}.",
        hint=f"The nearest sizes are {', '.join(nearest[:3])}.",
    )


def _keep_every(request: Request, model: ModelInfo) -> int:
    """Other rates than the model's own are made by leaving frames out, never by inventing some."""
    if request.fps is None:
        return 1
    rates = {model.fps // step: step for step in range(1, model.fps + 1) if model.fps % step == 0}
    if request.fps not in rates:
        slower = ", ".join(str(rate) for rate in list(rates)[1:])
        kept = f" (or {slower}: fewer of the same frames)" if slower else ""
        raise RequestError(
            f"{model.name} makes {model.fps} fps, not {request.fps:g}.", hint=f"Use --fps {model.fps}{kept}."
        )
    return rates[int(request.fps)]


def _frames(request: Request, model: ModelInfo, scale: ScaleFactors) -> int:
    if request.seconds is None:
        return model.frames
    longest = (model.frames - 1) / model.fps
    if not 0 < request.seconds <= MAX_SECONDS:
        raise RequestError(
            f"{request.seconds:g} seconds are out of range.", hint=f"Use more than 0, up to {MAX_SECONDS}."
        )
    frames = scale.frames_for(request.seconds, model.fps)
    if frames > model.frames and model.rollout is None:
        raise RequestError(
            f"{model.name} makes {longest:g} seconds at most, not {request.seconds:g}.",
            hint=f"Use --seconds {longest:g} or less, or a model that was trained to go on.",
        )
    return frames
