"""Recognise the subject of a clip: a noun and, if it is clear, its colour.

A clip made by skyloom has its prompt in the receipt. Others are classified by the bundled model's
clip reader, which knows that model's nouns only; predictions below the thresholds are discarded.
The thresholds were measured with projects/diorama/bench/characters.py (table in docs/server.md).
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import UInt8
from torch import Tensor

from skyloom.media.source import open_source
from skyloom.models.base import ClipReader, load_clip_reader
from skyloom.models.registry import DEFAULT_MODEL, find_model

MIN_NOUN_SCORE = 0.9
MIN_THING_SCORE = 0.5
MIN_COLOUR_SCORE = 0.9
_WORD = re.compile(r"[a-z][a-z-]*")
_NO_COLOUR = "none"


@dataclass(frozen=True)
class SubjectMatch:
    """Subject of a clip; noun and colour are None if unknown.

    source: where they come from. scores: of the clip reader, from 0 to 1.
    """

    noun: str | None = None
    colour: str | None = None
    source: Literal["receipt", "probe"] | None = None
    scores: Mapping[str, float] = field(default_factory=dict[str, float])


def recognize_subject(path: Path) -> SubjectMatch:
    """Recognise the subject of a video file. Raises MediaError for an unreadable file."""
    source = open_source(path)
    named = subject_in_receipt(source.receipt)
    if named is not None:
        return SubjectMatch(*named, "receipt")
    reader = load_clip_reader()
    chosen = reader.choose_frames(source.frames)
    return classify_subject(reader, torch.cat([source.read(index, index + 1) for index in chosen]))


def classify_subject(reader: ClipReader, frames: UInt8[Tensor, "t h w c"]) -> SubjectMatch:
    """Classify frames; the categories "noun" and "things" must agree above their thresholds."""
    read = reader.scores(frames)
    noun, noun_score = _best(read["noun"], reader.labels("noun"))
    colour, colour_score = _best(read["colour"], reader.labels("colour"))
    thing, thing_score = _best(read["things"], reader.labels("things"))
    scores = {
        f"noun {noun}": round(noun_score, 4),
        f"thing {thing}": round(thing_score, 4),
        f"colour {colour}": round(colour_score, 4),
    }
    if noun != thing or noun_score < MIN_NOUN_SCORE or thing_score < MIN_THING_SCORE:
        return SubjectMatch(scores=scores)
    known = colour != _NO_COLOUR and colour_score >= MIN_COLOUR_SCORE
    return SubjectMatch(noun, colour if known else None, "probe", scores)


def subject_in_receipt(receipt: Mapping[str, Any]) -> tuple[str, str | None] | None:
    """Return the first noun in a receipt's prompts and its colour; None if there is none."""
    request = receipt.get("request")
    fields: Mapping[str, Any] = request if isinstance(request, Mapping) else {}
    cards = fields.get("cards")
    texts = [fields.get("prompt"), *(card.get("prompt") for card in _tables(cards))]
    found = (first_subject(text) for text in texts if isinstance(text, str))
    return next((one for one in found if one is not None), None)


def first_subject(text: str) -> tuple[str, str | None] | None:
    """Return the first known noun in a text and its colour: "a big red cat" -> cat, red."""
    known = find_model(DEFAULT_MODEL).record.knows
    colours = known["colours"]
    things = frozenset(known["things"])
    longest = max(len(name.split()) for name in things)
    words = _WORD.findall(text.lower())
    named = [_named_at(words[at : at + longest], things) for at in range(len(words))]
    for at, name in enumerate(named):
        if name is None or (name in colours and any(named[at + 1 : at + 3])):
            continue  # "orange" in "an orange cat" is the colour
        before = [word for word in words[max(0, at - 2) : at] if word in colours]
        return name, (before[-1] if before else None)
    return None


def _named_at(words: Sequence[str], names: Collection[str]) -> str | None:
    """Return the longest name that some words begin with."""
    runs = (" ".join(words[:length]) for length in range(len(words), 0, -1))
    return next((run for run in runs if run in names), None)


def _best(scores: Tensor, labels: tuple[str, ...]) -> tuple[str, float]:
    index = int(scores.argmax())
    return labels[index], float(scores[index])


def _tables(value: object) -> list[Mapping[str, Any]]:
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []
