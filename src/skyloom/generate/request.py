# pyright: basic
"""Request: the frozen, JSON-serializable description of a video to generate.

The command line, Python, the API and receipts all serialize to it, so any video can be repeated.
"""

import difflib
import json
import math
import operator
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from numbers import Real
from pathlib import Path
from typing import Any

from skyloom.core.errors import RequestError
from skyloom.core.types import MAX_SEED
from skyloom.generate.cards import Card, CardError
from skyloom.generate.edit_spec import Edit
from skyloom.generate.loras import Lora, parse_loras
from skyloom.generate.parsing import parse_size  # noqa: F401 - part of this module's interface
from skyloom.safety.consent import MediaConsent

_INTEGERS = ("seed", "num_steps", "retakes")
_NUMBERS = ("seconds", "fps", "guidance_scale")


@dataclass(frozen=True)
class Request:
    """Description of a video to generate.

    None is the model's default; a seed of None is drawn and reported.

    `model` None is the model of the pipeline. `quality` is "fast" (distilled student: few steps,
    no guidance) or "best" (many steps, guided), if the model has both. `cards` make a storyboard;
    its prompt, which may be empty, is appended to each card's. `edit` changes existing videos,
    whose length and size the result has. `retakes` is how often a window may be sampled
    again that does not match the first one. `loras` change the model: names or paths of files, with
    weights; also given as "NAME:WEIGHT". `schedule` is the spacing of an open
    checkpoint's noise levels, to compare: "wan" (the original code) or "diffusers". `consent` is
    that of the people in the media: who, scope and expiry. Raises RequestError for values of the
    wrong type.
    """

    prompt: str
    model: str | None = None
    seconds: float | None = None
    size: str | None = None
    fps: float | None = None
    seed: int | None = None
    num_steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str = ""
    image: str | None = None
    quality: str | None = None
    cards: tuple[Card, ...] = ()
    edit: Edit | None = None
    retakes: int | None = None
    loras: tuple[Lora, ...] = ()
    schedule: str | None = None
    consent: MediaConsent | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "cards", _parse_cards(self.cards))
        object.__setattr__(self, "edit", _parse_edit(self.edit))
        object.__setattr__(self, "loras", parse_loras(self.loras))
        object.__setattr__(self, "consent", _parse_consent(self.consent))
        for field in fields(self):
            if field.name in ("cards", "edit", "loras", "consent"):
                continue
            value = getattr(self, field.name)
            if value is not None or field.name in ("prompt", "negative_prompt"):
                object.__setattr__(self, field.name, _parse_value(field.name, value))

    @property
    def media(self) -> list[str]:
        """Paths of the pictures and videos that the video starts from, without masks."""
        of_cards = [path for card in self.cards for path in (card.image, card.video)]
        of_edit = [] if self.edit is None else self.edit.videos
        return list(
            dict.fromkeys(path for path in (self.image, *of_cards, *of_edit) if path is not None)
        )

    @property
    def needs_model(self) -> bool:
        """Whether a model generates frames, so that seed, steps and guidance apply."""
        return self.edit is None or self.edit.needs_model

    def with_seed(self) -> "Request":
        """The same request with a random seed, unless it has one or needs none."""
        if self.seed is not None or not self.needs_model:
            return self
        return replace(self, seed=secrets.randbelow(2**31))

    def with_fields(self, values: Mapping[str, Any]) -> "Request":
        """The same request with some fields replaced. Raises RequestError for an unknown one."""
        return self.from_dict({**self.to_dict(), **values})

    def to_dict(self) -> dict[str, Any]:
        """Plain values; fields that are None or empty are left out."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["cards"] = [card.to_dict() for card in self.cards] or None
        values["loras"] = [asdict(lora) for lora in self.loras] or None
        values["edit"] = None if self.edit is None else self.edit.to_dict()
        values["consent"] = None if self.consent is None else self.consent.to_dict()
        return {key: value for key, value in values.items() if value is not None}

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(self.to_dict(), ensure_ascii=False)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Request":
        """The inverse of `to_dict`. Raises RequestError for an unknown field."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"Did you mean {near[0]!r}?" if near else f"Fields: {', '.join(known)}."
                raise RequestError(f"A request has no field {name!r}.", hint=hint)
        if "prompt" not in values:
            raise RequestError(
                "prompt must be given, got none.", hint="Describe the video.", field="prompt"
            )
        return cls(**values)


def check_seed(seed: int) -> int:
    """Return the seed. Raises RequestError if it is out of range."""
    if not 0 <= seed <= MAX_SEED:
        raise RequestError(f"seed must be from 0 to 2^63 - 1, got {seed}.", field="seed")
    return seed


def _parse_edit(value: object) -> Edit | None:
    """An Edit, also from plain values."""
    if value is None or isinstance(value, Edit):
        return value
    if not isinstance(value, Mapping):
        raise RequestError(
            f"edit must be a table with a verb and videos, got {value!r:.80}.", field="edit"
        )
    return Edit.from_dict(value)


def _parse_consent(value: object) -> MediaConsent | None:
    """A MediaConsent, also from plain values."""
    if value is None or isinstance(value, MediaConsent):
        return value
    if not isinstance(value, Mapping):
        raise RequestError(
            f"consent must be a table of who, scope and expiry, got {value!r:.80}.",
            field="consent",
        )
    return MediaConsent.from_dict(value)


def _parse_cards(values: object) -> tuple[Card, ...]:
    """Cards, also from plain values."""
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise RequestError(f"cards must be a list of cards, got {values!r:.80}.", field="cards")
    return tuple(_parse_card(value, number) for number, value in enumerate(values, start=1))


def _parse_card(value: object, number: int) -> Card:
    if isinstance(value, Card):
        return value
    if not isinstance(value, Mapping):
        raise CardError(number, "at", f"must be a table with `at` and `prompt`, got {value!r:.60}.")
    return Card.from_dict(value, number)


def _parse_value(name: str, value: object) -> object:
    """A value in the type of its field: numpy numbers become Python ones, paths become text."""
    if name in _INTEGERS:
        constraint = "an integer"
        if not isinstance(value, bool):
            with suppress(TypeError):
                return operator.index(value)  # type: ignore[arg-type]
    elif name in _NUMBERS:
        constraint = "a finite number"
        if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    else:
        constraint = "text"
        if isinstance(value, str):
            return value
        if name in ("image", "model") and isinstance(value, Path):
            return str(value)
    raise RequestError(f"{name} must be {constraint}, got {value!r:.80}.", field=name)
