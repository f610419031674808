"""Parse numbers that clients send as text, by one grammar.

Plain decimal digits: no plus sign, leading zeros, spaces, underscores or digits of other scripts. A
text has one meaning only, so the value that is checked is the value that is used.
"""

import re

from skyloom.serve.api.errors import invalid

_WHOLE = re.compile(r"0|[1-9][0-9]{0,17}", re.ASCII)
_NUMBER = re.compile(
    r"-?(?:0|[1-9][0-9]{0,17})(?:\.[0-9]{1,30})?(?:[eE][+-]?[0-9]{1,3})?", re.ASCII
)
_MAX_SHOWN = 40  # characters of a wrong value in an error message


def find_whole(text: str) -> int | None:
    """Parse a whole number >= 0; None for any other text."""
    return int(text) if _WHOLE.fullmatch(text) else None


def find_number(text: str) -> float | None:
    """Parse a number in the grammar of JSON; None for any other text."""
    return float(text) if _NUMBER.fullmatch(text) else None


def read_whole(param: str, text: str, minimum: int, maximum: int) -> int:
    """Parse a whole number in [minimum, maximum]. Raises ApiError (400) naming `param`."""
    value = find_whole(text)
    if value is None or not minimum <= value <= maximum:
        got = repr(text[:_MAX_SHOWN] + ("..." if len(text) > _MAX_SHOWN else ""))
        message = f"{param} must be a whole number from {minimum} to {maximum}, got {got}."
        raise invalid(param, message)
    return value


def plain_number(value: object) -> object:
    """Convert text to int or float; return any other value unchanged. Raises ValueError."""
    if not isinstance(value, str):
        return value
    number = find_number(value)
    if number is None:
        raise ValueError(f"expected a number like 8, got {value[:_MAX_SHOWN]!r}")
    whole = find_whole(value.removeprefix("-"))
    if whole is None:
        return number
    return -whole if value.startswith("-") else whole
