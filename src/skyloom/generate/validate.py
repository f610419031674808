"""What can be asked of a model: every check of a request that needs its manifest alone.

No torch in here, so that a server refuses before a worker is woken, by the rules that the plan keeps.
"""

from dataclasses import dataclass

from skyloom.core.errors import RequestError
from skyloom.core.types import ScaleFactors
from skyloom.generate.edit_verbs import EDIT_VERBS
from skyloom.generate.parsing import parse_size
from skyloom.generate.request import Request, check_seed
from skyloom.models.registry import ModelInfo, Quality
from skyloom.safety.moderation import refuse_prompt

MAX_PROMPT = 2_000
MAX_SECONDS = 3600
MAX_STEPS = 500
MAX_GUIDANCE = 30.0
MAX_RETAKES = 20
_SAMPLING = {
    "seed": "a seed",
    "num_steps": "steps",
    "guidance_scale": "guidance",
    "quality": "a quality",
    "negative_prompt": "a negative prompt",
}


@dataclass(frozen=True)
class Settled:
    """A request's choices with the model's defaults filled in: pixels, every how many frames one is kept, sampling."""

    width: int
    height: int
    keep_every: int
    quality: Quality
    num_steps: int
    guidance_scale: float


def settle(request: Request, model: ModelInfo) -> Settled:
    """Check a request against a model's manifest and the policy. Raises RequestError with what would fit, SafetyError
    for what is never made."""
    if not request.prompt.strip() and not request.cards and request.edit is None:
        raise RequestError(
            "The prompt is empty.",
            hint="Say what to show, like: a cat walking on the beach.",
            field="prompt",
        )
    _check_text("prompt", request.prompt, "prompt")
    _check_text("negative prompt", request.negative_prompt, "negative_prompt")
    for number, card in enumerate(request.cards, start=1):
        _check_text(f"prompt of card {number}", card.prompt, "cards")
    style = "" if request.edit is None else request.edit.style or ""
    refuse_prompt("\n".join([request.prompt, style, *(card.prompt for card in request.cards)]))
    if request.cards and request.image is not None:
        raise RequestError(
            "A storyboard takes its pictures from its cards.",
            hint="Put the image on the first card.",
            field="image",
        )
    _check_edit(request)
    width, height = _size(request, model)
    keep_every = _keep_every(request, model)
    _check_seconds(request)
    quality = _quality(request, model)
    steps = quality.num_steps if request.num_steps is None else request.num_steps
    if not 1 <= steps <= MAX_STEPS:
        raise RequestError(
            f"{steps} steps are out of range.",
            hint=f"Use 1 to {MAX_STEPS} steps.",
            field="num_steps",
        )
    guidance = quality.guidance_scale if request.guidance_scale is None else request.guidance_scale
    if not 0 <= guidance <= MAX_GUIDANCE:
        hint = f"Use 1 (off) to {MAX_GUIDANCE:g}."
        raise RequestError(
            f"A guidance of {guidance:g} is out of range.", hint=hint, field="guidance_scale"
        )
    if request.retakes is not None and not 1 <= request.retakes <= MAX_RETAKES:
        hint = f"Use 1 to {MAX_RETAKES}, or none."
        raise RequestError(
            f"{request.retakes} retakes are out of range.", hint=hint, field="retakes"
        )
    if request.seed is not None:
        check_seed(request.seed)
    return Settled(width, height, keep_every, quality, steps, guidance)


def count_frames(request: Request, model: ModelInfo, scale: ScaleFactors) -> int:
    """Frames for the asked seconds. Raises RequestError where the model cannot make that many."""
    _check_seconds(request)
    if request.seconds is None:
        return model.frames
    longest = (model.frames - 1) / model.fps
    frames = scale.frames_for(request.seconds, model.fps)
    if frames > model.frames and model.rollout is None:
        raise RequestError(
            f"{model.name} makes {longest:g} seconds at most, not {request.seconds:g}.",
            hint=f"Use --seconds {longest:g} or less, or a model that was trained to go on.",
            field="seconds",
        )
    return frames


