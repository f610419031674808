# pyright: basic
"""Storyboards: place cards on frames, and read storyboard files.

A card with `cut` starts a new shot with an empty cache. Without it, the shot continues with another
prompt.
"""

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from skyloom.core.errors import MediaError, RequestError
from skyloom.core.types import VideoShape
from skyloom.generate.cards import Card, CardError
from skyloom.generate.parsing import parse_clock
from skyloom.generate.request import Request
from skyloom.generate.source_prompts import with_style
from skyloom.generate.timeline import DEFAULT_FADE, Generate, Media, nearest_frame
from skyloom.media.read import read_image
from skyloom.media.source import open_source

MAX_CARDS = 500
MAX_BYTES = 2**20


def storyboard_spans(
    cards: Sequence[Card], style: str, shape: VideoShape, fps: int
) -> tuple[Generate, ...]:
    """The generated spans of a storyboard, one per card; also check the cards' media.

    `style` is appended to each prompt. Raises CardError.
    """
    if len(cards) > MAX_CARDS:
        message = f"cards must be at most {MAX_CARDS}, got {len(cards)}."
        raise CardError(MAX_CARDS + 1, "at", message)
    starts = [_first_frame(card, fps) for card in cards]
    for number, card in enumerate(cards, start=1):
        _check_position(number, cards, starts)
        if starts[number - 1] >= shape.frames:
            end = f"{float(Fraction(shape.frames - 1, fps)):g}"
            message = f"at must be <= {end} s, the end of the video, got {card.at}."
            raise CardError(number, "at", message, hint="Make the video longer.")
        _check_media(card, number, shape)
    ends = [*starts[1:], shape.frames]
    return tuple(
        Generate(
            end - start,
            with_style(card.prompt, style),
            continues=start > 0 and not card.cut,
            fade_frames=0 if start == 0 or card.cut else _fade_frames(card, fps),
            seed=card.seed,
            media=_media(card),
        )
        for card, start, end in zip(cards, starts, ends, strict=True)
    )


def _first_frame(card: Card, fps: int) -> int:
    at = parse_clock(card.at)
    assert at is not None, "a card is checked when it is created"
    return nearest_frame(at, Fraction(fps))


def _fade_frames(card: Card, fps: int) -> int:
    fade = DEFAULT_FADE if card.morph is None else parse_clock(card.morph)
    assert fade is not None, "a card is checked when it is created"
    return nearest_frame(fade, Fraction(fps))


def _media(card: Card) -> Media | None:
    path = card.image or card.video
    return None if path is None else Media(path, card.image is None, card.strength)


def _check_position(number: int, cards: Sequence[Card], starts: Sequence[int]) -> None:
    """Raise CardError unless the first card is at 0 and the others rise in time."""
    at = cards[number - 1].at
    if number == 1 and starts[0]:
        raise CardError(number, "at", f"at must be 0 for the first card, got {at}.")
    if number > 1 and starts[number - 1] <= starts[number - 2]:
        previous = f"card {number - 1} (at {cards[number - 2].at})"
        raise CardError(number, "at", f"at must be later than {previous}, got {at}.")


def _check_media(card: Card, number: int, shape: VideoShape) -> None:
    """Raise CardError for unreadable media, or a video of another size."""
    key = "image" if card.image else "video"
    try:
        if card.image:
            read_image(Path(card.image))
        if card.video:
            source = open_source(card.video)
            if (source.width, source.height) != (shape.width, shape.height):
                size = f"{source.width}x{source.height}"
                message = f"video must be {shape.size}, the storyboard's size, got {size}."
                raise CardError(number, key, message, hint=f"Convert {card.video} first.")
    except MediaError as error:
        raise CardError(number, key, error.message, hint=error.hint or "") from error


@dataclass(frozen=True)
class Storyboard:
    """A storyboard file: its request, and per card the line number of each field."""

    path: Path
    request: Request
    lines: tuple[Mapping[str, int], ...]

    def explain(self, error: CardError) -> RequestError:
        """The error with the file's line number."""
        return _with_line(self.path, self.lines, error)


def read_storyboard(path: Path, fields: Mapping[str, Any]) -> Storyboard:
    """Read a TOML or JSON file of cards, fields of a Request and a `style`.

    `fields` override those of the file. Media paths are relative to the file. Raises RequestError
    with the line number.
    """
    text = _read_text(path)
    values = _parse(path, text)
    cards = values.pop("card", values.pop("cards", None))
    if not isinstance(cards, list) or not cards:
        raise RequestError(
            f"{path} has no cards.", hint="Write a [[card]] with `at` and `prompt` for each."
        )
    lines = _find_lines(path, text, len(cards))
    style = values.pop("style", "")
    if not isinstance(style, str):
        raise RequestError(f"{path}: style must be text, got {style!r:.60}.")
    request = {
        "prompt": style,
        **values,
        **fields,
        "cards": [_resolve_media(card, path.parent) for card in cards],
    }
    try:
        return Storyboard(path, Request.from_dict(request), lines)
    except CardError as error:
        raise _with_line(path, lines, error) from error
    except RequestError as error:
        raise RequestError(f"{path}: {error.message}", hint=error.hint) from error


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        text = content.decode()
    except OSError as error:
        raise RequestError(
            f"{path} cannot be read ({error.strerror}).", hint="Check the path."
        ) from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} must be UTF-8 text in TOML or JSON.") from error
    if len(content) > MAX_BYTES:
        raise RequestError(f"{path} must be at most 1 MiB.", hint="Write fewer cards.")
    return text


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        values = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except (json.JSONDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise RequestError(
            f"{path} cannot be parsed ({error}).", hint="Correct that line."
        ) from error
    return {"cards": values} if isinstance(values, list) else dict(values)


def _resolve_media(card: object, folder: Path) -> object:
    """A card with media paths relative to the storyboard's folder."""
    if not isinstance(card, Mapping):
        return card
    media = {
        key: str(folder / card[key])
        for key in ("image", "video")
        if isinstance(card.get(key), str) and card[key]
    }
    return {**card, **media}


def _find_lines(path: Path, text: str, count: int) -> tuple[dict[str, int], ...]:
    """The line number of each key of each card; "" is the card's first line."""
    is_json = path.suffix.lower() == ".json"
    opening = r"\{" if is_json else r"^\s*\[\[\s*cards?\s*\]\]"
    key = r'"(\w+)"\s*:' if is_json else r'^\s*"?(\w+)"?\s*='
    numbered = list(enumerate(text.splitlines(), start=1))
    starts = [number for number, line in numbered for _ in re.findall(opening, line)][-count:]
    found: list[dict[str, int]] = []
    for index, start in enumerate(starts):
        end = starts[index + 1] if index + 1 < len(starts) else len(numbered) + 1
        rows = [
            (number, line) for number, line in numbered if start <= number < max(end, start + 1)
        ]
        lines = {"": start}
        for number, line in reversed(rows):
            for name in re.findall(key, line):
                lines[name] = number
        found.append(lines)
    return tuple(found)


def _with_line(path: Path, lines: Sequence[Mapping[str, int]], error: CardError) -> RequestError:
    """The error with the path and, if known, the line number."""
    card = lines[error.card - 1] if error.card <= len(lines) else {}
    line = card.get(error.key, card.get(""))
    where = f"{path}, line {line}" if line else f"{path}"
    return RequestError(f"{where}: {error.message}", hint=error.hint)
