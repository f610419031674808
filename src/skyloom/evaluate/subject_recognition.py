"""Who a clip shows, in the few words that a prompt can say of it: a noun, and its colour where that is plain.

A clip that skyloom made says so in its receipt; others are read by the probe, which knows the bundled model's things
only and would name one of them for anything. So it is believed only when it is sure, by bounds measured in
bench/characters.py (docs/server.md has the table).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import UInt8
from torch import Tensor

from skyloom.evaluate.probe import NONE, Probe, choose_frames, load_probe, prepare
from skyloom.media.source import open_source
from skyloom.world.nouns import NOUNS
from skyloom.world.style import COLOURS

SURE_NOUN, SURE_THING, SURE_COLOUR = 0.9, 0.5, 0.9
_WORD = re.compile(r"[a-z][a-z-]*")


@dataclass(frozen=True)
class Likeness:
    """What a clip shows, or None where nobody is sure, and its colour, where that is plain; whether the receipt or the
    probe says so; and what the probe has read: every score from 0 to 1."""

    noun: str | None = None
    colour: str | None = None
    source: Literal["receipt", "probe"] | None = None
    scores: Mapping[str, float] = field(default_factory=dict[str, float])


def recognise(path: Path) -> Likeness:
    """The likeness of a video. Raises MediaError for what is none."""
    source = open_source(path)
    said = said_in(source.receipt)
    if said is not None:
        return Likeness(*said, "receipt")
    probe = load_probe()
    chosen = choose_frames(source.frames, probe.config.frames).tolist()
    return read_likeness(probe, torch.cat([source.read(index, index + 1) for index in chosen]))


@torch.no_grad()
def read_likeness(probe: Probe, frames: UInt8[Tensor, "t h w c"]) -> Likeness:
    """What the probe reads, if both of its ways to look for things are sure of the same one."""
    assert probe.config.several, "the bundled probe looks for every thing by itself too"
    seen = probe(prepare(frames, probe.config))
    noun, share = _best(seen.scores["noun"][0].softmax(-1), probe.config.nouns)
    colour, painted = _best(seen.scores["colour"][0].softmax(-1), probe.config.labels("colour"))
    thing, there = _best(seen.things[0].sigmoid(), probe.config.nouns)
    scores = {f"noun {noun}": share, f"thing {thing}": there, f"colour {colour}": painted}
    told = {name: round(score, 4) for name, score in scores.items()}
    if noun != thing or share < SURE_NOUN or there < SURE_THING:
        return Likeness(scores=told)
    return Likeness(
        noun, colour if colour != NONE and painted >= SURE_COLOUR else None, "probe", told
    )


def said_in(receipt: Mapping[str, Any]) -> tuple[str, str | None] | None:
    """The first thing that a receipt's prompts name, and its colour; None where they name nothing that is known."""
    request = receipt.get("request")
    asked: Mapping[str, Any] = request if isinstance(request, Mapping) else {}
    cards = asked.get("cards")
    texts = [asked.get("prompt"), *(card.get("prompt") for card in _tables(cards))]
    found = (first_thing(text) for text in texts if isinstance(text, str))
    return next((one for one in found if one is not None), None)


def first_thing(text: str) -> tuple[str, str | None] | None:
    """The first noun of the world that a text names, and its colour if one is said: "a big red cat" -> cat, red."""
    words = _WORD.findall(text.lower())
    for at in range(len(words)):
        name = _named_at(words, at)
        if name is None or (
            name in COLOURS and any(_named_at(words, after) for after in (at + 1, at + 2))
        ):
            continue  # an orange cat is no orange
        before = [word for word in words[max(0, at - 2) : at] if word in COLOURS]
        return name, (before[-1] if before else None)
    return None


def _named_at(words: Sequence[str], at: int) -> str | None:
    """The longest name of a noun that begins at a word."""
    runs = (" ".join(words[at : at + length]) for length in range(_longest(), 0, -1))
    return next((run for run in runs if run in _names()), None)


def _best(scores: Tensor, labels: tuple[str, ...]) -> tuple[str, float]:
    index = int(scores.argmax())
    return labels[index], float(scores[index])


def _tables(value: object) -> list[Mapping[str, Any]]:
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []


@cache
def _names() -> frozenset[str]:
    return frozenset(name.lower() for noun in NOUNS.values() for name in noun.names)


@cache
def _longest() -> int:
    return max(len(name.split()) for name in _names())
