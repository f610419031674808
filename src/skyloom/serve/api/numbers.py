"""Numbers that clients write as text: one grammar, read once, then checked against a range.

Plain decimal digits without sign of plus, leading zeros, spaces, underscores or digits of other scripts, so that what
is checked and what is used cannot differ.
"""

import re

from skyloom.serve.api.errors import invalid

_WHOLE = re.compile(r"0|[1-9][0-9]{0,17}", re.ASCII)
_NUMBER = re.compile(
    r"-?(?:0|[1-9][0-9]{0,17})(?:\.[0-9]{1,30})?(?:[eE][+-]?[0-9]{1,3})?", re.ASCII
)
_SHOWN = 40


def find_whole(text: str) -> int | None:
    """The whole number, 0 or more, that a text is; None for any other text."""
    return int(text) if _WHOLE.fullmatch(text) else None


def find_number(text: str) -> float | None:
    """The number that a text is, in the grammar of JSON; None for any other text."""
    return float(text) if _NUMBER.fullmatch(text) else None


def read_whole(param: str, text: str, least: int, most: int) -> int:
    """A parameter that must be a whole number from `least` to `most`. Raises ApiError (400)."""
    value = find_whole(text)
    if value is None or not least <= value <= most:
        shown = repr(text[:_SHOWN] + ("..." if len(text) > _SHOWN else ""))
        raise invalid(param, f"{param} must be a whole number from {least} to {most}, got {shown}.")
    return value


def plain_number(value: object) -> object:
    """Text as the number that it is, for a field that wants one; everything else as it is. Raises ValueError."""
    if not isinstance(value, str):
        return value
    number = find_number(value)
    if number is None:
        raise ValueError(f"expected a number like 8, got {value[:_SHOWN]!r}")
    whole = find_whole(value.removeprefix("-"))
    return number if whole is None else -whole if value.startswith("-") else whole
