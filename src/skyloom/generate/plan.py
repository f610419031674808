"""The plan of a request, before any work: exact shapes, steps and guidance, or a refusal that says what would do."""

from dataclasses import dataclass
from fractions import Fraction

from skyloom.core.types import ScaleFactors, VideoShape
from skyloom.generate.limits import count_frames, settle
from skyloom.generate.request import Request
from skyloom.generate.rollout import Window, make_windows
from skyloom.generate.storyboard import PlacedCard, card_windows, place_cards
from skyloom.models.registry import ModelInfo


@dataclass(frozen=True)
class Plan:
    """A request with every default filled in. `shape` is what the model makes, at its own rate; of that, every
    `keep_every`-th frame is kept. It is made in `windows`."""

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

    @property
    def seconds(self) -> float:
        """The length to ask for again: from the first frame to the last."""
        return (self.shape.frames - 1) / float(self.fps * self.keep_every)


def make_plan(request: Request, model: ModelInfo, scale: ScaleFactors) -> Plan:
    """Check a request against a model. Raises RequestError with what would fit."""
    request = request.with_seed()
    assert request.seed is not None
    settled = settle(request, model)
    shape = VideoShape(count_frames(request, model, scale), settled.height, settled.width)
    cards = place_cards(request.cards, request.prompt, shape, model.fps)
    native = scale.latent_frames(model.frames)
    if cards:
        windows = card_windows(cards, shape.frames, scale, native, model.rollout)
    else:
        windows = make_windows(scale.latent_frames(shape.frames), native, model.rollout)
    fps, steps, guidance = Fraction(model.fps, settled.keep_every), settled.num_steps, settled.guidance_scale
    student = settled.quality.student
    return Plan(request, shape, fps, settled.keep_every, steps, guidance, request.seed, windows, student, cards)
