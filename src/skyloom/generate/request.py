"""Request: every way of asking, as one frozen, JSON-able description of work.

Command line, Python and receipts are serialisations of it, so any video can be made again.
"""

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from skyloom.core.errors import RequestError
from skyloom.core.seeds import MAX_SEED

_SIZE = re.compile(r"(\d{1,5})\s*[xX\u00d7]\s*(\d{1,5})")


@dataclass(frozen=True)
class Request:
    """What to make. None means: the model's own default (for the seed: drawn at random, and then reported)."""

    prompt: str
    model: str = "diorama"
    seconds: float | None = None
    size: str | None = None
    fps: float | None = None
    seed: int | None = None
    num_steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str = ""
    image: str | None = None

    def with_seed(self) -> Self:
        """The same request with a seed."""
        return self if self.seed is not None else replace(self, seed=secrets.randbelow(2**31))

    def to_dict(self) -> dict[str, Any]:
        """Plain values; what is None is left out."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(self.to_dict(), ensure_ascii=False)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`. Raises RequestError for an unknown field."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise RequestError(f"A request has no field {unknown[0]!r}.", hint=f"Fields: {', '.join(sorted(known))}.")
        return cls(**values)


def parse_size(text: str) -> tuple[int, int]:
    """Width and height from "128x96". Raises RequestError."""
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise RequestError(f"{text!r} is not a size.", hint="Write width x height, like 128x128.")
    return int(found[1]), int(found[2])


def check_seed(seed: int) -> int:
    """A seed in range. Raises RequestError."""
    if not 0 <= seed <= MAX_SEED:
        raise RequestError(f"The seed {seed} is out of range.", hint="Use a whole number from 0 to 2^63 - 1.")
    return seed
