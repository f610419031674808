"""Pictures at times of a video, as the cards of a storyboard that says one prompt throughout."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from skyloom.core.errors import RequestError
from skyloom.generate.cards import Card
from skyloom.generate.parsing import parse_clock

DEFAULT_SECONDS = 2.0


def picture_cards(
    image: Path, prompt: str, last: Path | None, keyframes: Sequence[str], seconds: float | None
) -> tuple[tuple[Card, ...], float]:
    """Cards with the pictures pinned at their times, the last one on the last frame; and how long the video is.

    Raises RequestError for a keyframe that is not written TIME=PICTURE.
    """
    long = DEFAULT_SECONDS if seconds is None else seconds
    pinned = {Fraction(0): image}
    for text in keyframes:
        time, _, path = text.partition("=")
        at = parse_clock(time)
        if at is None or not path:
            raise RequestError(
                f"{text!r:.80} is no keyframe.",
                hint="Write a time and a picture, like 1.5=middle.png.",
            )
        if at in pinned:
            raise RequestError(f"Two pictures at {time} s.", hint="Give each a time of its own.")
        pinned[at] = Path(path)
    if last is not None:
        end = Fraction(str(long))
        if end in pinned:
            raise RequestError(
                "The last picture stands where another does.", hint="Leave one of them out."
            )
        pinned[end] = last
    return tuple(
        Card(str(at), prompt, image=str(path), morph="0") for at, path in sorted(pinned.items())
    ), long
