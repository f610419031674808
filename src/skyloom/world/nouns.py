"""The nouns that the world may show: their names, what kind of thing each is, and which way its art faces.

The table is `nouns.toml`: a table per kind, a row per noun. It lists only art that Microsoft released under
the MIT licence (NOTICE): no flags, no video games, no couples or families, no skin tones. `world/assets.py`
makes the atlas.
"""

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

Facing = Literal["left", "right", "none"]

KINDS = (
    "walker", "flyer", "swimmer", "car", "boat", "aircraft", "person", "runner", "ball", "food", "object",
    "building", "plant", "celestial",
)  # fmt: skip
_FACING_LEFT = frozenset({"walker", "flyer", "swimmer", "car", "boat", "runner"})
_PEOPLE = frozenset({"person", "runner"})
_SOUND_CONSONANT = ("uni", "one", "ufo", "eu", "use", "ewe")
_SOUND_VOWEL = ("a", "e", "i", "o", "u", "hour", "honest", "heir", "suv")


@dataclass(frozen=True)
class Noun:
    """One thing that can be shown.

    `emoji` is its code points in hex; `facing` is where the art looks (none: at us, or nowhere); `tilt` is
    how far it points above the horizon, in degrees; `animated` art is a loop; a `hero` is drawn more often; a
    `person` never gets a colour; what is not `whole` (heads, busts, fixed poses) never walks; a `mass` noun
    takes no article; a plural noun has a `measure` ("pair of").
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
        """Whether the name means more than one thing, as in "a pair of scissors"."""
        return self.measure is not None


def _read_nouns() -> dict[str, Noun]:
    table = tomllib.loads(files("skyloom.world").joinpath("nouns.toml").read_text(encoding="utf-8"))
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
    """A noun's name with its article: "an octopus", "a red car", "a pair of scissors", "popcorn"."""
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
