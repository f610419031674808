"""Check a request against a model's manifest and the policy, and fill in defaults.

No torch is imported here, so the server applies the same rules before a worker gets the job.
"""

from dataclasses import dataclass, replace

from skyloom.core.errors import RequestError
from skyloom.core.types import ScaleFactors
from skyloom.generate.edit_verbs import EDIT_VERBS
from skyloom.generate.parsing import parse_size
from skyloom.generate.request import Request, check_seed
from skyloom.models.family import Schedule
from skyloom.models.registry import ModelInfo, Quality
from skyloom.safety.moderation import refuse_prompt

MAX_PROMPT = 2_000
MAX_SECONDS = 3600
MAX_STEPS = 500
MAX_GUIDANCE = 30.0
MAX_RETAKES = 20
_SAMPLING_FIELDS = (
    "seed",
    "num_steps",
    "guidance_scale",
    "quality",
    "negative_prompt",
    "loras",
    "schedule",
)


@dataclass(frozen=True)
class ResolvedRequest:
    """A request's values with defaults filled in. Every `keep_every`-th frame is output."""

    width: int
    height: int
    keep_every: int
    quality: Quality
    num_steps: int
    guidance_scale: float
    schedule: Schedule


def resolve_defaults(
    request: Request, model: ModelInfo, *, moderate: bool = True
) -> ResolvedRequest:
    """Check a request against a model and the policy. Raises RequestError or SafetyError."""
    _check_prompts(request, moderate=moderate)
    if request.cards and request.image is not None:
        raise RequestError(
            "image must be left out for a storyboard.",
            hint="Put the image on the first card.",
            field="image",
        )
    _check_edit(request, model)
    width, height = _resolve_size(request, model)
    keep_every = _resolve_keep_every(request, model)
    _check_seconds(request)
    quality = _resolve_quality(request, model)
    steps = quality.num_steps if request.num_steps is None else request.num_steps
    _check_range("num_steps", steps, 1, MAX_STEPS)
    guidance = quality.guidance_scale if request.guidance_scale is None else request.guidance_scale
    _check_range("guidance_scale", guidance, 0, MAX_GUIDANCE, hint="1 turns guidance off.")
    if request.retakes is not None:
        _check_range("retakes", request.retakes, 1, MAX_RETAKES)
    if request.seed is not None:
        check_seed(request.seed)
    schedule = _resolve_schedule(request, quality.schedule or model.schedule, steps)
    return ResolvedRequest(
        width,
        height,
        keep_every,
        quality=quality,
        num_steps=steps,
        guidance_scale=guidance,
        schedule=schedule.at_size(width, height),
    )


def count_frames(request: Request, model: ModelInfo, scale: ScaleFactors) -> int:
    """Number of frames of a request. Raises RequestError for an invalid length."""
    _check_seconds(request)
    return model.frames if request.seconds is None else scale.frames_for(request.seconds, model.fps)


def length_notice(model: ModelInfo) -> str:
    """The sentence for the user about a shot longer than the videos of a model's training."""
    return (
        f"{model.name} was trained on videos of {model.frames} frames "
        f"({(model.frames - 1) / model.fps:g} s). Longer shots are made in windows that see the "
        "last frames before them; their quality has not been measured."
    )


def _check_prompts(request: Request, *, moderate: bool) -> None:
    """Check the presence and length of all texts and, with `moderate`, their content."""
    if not request.prompt.strip() and not request.cards and request.edit is None:
        raise RequestError(
            "prompt must not be empty.",
            hint="Describe the video, like: a cat walking on the beach.",
            field="prompt",
        )
    _check_text("prompt", request.prompt, "prompt")
    _check_text("negative_prompt", request.negative_prompt, "negative_prompt")
    for number, card in enumerate(request.cards, start=1):
        _check_text(f"prompt of card {number}", card.prompt, "cards")
    style = "" if request.edit is None else request.edit.style or ""
    if moderate:
        texts = [request.prompt, style, *(card.prompt for card in request.cards)]
        refuse_prompt("\n".join(texts))


