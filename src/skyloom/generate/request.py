"""Request: every way of asking, as one frozen, JSON-able description of work.

Command line, Python and receipts are serialisations of it, so any video can be made again.
"""

import difflib
import json
import math
import operator
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Real
from pathlib import Path
from typing import Any

from skyloom.core.errors import RequestError
from skyloom.core.types import MAX_SEED
from skyloom.generate.cards import Card, CardError
from skyloom.generate.edit_spec import Edit
from skyloom.generate.parsing import parse_size  # noqa: F401 - part of this module's interface

_WHOLE = ("seed", "num_steps", "retakes")
_NUMBERS = ("seconds", "fps", "guidance_scale")


@dataclass(frozen=True)
class Request:
    """What to make. None means: the model's own default (for the seed: drawn at random, and then reported).

    `model` None means whichever model the pipeline holds; `quality` is "fast" (a few steps, no guidance) or
    "best" (many steps, guided), as far as the model has both. With `cards` (a storyboard) the video shows one after
    another, and the prompt, which may be empty, is said with each of theirs. With an `edit` it is made of other videos,
    whose length and size it has. Windows that do not hold together with the first are made again up to `retakes` times.
    Values of the wrong kind raise RequestError.
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "cards", _cards(self.cards))
        object.__setattr__(self, "edit", _edit(self.edit))
        for field in fields(self):
            if field.name in ("cards", "edit"):
                continue
            value = getattr(self, field.name)
            if value is not None or field.name in ("prompt", "negative_prompt"):
                object.__setattr__(self, field.name, _checked(field.name, value))

    @property
    def media(self) -> list[str]:
        """The pictures and videos that are started from, each once; a mask is none of them."""
        pinned = [path for card in self.cards for path in (card.image, card.video)]
        edited = [] if self.edit is None else self.edit.videos
        return list(
            dict.fromkeys(path for path in (self.image, *pinned, *edited) if path is not None)
        )

    @property
    def samples(self) -> bool:
        """Whether the model makes any of it, so that a seed, steps and guidance mean something."""
        return self.edit is None or self.edit.samples

    def with_seed(self) -> "Request":
        """The same request with a seed, if one means something to it."""
        return (
            self
            if self.seed is not None or not self.samples
            else replace(self, seed=secrets.randbelow(2**31))
        )

    def with_fields(self, values: Mapping[str, Any]) -> "Request":
        """The same request with some fields replaced. Raises RequestError for an unknown one."""
        return self.from_dict({**self.to_dict(), **values})

    def to_dict(self) -> dict[str, Any]:
        """Plain values; what is None is left out, and cards where there are none."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["cards"] = [card.to_dict() for card in self.cards] or None
        values["edit"] = None if self.edit is None else self.edit.to_dict()
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
                "A request needs a prompt.", hint="Say what to show.", field="prompt"
            )
        return cls(**values)


def _edit(value: object) -> Edit | None:
    """An edit as it is, or from plain values."""
    if value is None or isinstance(value, Edit):
        return value
    if not isinstance(value, Mapping):
        raise RequestError(
            f"edit is {value!r:.80}.", hint="It must be a table with a verb and videos."
        )
    return Edit.from_dict(value)


def _cards(values: object) -> tuple[Card, ...]:
    """Cards as they are, or from plain values."""
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise RequestError(
            f"cards is {values!r:.80}.", hint="It must be a list of cards.", field="cards"
        )
    return tuple(
        value if isinstance(value, Card) else Card.from_dict(_table(value, number), number)
        for number, value in enumerate(values, start=1)
    )


def _table(value: object, number: int) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise CardError(
            number, "at", f"{value!r:.60} is no card.", hint="Write a table with `at` and `prompt`."
        )
    return value


def check_seed(seed: int) -> int:
    """A seed in range. Raises RequestError."""
    if not 0 <= seed <= MAX_SEED:
        hint = "Use a whole number from 0 to 2^63 - 1."
        raise RequestError(f"The seed {seed} is out of range.", hint=hint, field="seed")
    return seed


def _checked(name: str, value: object) -> object:
    """The value as the field's own kind: numpy numbers become plain ones, a path becomes text."""
    try:
        if name in _WHOLE and not isinstance(value, bool):
            return operator.index(value)  # type: ignore[arg-type]
        if (
            name in _NUMBERS
            and isinstance(value, Real)
            and not isinstance(value, bool)
            and math.isfinite(value)
        ):
            return float(value)
    except TypeError:
        pass
    if name not in (*_WHOLE, *_NUMBERS):
        if isinstance(value, str):
            return value
        if name in ("image", "model") and isinstance(value, Path):
            return str(value)
    kind = "a whole number" if name in _WHOLE else "a finite number" if name in _NUMBERS else "text"
    raise RequestError(f"{name} is {value!r:.80}.", hint=f"It must be {kind}.", field=name)
