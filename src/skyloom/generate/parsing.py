"""Parse times and sizes that users write."""

import re
from fractions import Fraction

from skyloom.core.errors import RequestError

TIME_HINT = 'Write seconds like 2.5, "1:02.5" or "13/16".'

_TIME = re.compile(
    r"(?:(?P<hours>\d{1,2}):)?(?:(?P<minutes>\d{1,2}):)?(?P<seconds>\d+(?:\.\d+)?|\d+/\d+)"
)
_SIZE = re.compile(r"(\d{1,5})\s*[xX\u00d7]\s*(\d{1,5})")


def parse_clock(text: str) -> Fraction | None:
    """Parse "2.5", "1:02.5", "1:00:00" or "13/16" into seconds; None if the text is invalid."""
    found = _TIME.fullmatch(text.strip())
    if found is None:
        return None
    hours = found["hours"]
    minutes = found["minutes"]
    if hours is not None and minutes is None:  # one colon: the first number counts minutes
        hours, minutes = minutes, hours
    try:
        return Fraction(found["seconds"]) + 60 * int(minutes or 0) + 3600 * int(hours or 0)
    except ZeroDivisionError:
        return None


def parse_size(text: str) -> tuple[int, int]:
    """Parse "128x96" into width and height in pixels. Raises RequestError."""
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise RequestError(
            f"size must be WIDTHxHEIGHT, got {text!r:.40}.",
            hint="Write it like 128x128.",
            field="size",
        )
    return int(found[1]), int(found[2])
