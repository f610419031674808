"""Cards of a storyboard: what a video shows from when on. All times are exact fractions of a second."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from skyloom.core.errors import RequestError
from skyloom.core.types import MAX_SEED
from skyloom.generate.parsing import TIME_HINT, parse_clock

_KINDS: dict[str, tuple[type, ...]] = {
    "at": (str, int, float),
    "prompt": (str,),
    "image": (str,),
    "video": (str,),
    "strength": (int, float),
    "seed": (int,),
    "cut": (bool,),
    "morph": (str, int, float),
}


class CardError(RequestError):
    """A card that cannot be made: `card` counts from 1, `key` is the field that is wrong."""

    def __init__(self, card: int, key: str, message: str, hint: str = "") -> None:
        super().__init__(f"Card {card}: {message}", hint=hint, field="cards")
        self.card, self.key, self.reason = card, key, message


@dataclass(frozen=True)
class Card:
    """From `at` on (seconds: 2.5, "1:02.5" or "13/16") the video shows `prompt`.

    An `image` or `video` is pinned there; it may move from it as far as `strength` says (0: not at all). `cut` begins a
    new shot; without it the new prompt comes in over `morph` seconds (half a second). `seed` makes its take its own.
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
        """Plain values; what a card does not say is left out."""
        unsaid = {"strength": 0.0, "cut": False}
        return {
            key: value
            for key, value in asdict(self).items()
            if value is not None and unsaid.get(key) != value
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], number: int) -> "Card":
        """A card from plain values. Raises CardError for unknown keys and values of the wrong kind."""
        known = {field.name for field in fields(cls)}
        for key, value in values.items():
            if key not in known:
                raise CardError(
                    number, key, f"no field {key!r}.", hint=f"Fields: {', '.join(sorted(known))}."
                )
            if not isinstance(value, _KINDS[key]) or (isinstance(value, bool) and key != "cut"):
                kinds = " or ".join(kind.__name__ for kind in _KINDS[key])
                raise CardError(
                    number, key, f"{key} is {value!r:.60}.", hint=f"It must be {kinds}."
                )
        for key in ("at", "prompt"):
            if key not in values:
                raise CardError(
                    number,
                    key,
                    f"it has no {key!r}.",
                    hint="A card needs at least `at` and `prompt`.",
                )
        clock = {key: str(values[key]) for key in ("at", "morph") if key in values}
        strength = {"strength": float(values["strength"])} if "strength" in values else {}
        card = cls(**{**values, **clock, **strength})
        card.check(number)
        return card

    def check(self, number: int) -> None:
        """Raise CardError for what is wrong with this card alone."""
        for key in ("at", "morph"):
            value = getattr(self, key)
            if value is not None and parse_clock(value) is None:
                message = f"{key} must be a time in seconds, got {value!r:.40}."
                raise CardError(number, key, message, hint=TIME_HINT)
        if not self.prompt.strip():
            raise CardError(number, "prompt", "its prompt is empty.", hint="Say what to show.")
        if not 0 <= self.strength <= 1:
            raise CardError(
                number,
                "strength",
                f"a strength of {self.strength:g}.",
                hint="Use 0 (as it is) to 1 (free).",
            )
        if self.seed is not None and not 0 <= self.seed <= MAX_SEED:
            raise CardError(
                number, "seed", f"the seed {self.seed} is out of range.", hint="Use 0 to 2^63 - 1."
            )
        if self.image and self.video:
            raise CardError(number, "video", "an image and a video.", hint="Pin one of them.")
        if self.cut and self.morph is not None:
            raise CardError(number, "morph", "a cut and a morph.", hint="Leave one of them out.")
