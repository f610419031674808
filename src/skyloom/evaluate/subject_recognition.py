"""Recognise the subject of a clip: a noun and, if it is clear, its colour.

A clip made by skyloom has its prompt in the receipt. Others are classified by the probe, which
knows the bundled model's nouns only; predictions below the thresholds are discarded. The thresholds
were measured with projects/diorama/bench/characters.py (table in docs/server.md).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import UInt8
from torch import Tensor

from skyloom.media.source import open_source
from skyloom.models.diorama.probe import NONE, Probe, choose_frames, load_probe, prepare
from skyloom.models.diorama.words import COLOUR_NAMES, THING_NAMES

MIN_NOUN_SCORE = 0.9
MIN_THING_SCORE = 0.5
MIN_COLOUR_SCORE = 0.9
_WORD = re.compile(r"[a-z][a-z-]*")
_MAX_WORDS = max(len(name.split()) for name in THING_NAMES)


@dataclass(frozen=True)
class SubjectMatch:
    """Subject of a clip; noun and colour are None if unknown.

    source: where they come from. scores: probe scores from 0 to 1.
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
    probe = load_probe()
    chosen = choose_frames(source.frames, probe.config.frames).tolist()
    return classify_subject(probe, torch.cat([source.read(index, index + 1) for index in chosen]))


@torch.no_grad()
def classify_subject(probe: Probe, frames: UInt8[Tensor, "t h w c"]) -> SubjectMatch:
    """Classify frames; both noun heads of the probe must agree above their thresholds."""
    assert probe.config.several, "the probe needs its multi-label head"
    output = probe(prepare(frames, probe.config))
    noun, noun_score = _best(output.scores["noun"][0].softmax(-1), probe.config.nouns)
    labels = probe.config.labels("colour")
    colour, colour_score = _best(output.scores["colour"][0].softmax(-1), labels)
    thing, thing_score = _best(output.things[0].sigmoid(), probe.config.nouns)
    scores = {
        f"noun {noun}": round(noun_score, 4),
        f"thing {thing}": round(thing_score, 4),
        f"colour {colour}": round(colour_score, 4),
    }
    if noun != thing or noun_score < MIN_NOUN_SCORE or thing_score < MIN_THING_SCORE:
        return SubjectMatch(scores=scores)
    known = colour != NONE and colour_score >= MIN_COLOUR_SCORE
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
    words = _WORD.findall(text.lower())
    for at in range(len(words)):
        name = _named_at(words, at)
        if name is None or (
            name in COLOUR_NAMES and any(_named_at(words, after) for after in (at + 1, at + 2))
        ):
            continue  # "orange" in "an orange cat" is the colour
        before = [word for word in words[max(0, at - 2) : at] if word in COLOUR_NAMES]
        return name, (before[-1] if before else None)
    return None


def _named_at(words: Sequence[str], at: int) -> str | None:
    """Return the longest name of a noun that starts at a word."""
    runs = (" ".join(words[at : at + length]) for length in range(_MAX_WORDS, 0, -1))
    return next((run for run in runs if run in THING_NAMES), None)


def _best(scores: Tensor, labels: tuple[str, ...]) -> tuple[str, float]:
    index = int(scores.argmax())
    return labels[index], float(scores[index])


def _tables(value: object) -> list[Mapping[str, Any]]:
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []
