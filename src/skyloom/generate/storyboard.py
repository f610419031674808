"""Storyboards: cards on exact frames, the windows they are made in, and the files they are written in.

With `cut` a new shot begins, with a memory of its own. Without, the shot goes on under another prompt; where a card
begins inside a latent frame, that one is made twice, once for each card, and each card shows its own frames of it.
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
from skyloom.media.read import read_image
from skyloom.media.source import open_source
from skyloom.models.registry import Rollout

MAX_CARDS = 500
MAX_BYTES = 2**20
MORPH = Fraction(1, 2)


@dataclass(frozen=True)
class PlacedCard:
    """A card on the frames of a video: it begins at `frame`, which is frame `offset` of shot `shot`; over its first
    `fade` frames its prompt comes in. `text` is its prompt with the style line."""

    card: Card
    frame: int
    shot: int
    offset: int
    fade: int
    text: str

    @property
    def pinned(self) -> str | None:
        """The picture or video that is pinned where it begins."""
        return self.card.image or self.card.video


def place_cards(
    cards: Sequence[Card], style: str, shape: VideoShape, fps: int
) -> tuple[PlacedCard, ...]:
    """Cards on exact frames, in order, with their media looked at. Raises CardError before any work."""
    if len(cards) > MAX_CARDS:
        raise CardError(
            MAX_CARDS + 1, "at", "a storyboard this long.", hint=f"Use {MAX_CARDS} cards at most."
        )
    placed: list[PlacedCard] = []
    for number, card in enumerate(cards, start=1):
        at, fade = parse_clock(card.at), MORPH if card.morph is None else parse_clock(card.morph)
        assert at is not None and fade is not None, "a card is checked when it is made"
        frame = _nearest(at * fps)
        if number == 1 and frame:
            raise CardError(
                1, "at", f"the first card begins at {card.at} s.", hint="Let it begin at 0."
            )
        if placed and frame <= placed[-1].frame:
            said = "before" if frame < placed[-1].frame else "with"
            raise CardError(
                number,
                "at",
                f"it begins {said} card {number - 1}.",
                hint="Cards go from early to late.",
            )
        if frame >= shape.frames:
            long = f"{float(Fraction(shape.frames - 1, fps)):g}"
            raise CardError(
                number,
                "at",
                f"it begins at {card.at} s, the video ends at {long} s.",
                hint="Make it longer.",
            )
        _check_media(card, number, shape)
        first = not placed
        shot = 0 if first else placed[-1].shot + card.cut
        offset = 0 if first or card.cut else frame - placed[-1].frame + placed[-1].offset
        frames = 0 if first or card.cut else _nearest(fade * fps)
        text = f"{card.prompt}, {style}" if style.strip() else card.prompt
        placed.append(PlacedCard(card, frame, shot, offset, frames, text))
    return tuple(placed)


def _check_media(card: Card, number: int, shape: VideoShape) -> None:
    """Raise CardError for media that is missing, no media, or a video of another size."""
    key = "image" if card.image else "video"
    try:
        if card.image:
            read_image(Path(card.image))
        if card.video:
            there = open_source(card.video)
            if (there.width, there.height) != (shape.width, shape.height):
                said = f"{card.video} is {there.width}x{there.height}, the storyboard {shape.size}."
                raise CardError(number, key, said, hint="Bring it to that size first.")
    except MediaError as error:
        raise CardError(number, key, error.message, hint=error.hint or "") from error


def card_windows(
    cards: Sequence[PlacedCard],
    frames: int,
    scale: ScaleFactors,
    native: int,
    rollout: Rollout | None,
) -> tuple[Window, ...]:
    """The windows of all shots; no window holds latent frames of two cards. Raises RequestError without a rollout."""
    windows: list[Window] = []
    for index, placed in enumerate(cards):
        following = cards[index + 1] if index + 1 < len(cards) else None
        goes_on = following is not None and following.shot == placed.shot
        until = placed.offset + (frames if following is None else following.frame) - placed.frame
        begin, end = _cell_of(placed.offset, scale), _cell_of(until - 1, scale) + 1
        kept = _cell_of(until, scale) if goes_on else end
        ahead = kept + 1 if goes_on and following is not None and following.pinned else end
        last = max(end, ahead)
        start = begin
        while start < last:
            full = start + (native if start == 0 else rollout.window if rollout else last - start)
            stop = full if start and not goes_on else min(full, last)
            if stop + 1 == last and ahead > end and stop - start > 1:
                stop -= 1  # what is pinned must be seen together with frames before it
            windows.append(
                Window(
                    len(windows),
                    start,
                    stop,
                    wanted=min(stop, end),
                    kept=min(stop, kept),
                    shown=(placed.offset, until),
                    shot=placed.shot,
                    card=index,
                    fade=_fade(placed, start, stop, scale),
                )
            )
            start = stop
    if rollout is None and any(one.shot == two.shot for one, two in pairwise(windows)):
        raise RequestError(
            "This model makes one window a shot.", hint="Let every card be a cut, and short."
        )
    return tuple(windows)


def _fade(placed: PlacedCard, start: int, stop: int, scale: ScaleFactors) -> tuple[float, ...]:
    """How much the card before still says in each latent frame: from 1 to 0 over the card's fade."""
    if not placed.fade:
        return ()
    middles = [
        (first_frame(cell, scale) + first_frame(cell + 1, scale) - 1) / 2
        for cell in range(start, stop)
    ]
    shares = [
        min(1.0, max(0.0, 1 - (middle - placed.offset + 0.5) / placed.fade)) for middle in middles
    ]
    return tuple(shares) if any(shares) else ()


