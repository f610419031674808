"""The nouns that the world may show: names, kind, which way the art faces, and what may be said of them.

The table is `nouns.toml`: a table per kind, a row per noun. Only art that Microsoft released under MIT is listed
(docs/decisions/0005-art.md); `world/assets.py` turns the rows into an atlas.
"""

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

Facing = Literal["left", "right", "none"]

_VOWEL_SOUNDS = "aeiou"
_CONSONANT_STARTS = ("uni", "one", "ufo", "eu", "use")


@dataclass(frozen=True)
class Noun:
    """One thing: `whole` is False for heads and busts, which never walk; `tilt` is how far the art points up, in degrees."""

    key: str
    names: tuple[str, ...]
    kind: str
    emoji: str
    facing: Facing = "left"
    tilt: float = 0.0
    animated: bool = True
    hero: bool = False
    person: bool = False
    whole: bool = True
    mass: bool = False
    plural: bool = False


@cache
def read_nouns() -> dict[str, Noun]:
    """The table, by key, in its own order."""
    table = tomllib.loads(files("skyloom.world").joinpath("nouns.toml").read_text())
    nouns = {}
    for kind, rows in table.items():
        for key, row in rows.items():
            person = row.pop("person", kind in ("person", "runner"))
            names = (key, *row.pop("also", ()))
            nouns[key] = Noun(key=key, names=names, kind=kind, person=person, **row)
    return nouns


NOUNS = read_nouns()


def article(name: str, adjective: str | None = None) -> str:
    """A noun's name with its article: "an octopus", "a red car", "a pair of scissors", "popcorn"."""
    phrase = f"{adjective} {name}" if adjective else name
    noun = _by_name().get(name)
    if noun and noun.plural:
        return f"a pair of {phrase}" if noun.mass else phrase
    if noun and noun.mass:
        return phrase
    first = phrase.lower()
    vowel = first[0] in _VOWEL_SOUNDS and not first.startswith(_CONSONANT_STARTS)
    return f"{'an' if vowel else 'a'} {phrase}"


@cache
def _by_name() -> dict[str, Noun]:
    return {name: noun for noun in NOUNS.values() for name in noun.names}