def _check_edit(request: Request) -> None:
    """An edit has the length, the rate and the pictures of its videos."""
    if request.edit is None:
        return
    verb = EDIT_VERBS[request.edit.verb]
    if "prompt" in verb.required and not request.prompt.strip():
        raise RequestError(
            f"prompt is required for {verb.name}.",
            hint="Describe what the result shows.",
            field="prompt",
        )
    for name in ("seconds", "fps", "image", "retakes"):
        if getattr(request, name) is not None:
            raise RequestError(
                f"An edit has no {name} of its own.", hint=f"Leave {name} out.", field=name
            )
    if not request.samples:
        for name, said in _SAMPLING.items():
            if getattr(request, name) not in (None, ""):
                what = (
                    "A hard cut"
                    if request.edit.verb == "stitch"
                    else f"{request.edit.verb}, a filter,"
                )
                raise RequestError(
                    f"{what} has no use for {said}.", hint=f"Leave {said} out.", field=name
                )
    if request.cards:
        hint = "Make the storyboard first, then edit it."
        raise RequestError("An edit has no cards.", hint=hint, field="cards")


def _quality(request: Request, model: ModelInfo) -> Quality:
    """The asked quality, or the model's default: its student if it has one and what is asked suits a student.

    A student has its guidance and its few steps in its weights: who asks for others, or for a negative prompt,
    gets the guided model. Raises RequestError when the fast quality is asked for by name with any of these.
    """
    qualities = model.qualities
    name = request.quality
    if name is not None and name not in qualities:
        raise RequestError(
            f"{model.name} has no quality {name!r}.",
            hint=f"It has: {', '.join(qualities)}.",
            field="quality",
        )
    chosen = qualities[name or model.quality]
    if not chosen.student:
        return chosen
    guided = request.guidance_scale not in (None, 1.0) or bool(request.negative_prompt.strip())
    longer = request.num_steps is not None and request.num_steps > chosen.num_steps
    if not guided and not longer:
        return chosen
    if name is None:
        return qualities["best"]
    what = (
        f"{request.num_steps} steps" if longer and not guided else "guidance or a negative prompt"
    )
    raise RequestError(
        f"The fast quality of {model.name} cannot take {what}.",
        hint=f"Use quality best, or at most {chosen.num_steps} steps and no guidance.",
        field="quality",
    )


def _size(request: Request, model: ModelInfo) -> tuple[int, int]:
    if request.size is None:
        return parse_size(model.sizes[0])
    width, height = parse_size(request.size)
    if f"{width}x{height}" in model.sizes:
        return width, height
    wanted = (width, height)
    nearest = sorted(
        model.sizes,
        key=lambda size: sum(abs(a - b) for a, b in zip(parse_size(size), wanted, strict=True)),
    )
    raise RequestError(
        f"{model.name} does not make {width}x{height}.",
        hint=f"The nearest sizes are {', '.join(nearest[:3])}.",
        field="size",
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
            f"{model.name} makes {model.fps} fps, not {request.fps:g}.",
            hint=f"Use --fps {model.fps}{kept}.",
            field="fps",
        )
    return rates[int(request.fps)]


def _check_seconds(request: Request) -> None:
    if request.seconds is not None and not 0 < request.seconds <= MAX_SECONDS:
        hint = f"Use more than 0, up to {MAX_SECONDS}."
        raise RequestError(
            f"{request.seconds:g} seconds are out of range.", hint=hint, field="seconds"
        )


def _check_text(name: str, text: str, field: str) -> None:
    if len(text) > MAX_PROMPT:
        hint = f"Use {MAX_PROMPT:,} at most."
        raise RequestError(f"The {name} has {len(text):,} characters.", hint=hint, field=field)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        hint = "Type it as UTF-8 text."
        raise RequestError(f"The {name} is not valid Unicode.", hint=hint, field=field) from error
