# pyright: basic
"""Storyboards: place cards on frames, divide them into windows, and read storyboard files.

A card with `cut` starts a new shot with an empty cache. Without it, the shot continues with another
prompt. If a card begins inside a latent frame, that latent frame is sampled once per card, and each
card shows its own video frames of it.
"""

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

from skyloom.core.errors import MediaError, RequestError
from skyloom.core.types import ScaleFactors, VideoShape
from skyloom.generate.cards import Card, CardError
from skyloom.generate.parsing import parse_clock
from skyloom.generate.request import Request
from skyloom.generate.rollout import Window
from skyloom.generate.timeline import nearest_frame
from skyloom.media.read import read_image
from skyloom.media.source import open_source
from skyloom.models.registry import Rollout

MAX_CARDS = 500
MAX_BYTES = 2**20
DEFAULT_FADE = Fraction(1, 2)  # seconds


@dataclass(frozen=True)
class PlacedCard:
    """A card on the frames of a video.

    It begins at `frame`, which is frame `offset` of shot `shot`. Its prompt is crossfaded over
    `fade_frames` frames. `text` is the prompt with the storyboard's style.
    """

    card: Card
    frame: int
    shot: int
    offset: int
    fade_frames: int
    text: str

    @property
    def media(self) -> str | None:
        """Path of the card's image or video."""
        return self.card.image or self.card.video


def place_cards(
    cards: Sequence[Card], style: str, shape: VideoShape, fps: int
) -> tuple[PlacedCard, ...]:
    """Place cards on frames and check their media. Raises CardError."""
    if len(cards) > MAX_CARDS:
        message = f"cards must be at most {MAX_CARDS}, got {len(cards)}."
        raise CardError(MAX_CARDS + 1, "at", message)
    placed: list[PlacedCard] = []
    for number, card in enumerate(cards, start=1):
        at = parse_clock(card.at)
        fade = DEFAULT_FADE if card.morph is None else parse_clock(card.morph)
        assert at is not None and fade is not None, "a card is checked when it is created"
        frame = nearest_frame(at, Fraction(fps))
        _check_position(number, card, frame, placed)
        if frame >= shape.frames:
            end = f"{float(Fraction(shape.frames - 1, fps)):g}"
            message = f"at must be <= {end} s, the end of the video, got {card.at}."
            raise CardError(number, "at", message, hint="Make the video longer.")
        _check_media(card, number, shape)
        text = f"{card.prompt}, {style}" if style.strip() else card.prompt
        if not placed:
            placed.append(PlacedCard(card, frame, shot=0, offset=0, fade_frames=0, text=text))
            continue
        last = placed[-1]
        placed.append(
            PlacedCard(
                card,
                frame,
                shot=last.shot + card.cut,
                offset=0 if card.cut else frame - last.frame + last.offset,
                fade_frames=0 if card.cut else nearest_frame(fade, Fraction(fps)),
                text=text,
            )
        )
    return tuple(placed)


def _check_position(number: int, card: Card, frame: int, placed: Sequence[PlacedCard]) -> None:
    """Raise CardError unless the first card is at 0 and the others rise in time."""
    if not placed and frame:
        raise CardError(number, "at", f"at must be 0 for the first card, got {card.at}.")
    if placed and frame <= placed[-1].frame:
        previous = f"card {number - 1} (at {placed[-1].card.at})"
        raise CardError(number, "at", f"at must be later than {previous}, got {card.at}.")


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


def card_windows(
    cards: Sequence[PlacedCard],
    frames: int,
    scale: ScaleFactors,
    native: int,
    rollout: Rollout | None,
) -> tuple[Window, ...]:
    """Divide all shots into windows; a window belongs to one card.

    Raises RequestError if a shot needs several windows and the model has no rollout.
    """
    windows: list[Window] = []
    for index, placed in enumerate(cards):
        following = cards[index + 1] if index + 1 < len(cards) else None
        continues = following is not None and following.shot == placed.shot
        until = placed.offset + (frames if following is None else following.frame) - placed.frame
        end = _latent_frame_of(until - 1, scale) + 1
        cache_end = _latent_frame_of(until, scale) if continues else end
        # media of the following card is sampled together with the frames before it
        sees_media = continues and following is not None and following.media
        ahead = cache_end + 1 if sees_media else end
        last = max(end, ahead)
        start = _latent_frame_of(placed.offset, scale)
        while start < last:
            full = start + (native if start == 0 else rollout.window if rollout else last - start)
            stop = full if start and not continues else min(full, last)
            if stop + 1 == last and ahead > end and stop - start > 1:
                stop -= 1
            windows.append(
                Window(
                    len(windows),
                    start,
                    stop,
                    decode_until=min(stop, end),
                    cache_until=min(stop, cache_end),
                    display_range=(placed.offset, until),
                    shot=placed.shot,
                    card=index,
                    prompt_fade=_prompt_fade(placed, start, stop, scale),
                )
            )
            start = stop
    if rollout is None and any(one.shot == two.shot for one, two in pairwise(windows)):
        raise RequestError(
            "This model generates one window per shot.",
            hint="Make every card a cut, and shorten the cards.",
        )
    return tuple(windows)


def _prompt_fade(
    placed: PlacedCard, start: int, stop: int, scale: ScaleFactors
) -> tuple[float, ...]:
    """Weight of the previous card's prompt per latent frame: 1 to 0 over the card's fade."""
    if not placed.fade_frames:
        return ()
    middles = [
        (first_frame(cell, scale) + first_frame(cell + 1, scale) - 1) / 2
        for cell in range(start, stop)
    ]
    weights = [
        min(1.0, max(0.0, 1 - (middle - placed.offset + 0.5) / placed.fade_frames))
        for middle in middles
    ]
    return tuple(weights) if any(weights) else ()


def first_frame(cell: int, scale: ScaleFactors) -> int:
    """The first video frame of a latent frame."""
    return 0 if cell == 0 else scale.video_frames(cell)


def _latent_frame_of(frame: int, scale: ScaleFactors) -> int:
    """The latent frame that holds a video frame."""
    return -(-frame // scale.time)


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
