"""Table of the nouns that scenes can show: names, kind, and orientation of the art.

The data is in `nouns.toml`: a table per kind, a row per noun. It lists only art that Microsoft
released under the MIT licence (NOTICE), without flags, video games, couples, families and skin
tones. `world/assets.py` builds the atlas.
"""

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

Facing = Literal["left", "right", "none"]

KINDS = (
    "walker", "flyer", "swimmer", "car", "boat", "aircraft", "person", "runner", "ball", "food",
    "object", "building", "plant", "celestial",
)  # fmt: skip
_FACING_LEFT = frozenset({"walker", "flyer", "swimmer", "car", "boat", "runner"})
_PEOPLE = frozenset({"person", "runner"})
_SOUND_CONSONANT = ("uni", "one", "ufo", "eu", "use", "ewe")
_SOUND_VOWEL = ("a", "e", "i", "o", "u", "hour", "honest", "heir", "suv")


@dataclass(frozen=True)
class Noun:
    """A noun with its art.

    emoji: code points in hex.
    facing: direction of the art; none if it faces the viewer or is symmetric.
    tilt: angle of the art above the horizon, in degrees.
    animated: the art is a loop.
    hero: sampled more often.
    person: never gets a colour.
    whole: false for heads, busts and fixed poses, which never walk.
    mass: takes no article.
    measure: words before a plural noun ("pair of").
    """

    key: str
    names: tuple[str, ...]
    kind: str
    emoji: str
    facing: Facing = "left"
    tilt: float = 0.0
    animated: bool = False
    hero: bool = False
    person: bool = False
    whole: bool = True
    mass: bool = False
    measure: str | None = None

    @property
    def plural(self) -> bool:
        """Whether the name is a plural, as in "a pair of scissors"."""
        return self.measure is not None


def _read_nouns() -> dict[str, Noun]:
    table = tomllib.loads(files("diorama.world").joinpath("nouns.toml").read_text(encoding="utf-8"))
    nouns = {}
    for kind, rows in table.items():
        for key, row in rows.items():
            names = (*row.pop("names", (key,)), *row.pop("also", ()))
            facing = row.pop("facing", "left" if kind in _FACING_LEFT else "none")
            person = row.pop("person", kind in _PEOPLE)
            nouns[key] = Noun(key=key, names=names, kind=kind, facing=facing, person=person, **row)
    return nouns


NOUNS = _read_nouns()


def article(name: str, adjective: str | None = None) -> str:
    """Prepend the article: "an octopus", "a red car", "a pair of scissors", "popcorn"."""
    phrase = f"{adjective} {name}" if adjective else name
    noun = _by_name().get(name)
    if noun and noun.mass:
        return phrase
    if noun and noun.measure:
        phrase = f"{noun.measure} {phrase}"
    vowel = phrase.startswith(_SOUND_VOWEL) and not phrase.startswith(_SOUND_CONSONANT)
    return f"{'an' if vowel else 'a'} {phrase}"


@cache
def _by_name() -> dict[str, Noun]:
    return {name: noun for noun in NOUNS.values() for name in noun.names}
