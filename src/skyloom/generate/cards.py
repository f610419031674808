"""Cards of a storyboard: prompts and media at times. All times are exact fractions of a second."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from skyloom.core.errors import RequestError
from skyloom.core.types import MAX_SEED
from skyloom.generate.parsing import TIME_HINT, parse_clock

_TYPES: dict[str, tuple[str, tuple[type, ...]]] = {
    "at": ("a time in seconds", (str, int, float)),
    "prompt": ("text", (str,)),
    "image": ("a path", (str,)),
    "video": ("a path", (str,)),
    "strength": ("a number", (int, float)),
    "seed": ("an integer", (int,)),
    "cut": ("true or false", (bool,)),
    "morph": ("a time in seconds", (str, int, float)),
}


class CardError(RequestError):
    """An invalid card: `card` counts from 1, `key` is the invalid field."""

    def __init__(self, card: int, key: str, message: str, hint: str = "") -> None:
        super().__init__(f"Card {card}: {message}", hint=hint, field="cards")
        self.card = card
        self.key = key
        self.reason = message


@dataclass(frozen=True)
class Card:
    """A prompt from the time `at` on (seconds: 2.5, "1:02.5" or "13/16").

    An `image` or `video` is placed at that time; `strength` is 0 (fixed) to 1 (unconstrained).
    `cut` starts a new shot. Without it, the prompt is crossfaded over `morph` seconds (default:
    0.5). `seed` makes the noise of the card independent of the request's seed.
    """

    at: str
    prompt: str
    image: str | None = None
    video: str | None = None
    strength: float = 0.0
    seed: int | None = None
    cut: bool = False
    morph: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values; defaults are left out."""
        defaults = {"strength": 0.0, "cut": False}
        return {
            key: value
            for key, value in asdict(self).items()
            if value is not None and defaults.get(key) != value
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], number: int) -> "Card":
        """Build card `number` from plain values. Raises CardError."""
        known = {field.name for field in fields(cls)}
        for key, value in values.items():
            if key not in known:
                hint = f"Fields: {', '.join(sorted(known))}."
                raise CardError(number, key, f"no field {key!r}.", hint=hint)
            constraint, types = _TYPES[key]
            if not isinstance(value, types) or (isinstance(value, bool) and key != "cut"):
                raise CardError(number, key, f"{key} must be {constraint}, got {value!r:.60}.")
        for key in ("at", "prompt"):
            if key not in values:
                raise CardError(number, key, f"{key} must be given, got none.")
        converted = dict(values)
        for key in ("at", "morph"):
            if key in values:
                converted[key] = str(values[key])
        if "strength" in values:
            converted["strength"] = float(values["strength"])
        card = cls(**converted)
        card.check(number)
        return card

    def check(self, number: int) -> None:
        """Raise CardError for invalid values of this card alone."""
        for key in ("at", "morph"):
            value = getattr(self, key)
            if value is not None and parse_clock(value) is None:
                message = f"{key} must be a time in seconds, got {value!r:.40}."
                raise CardError(number, key, message, hint=TIME_HINT)
        if not self.prompt.strip():
            raise CardError(number, "prompt", "prompt must not be empty.")
        if not 0 <= self.strength <= 1:
            message = f"strength must be from 0 to 1, got {self.strength:g}."
            raise CardError(number, "strength", message)
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            message = f"seed must be from 0 to 2^63 - 1, got {self.seed}."
            raise CardError(number, "seed", message)
        if self.image and self.video:
            message = "image and video exclude each other."
            raise CardError(number, "video", message, hint="Leave one of them out.")
        if self.cut and self.morph is not None:
            message = "cut and morph exclude each other."
            raise CardError(number, "morph", message, hint="Leave one of them out.")
