"""Pictures at times as the cards of a storyboard with a single prompt."""

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
    """Cards for a first picture, keyframes written TIME=PICTURE and a `last` picture.

    Returns the cards and the length in seconds. Raises RequestError.
    """
    length = DEFAULT_SECONDS if seconds is None else seconds
    pictures = {Fraction(0): image}
    for text in keyframes:
        time, _, path = text.partition("=")
        at = parse_clock(time)
        if at is None or not path:
            raise RequestError(
                f"keyframe must be TIME=PICTURE, got {text!r:.80}.",
                hint="Write it like 1.5=middle.png.",
            )
        if at in pictures:
            raise RequestError(f"keyframe times must differ, got {time} s twice.")
        pictures[at] = Path(path)
    if last is not None:
        end = Fraction(str(length))
        if end in pictures:
            raise RequestError(
                f"The last picture and a keyframe are both at {length:g} s.",
                hint="Leave one of them out.",
            )
        pictures[end] = last
    cards = tuple(
        Card(str(at), prompt, image=str(path), morph="0") for at, path in sorted(pictures.items())
    )
    return cards, length