def first_frame(cell: int, scale: ScaleFactors) -> int:
    """The first frame that a latent frame decodes to."""
    return 0 if cell == 0 else scale.video_frames(cell)


def _cell_of(frame: int, scale: ScaleFactors) -> int:
    """The latent frame that a frame lies in."""
    return -(-frame // scale.time)


def _nearest(frames: Fraction) -> int:
    """The nearest whole number; halves go up."""
    return (2 * frames.numerator + frames.denominator) // (2 * frames.denominator)


@dataclass(frozen=True)
class Storyboard:
    """A file of cards, read: what is asked, and on which line of it each card's fields stand."""

    path: Path
    request: Request
    lines: tuple[Mapping[str, int], ...]

    def explain(self, error: CardError) -> RequestError:
        """The error with the line of the file that is wrong."""
        return _at_line(self.path, self.lines, error)


def read_storyboard(path: Path, fields: Mapping[str, Any]) -> Storyboard:
    """A TOML or JSON file of cards, with a request's fields and `style` before them; `fields` come on top of its own.

    Media are looked for beside the file. Raises RequestError with the line that is wrong.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        text = content.decode()
    except OSError as error:
        raise RequestError(
            f"{path} cannot be read ({error.strerror}).", hint="Check the path."
        ) from error
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{path} is no text.", hint="Write a storyboard as TOML or JSON."
        ) from error
    if len(content) > MAX_BYTES:
        raise RequestError(f"{path} is larger than a mebibyte.", hint="Write fewer cards.")
    values = _parsed(path, text)
    cards = values.pop("card", values.pop("cards", None))
    if not isinstance(cards, list) or not cards:
        raise RequestError(
            f"{path} has no cards.", hint="Write a [[card]] with `at` and `prompt` for each."
        )
    lines = _lines(path, text, len(cards))
    style = values.pop("style", "")
    if not isinstance(style, str):
        raise RequestError(f"{path}: style is {style!r:.60}.", hint="It must be text.")
    try:
        asked = {
            "prompt": style,
            **values,
            **fields,
            "cards": [_beside(card, path.parent) for card in cards],
        }
        return Storyboard(path, Request.from_dict(asked), lines)
    except CardError as error:
        raise _at_line(path, lines, error) from error
    except RequestError as error:
        raise RequestError(f"{path}: {error.message}", hint=error.hint) from error


def _parsed(path: Path, text: str) -> dict[str, Any]:
    try:
        values = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except (json.JSONDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise RequestError(f"{path} cannot be read ({error}).", hint="Mend that line.") from error
    return {"cards": values} if isinstance(values, list) else dict(values)


def _beside(card: object, folder: Path) -> object:
    """A card with its media found from the storyboard's folder."""
    if not isinstance(card, Mapping):
        return card
    media = {
        key: card[key] for key in ("image", "video") if isinstance(card.get(key), str) and card[key]
    }
    return {**card, **{key: str(folder / name) for key, name in media.items()}}


def _lines(path: Path, text: str, count: int) -> tuple[dict[str, int], ...]:
    """Which line each key of each card stands on; "" is where the card begins."""
    opening = r"\{" if path.suffix.lower() == ".json" else r"^\s*\[\[\s*cards?\s*\]\]"
    key = r'"(\w+)"\s*:' if path.suffix.lower() == ".json" else r'^\s*"?(\w+)"?\s*='
    numbered = list(enumerate(text.splitlines(), start=1))
    starts = [number for number, line in numbered for _ in re.findall(opening, line)][-count:]
    found: list[dict[str, int]] = []
    for index, start in enumerate(starts):
        end = starts[index + 1] if index + 1 < len(starts) else len(numbered) + 1
        rows = [
            (number, line) for number, line in numbered if start <= number < max(end, start + 1)
        ]
        found.append(
            {"": start}
            | {name: number for number, line in reversed(rows) for name in re.findall(key, line)}
        )
    return tuple(found)


def _at_line(path: Path, lines: Sequence[Mapping[str, int]], error: CardError) -> RequestError:
    here = lines[error.card - 1] if error.card <= len(lines) else {}
    line = here.get(error.key, here.get(""))
    where = f"{path}, line {line}" if line else f"{path}"
    return RequestError(f"{where}: {error.message}", hint=error.hint)