def _check_edit(request: Request, model: ModelInfo) -> None:
    """Refuse verbs that the model cannot do, and fields that an edit cannot use."""
    if request.edit is None:
        return
    verb = EDIT_VERBS[request.edit.verb]
    if verb.uses_model and verb.name not in model.edit_verbs:
        possible = ", ".join(model.edit_verbs) or "only verbs without a model"
        raise RequestError(
            f"verb must be one that {model.name} can do ({possible}), got {verb.name}.",
            hint="Use another model.",
            field="edit",
        )
    if "prompt" in verb.required and not request.prompt.strip():
        raise RequestError(
            f"prompt must be given for {verb.name}, got none.",
            hint="Describe what the result shows.",
            field="prompt",
        )
    for name in ("seconds", "fps", "image", "retakes"):
        if getattr(request, name) is not None:
            raise RequestError(
                f"{name} must be left out for an edit.",
                hint="An edit takes length, rate and pictures from its videos.",
                field=name,
            )
    for name in () if request.needs_model else _SAMPLING_FIELDS:
        if getattr(request, name) not in (None, "", ()):
            kind = "a hard cut" if verb.name == "stitch" else f"{verb.name}, which uses no model"
            raise RequestError(f"{name} must be left out for {kind}.", field=name)
    if request.cards:
        raise RequestError(
            "cards must be left out for an edit.",
            hint="Generate the storyboard first, then edit it.",
            field="cards",
        )


def _resolve_quality(request: Request, model: ModelInfo) -> Quality:
    """The requested quality, or the model's default.

    The distilled student has fixed guidance and few steps. A request for guidance, a negative
    prompt or more steps gets the guided model instead. Raises RequestError if the student's
    quality is requested by name together with any of these.
    """
    qualities = model.qualities
    name = request.quality
    if name is not None and name not in qualities:
        raise RequestError(
            f"quality must be one of {', '.join(qualities)} for {model.name}, got {name!r:.40}.",
            field="quality",
        )
    chosen = qualities[name or model.quality]
    if not chosen.student:
        return chosen
    guided = request.guidance_scale not in (None, 1.0) or bool(request.negative_prompt.strip())
    more_steps = request.num_steps is not None and request.num_steps > chosen.num_steps
    if not guided and not more_steps:
        return chosen
    if name is None:
        return qualities["best"]
    cause = f"{request.num_steps} steps"
    if guided:
        cause = "guidance or a negative prompt"
    raise RequestError(
        f"quality must be best for {cause}, got {name}.",
        hint=f"{name} takes at most {chosen.num_steps} steps and no guidance.",
        field="quality",
    )


def _resolve_schedule(request: Request, schedule: Schedule, num_steps: int) -> Schedule:
    """The schedule, with the spacing of the levels that the request names."""
    if request.schedule is not None:
        if request.schedule not in schedule.comparable:
            raise RequestError(
                f"schedule must be {' or '.join(schedule.comparable)} for this model, "
                f"got {request.schedule!r:.40}.",
                hint="Leave it out.",
                field="schedule",
            )
        schedule = replace(schedule, levels=request.schedule)
    if schedule.timesteps and num_steps != len(schedule.timesteps):
        raise RequestError(
            f"num_steps must be {len(schedule.timesteps)} for a model with listed noise levels, "
            f"got {num_steps}.",
            hint="Leave it out.",
            field="num_steps",
        )
    return schedule


def _resolve_size(request: Request, model: ModelInfo) -> tuple[int, int]:
    """Width and height in pixels."""
    if request.size is None:
        return model.size_rule.default
    width, height = parse_size(request.size)
    model.size_rule.check(width, height)
    return width, height


def _resolve_keep_every(request: Request, model: ModelInfo) -> int:
    """The step between output frames. Lower rates drop frames; higher ones are not possible."""
    if request.fps is None:
        return 1
    rates = {model.fps // step: step for step in range(1, model.fps + 1) if model.fps % step == 0}
    if request.fps not in rates:
        choices = ", ".join(str(rate) for rate in rates)
        raise RequestError(
            f"fps must be one of {choices} for {model.name}, got {request.fps:g}.",
            hint="A lower rate drops frames.",
            field="fps",
        )
    return rates[int(request.fps)]


def _check_seconds(request: Request) -> None:
    if request.seconds is not None and not 0 < request.seconds <= MAX_SECONDS:
        raise RequestError(
            f"seconds must be > 0 and <= {MAX_SECONDS}, got {request.seconds:g}.", field="seconds"
        )


def _check_range(
    name: str, value: float, minimum: float, maximum: float, hint: str | None = None
) -> None:
    if not minimum <= value <= maximum:
        raise RequestError(
            f"{name} must be from {minimum:g} to {maximum:g}, got {value:g}.",
            hint=hint,
            field=name,
        )


def _check_text(name: str, text: str, field: str) -> None:
    """Check the length and encoding of a text."""
    if len(text) > MAX_PROMPT:
        raise RequestError(
            f"{name} must be at most {MAX_PROMPT:,} characters, got {len(text):,}.", field=field
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{name} must be valid Unicode.", field=field) from error
