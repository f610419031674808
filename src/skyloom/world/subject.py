"""Who is in a scene and what they do: nouns, what they can do where, and paths that keep them in the frame.

The noun is drawn first, then a place where it belongs, then something it can do there. One (noun, place)
or (noun, motion) pair in ten is held out of training, by a hash that never changes.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeVar

import numpy as np

from skyloom.core.errors import ConfigError
from skyloom.core.types import VideoShape
from skyloom.world.affordances import motions_for
from skyloom.world.camera import GROUND_LEVEL
from skyloom.world.motion import MOTIONS, Path
from skyloom.world.nouns import Noun
from skyloom.world.places import PLACES, Place
from skyloom.world.style import COLOURS
from skyloom.world.vocabulary import Vocabulary

Split = Literal["train", "heldout", "all"]
Item = TypeVar("Item")

SIZE_WORDS = {"giant": 1.35, "huge": 1.35, "tiny": 0.62, "little": 0.7}
ALOFT = frozenset({"fly", "arc", "hover", "circle"})
_TALL = frozenset(
    {"jump", "bounce", "bounce along", "hop", "rise", "fall", "sink", "leap", "take off", "arc"}
)
_SALT = "skyloom 233"  # chosen so that no noun is held out whole
_ALONE = frozenset(
    {"roll", "spin", "turn", "near", "away", "circle", "grow", "shrink", "bounce along"}
)
_SIGNS = {"left": -1, "right": 1}
_COLOUR_WORDS = frozenset(COLOURS) | {"gold", "silver", "brown", "polar", "gray", "rainbow", "fire"}


@dataclass(frozen=True)
class Subject:
    """One thing that the scene is about. `size` and `offset` are in half frame heights."""

    noun: str
    name: str
    kind: str
    motion: str
    verb: str
    direction: str | None
    facing: int  # -1: shown facing left, 1: right
    mirrored: bool
    tilt: float
    colour: str | None
    size_word: str | None
    path: Path
    offset: float
    phase: float
    submerged: bool  # what is below the water line is hidden


def is_held_out(noun: str, place_or_motion: str, share: float = 0.10) -> bool:
    """Whether training never sees this noun in this place, or doing this."""
    digest = hashlib.sha256(f"{_SALT}|{noun}|{place_or_motion}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32


def pick(
    chance: np.random.Generator, items: Sequence[Item], weights: Sequence[float] | None = None
) -> Item:
    """One item, uniformly or by weight."""
    if weights is None:
        return items[int(chance.integers(len(items)))]
    shares = np.cumsum(np.asarray(weights, dtype=np.float64))
    return items[int(np.searchsorted(shares, chance.random() * shares[-1], side="right"))]


@lru_cache(maxsize=4096)
def actions(
    noun: Noun, vocabulary: Vocabulary, split: Split = "all"
) -> tuple[tuple[str, str], ...]:
    """The (place, motion) pairs that a split of a vocabulary allows a noun."""
    found = []
    for place in vocabulary.places:
        for motion in motions_for(noun.key, noun.kind, PLACES[place].medium, noun.whole):
            if motion not in vocabulary.motions:
                continue
            held = is_held_out(noun.key, place) or is_held_out(noun.key, motion)
            if split == "all" or held == (split == "heldout"):
                found.append((place, motion))
    return tuple(found)


def choose_action(
    chance: np.random.Generator, vocabulary: Vocabulary, split: Split, nouns: Mapping[str, Noun]
) -> tuple[Noun, str, str]:
    """Draw a noun, then a place where it belongs, then something that it can do there."""
    keys = [key for key in vocabulary.nouns if key in nouns]
    weights = [vocabulary.heroes if nouns[key].hero else 1.0 for key in keys]
    for _ in range(1000 if keys else 0):
        noun = nouns[pick(chance, keys, weights)]
        allowed = actions(noun, vocabulary, split)
        if not allowed:
            continue
        places = list(dict.fromkeys(place for place, _ in allowed))
        place = pick(chance, places, [PLACES[name].popularity for name in places])
        here = [motion for name, motion in allowed if name == place]
        directed = [motion for motion in here if MOTIONS[motion].directed]
        others = [motion for motion in here if not MOTIONS[motion].directed]
        if directed and (not others or chance.random() < vocabulary.directed):
            return noun, place, pick(chance, directed)
        return noun, place, pick(chance, others)
    raise ConfigError(
        f"The vocabulary {vocabulary.name!r} has nothing to show in split {split!r}.",
        hint="Add nouns, places or motions.",
    )


@dataclass(frozen=True)
class Casting:
    """What is settled before the subjects are made."""

    vocabulary: Vocabulary
    split: Split
    nouns: Mapping[str, Noun]
    place: str
    motion: str
    shape: VideoShape
    closeness: float  # how much larger the camera shows the middle of the frame than at rest

    @property
    def aspect(self) -> float:
        """Half the frame width, in half frame heights."""
        return self.shape.width / self.shape.height

    @property
    def narrow(self) -> float:
        """The shorter side of the frame, in frame heights."""
        return min(1.0, self.aspect)


def make_subjects(
    chance: np.random.Generator, casting: Casting, noun: Noun
) -> tuple[tuple[Subject, ...], str | None]:
    """One subject, or two that do the same side by side and how they belong together."""
    directed = MOTIONS[casting.motion].directed
    direction = str(pick(chance, ("left", "right"))) if directed else None
    companion = None
    if chance.random() < casting.vocabulary.two_objects and casting.motion not in _ALONE:
        companions = _companions(casting, noun)
        companion = pick(chance, companions) if companions else None
    first = _make_subject(chance, casting, noun, direction, companion is not None)
    if companion is None:
        return (first,), None
    second = _make_subject(chance, casting, companion, direction, True, first)
    relation = pick(
        chance, ("followed by", "next to") if directed else ("next to", "beside", "and")
    )
    return (first, second), relation


def _companions(casting: Casting, noun: Noun) -> list[Noun]:
    keys = [key for key in casting.vocabulary.nouns if key in casting.nouns]
    action = (casting.place, casting.motion)
    return [
        other
        for other in (casting.nouns[key] for key in keys if key != noun.key)
        if other.kind == noun.kind and action in actions(other, casting.vocabulary, casting.split)
    ]


def _make_subject(
    chance: np.random.Generator,
    casting: Casting,
    noun: Noun,
    direction: str | None,
    paired: bool,
    first: Subject | None = None,
) -> Subject:
    motion = MOTIONS[casting.motion]
    size_word = None
    if not noun.person and not paired and chance.random() < casting.vocabulary.size_words:
        size_word = str(pick(chance, tuple(SIZE_WORDS)))
    sign = (
        _SIGNS[direction]
        if direction
        else (first.path.sign if first else int(pick(chance, (-1, 1))))
    )
    path, offset = _make_path(
        chance, casting, noun, sign, SIZE_WORDS.get(size_word or "", 1.0), paired, first
    )
    facing = _SIGNS[direction] if direction else int(pick(chance, (-1, 1)))
    if casting.motion == "circle":
        facing = -1
    art = _SIGNS.get(noun.facing, 0)
    verb = first.verb if first else pick(chance, motion.verbs_for(noun.kind))
    if first is None and motion.tail:
        verb += pick(chance, motion.tail)
    return Subject(
        noun=noun.key,
        name=pick(chance, noun.names),
        kind=noun.kind,
        motion=casting.motion,
        verb=verb,
        direction=direction,
        facing=facing,
        mirrored=art not in (0, facing),
        tilt=noun.tilt if art else 0.0,
        colour=_choose_colour(chance, casting.vocabulary, noun),
        size_word=size_word,
        path=path,
        offset=offset,
        phase=float(chance.random()),
        submerged=PLACES[casting.place].medium == "water" and casting.motion not in ALOFT,
    )


def _choose_colour(chance: np.random.Generator, vocabulary: Vocabulary, noun: Noun) -> str | None:
    """A colour for a thing that has none in its name; never for a person."""
    if noun.person or noun.kind not in vocabulary.coloured_kinds or not vocabulary.colours:
        return None
    if any(word in _COLOUR_WORDS for name in noun.names for word in name.split()):
        return None
    return pick(chance, vocabulary.colours) if chance.random() < vocabulary.coloured else None


def _make_path(
    chance: np.random.Generator,
    casting: Casting,
    noun: Noun,
    sign: int,
    factor: float,
    paired: bool,
    first: Subject | None,
) -> tuple[Path, float]:
    """How large the subject is, where it rests and how far it may go, so that it stays in the frame."""
    place, motion = PLACES[casting.place], casting.motion
    limit = (0.88 if motion in _TALL else 1.0) * (0.72 if paired else 1.0) / casting.closeness
    size = (
        2
        * float(chance.uniform(*casting.vocabulary.sizes))
        * factor
        * (1.2 if noun.kind == "building" else 1.0)
    )
    size = min(size * limit, 0.8 if paired else 1.3) * casting.narrow
    if first and abs(size - first.path.size) > 0.2 * first.path.size:
        size = first.path.size
    base = _base_height(chance, place, motion, size)
    if first:
        base = base if base == 0 else first.path.base
    buoyant = 0.0
    if place.medium == "water" and motion not in ALOFT and motion != "leap":
        buoyant = {"boat": 0.10, "swimmer": 0.35}.get(noun.kind, 0.16)
    gap = 0.55 * (first.path.size if first else size) if paired else 0.0
    offset = gap * sign if first is None else -gap * sign
    reach = max(0.36 * casting.aspect, casting.aspect / casting.closeness - 0.55 * size - gap)
    headroom = max(0.12, 0.95 - (GROUND_LEVEL + base + size))
    chances = first.path.chance if first else (float(chance.random()), float(chance.random()))
    return Path(size, reach, headroom, sign, base, chances, noun.animated, buoyant), offset


def _base_height(chance: np.random.Generator, place: Place, motion: str, size: float) -> float:
    """Height of the feet over the ground at rest, in half frame heights."""
    lift = (
        -GROUND_LEVEL - size / 2
    )  # what puts the middle of the subject in the middle of the frame
    wobble = float(chance.uniform(-1, 1))
    if place.medium in ("air", "deep", "space"):
        if motion in ("rise", "fall", "sink"):
            return -0.25 if place.medium == "deep" else -0.92 - GROUND_LEVEL
        return lift + 0.12 * wobble
    if motion in ALOFT:
        return max(0.1, lift + 0.17 + 0.08 * wobble)
    return 0.0
