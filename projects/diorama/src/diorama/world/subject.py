"""Sampling of a scene's subjects: noun, place, motion, and a path that stays in the frame.

The noun is sampled first, then a place, then a motion possible there. A fixed hash holds out one in
ten (noun, place) and (noun, motion) pairs from training.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeVar

import numpy as np

from diorama.world.affordances import motions_for
from diorama.world.camera import GROUND_LEVEL
from diorama.world.motion import MOTIONS, Path
from diorama.world.nouns import Noun
from diorama.world.places import PLACES, Place
from diorama.world.style import COLOURS
from diorama.world.vocabulary import Vocabulary
from skyloom.core.errors import ConfigError
from skyloom.core.types import VideoShape

Split = Literal["train", "heldout", "all"]
Item = TypeVar("Item")

SIZE_WORDS = {"giant": 1.35, "huge": 1.35, "tiny": 0.62, "little": 0.7}
ALOFT = frozenset({"fly", "arc", "hover", "circle"})
_VERTICAL_MOTIONS = frozenset(
    {"jump", "bounce", "bounce along", "hop", "rise", "fall", "sink", "leap", "take off", "arc"}
)
_SALT = "skyloom 233"  # chosen so that every noun keeps some pairs for training
_SINGLE_MOTIONS = frozenset(
    {"roll", "spin", "turn", "near", "away", "circle", "grow", "shrink", "bounce along"}
)
_SIGNS = {"left": -1, "right": 1}
_COLOUR_WORDS = frozenset(COLOURS) | {"gold", "silver", "brown", "polar", "gray", "rainbow", "fire"}


@dataclass(frozen=True)
class Subject:
    """One subject of a scene. `offset` is in half frame heights."""

    noun: str
    name: str
    kind: str
    motion: str
    verb: str
    direction: str | None
    facing: int  # -1: left, 1: right
    mirrored: bool
    tilt: float
    colour: str | None
    size_word: str | None
    path: Path
    offset: float
    phase: float
    submerged: bool  # the part below the water line is hidden


def is_held_out(noun: str, place_or_motion: str, share: float = 0.10) -> bool:
    """Whether a (noun, place) or (noun, motion) pair is held out of training."""
    digest = hashlib.sha256(f"{_SALT}|{noun}|{place_or_motion}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32


def pick(
    rng: np.random.Generator, items: Sequence[Item], weights: Sequence[float] | None = None
) -> Item:
    """Sample an item, uniformly or by weight."""
    if weights is None:
        return items[int(rng.integers(len(items)))]
    shares = np.cumsum(np.asarray(weights, dtype=np.float64))
    return items[int(np.searchsorted(shares, rng.random() * shares[-1], side="right"))]


@lru_cache(maxsize=4096)
def actions(
    noun: Noun, vocabulary: Vocabulary, split: Split = "all"
) -> tuple[tuple[str, str], ...]:
    """List the (place, motion) pairs of a noun in a vocabulary and split."""
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
    rng: np.random.Generator, vocabulary: Vocabulary, split: Split, nouns: Mapping[str, Noun]
) -> tuple[Noun, str, str]:
    """Sample a noun, a place and a motion. Raises ConfigError if the split has none."""
    keys = [key for key in vocabulary.nouns if key in nouns]
    weights = [vocabulary.heroes if nouns[key].hero else 1.0 for key in keys]
    for _ in range(1000 if keys else 0):
        noun = nouns[pick(rng, keys, weights)]
        allowed = actions(noun, vocabulary, split)
        if not allowed:
            continue
        places = list(dict.fromkeys(place for place, _ in allowed))
        place = pick(rng, places, [PLACES[name].popularity for name in places])
        here = [motion for name, motion in allowed if name == place]
        directed = [motion for motion in here if MOTIONS[motion].directed]
        others = [motion for motion in here if not MOTIONS[motion].directed]
        if directed and (not others or rng.random() < vocabulary.directed):
            return noun, place, pick(rng, directed)
        return noun, place, pick(rng, others)
    raise ConfigError(
        f"The vocabulary {vocabulary.name!r} has no possible action in the split {split!r}.",
        hint="Add nouns, places or motions to the vocabulary.",
    )


@dataclass(frozen=True)
class SubjectContext:
    """Choices of a scene that its subjects depend on."""

    vocabulary: Vocabulary
    split: Split
    nouns: Mapping[str, Noun]
    place: str
    motion: str
    shape: VideoShape
    closeness: float  # largest magnification by the camera

    @property
    def aspect(self) -> float:
        """Frame width / frame height."""
        return self.shape.width / self.shape.height

    @property
    def narrow(self) -> float:
        """Shorter side of the frame / frame height."""
        return min(1.0, self.aspect)


def make_subjects(
    rng: np.random.Generator, context: SubjectContext, noun: Noun
) -> tuple[tuple[Subject, ...], str | None]:
    """Sample one subject, or two with the same motion and the relation between them."""
    directed = MOTIONS[context.motion].directed
    direction = str(pick(rng, ("left", "right"))) if directed else None
    companion = None
    if rng.random() < context.vocabulary.two_objects and context.motion not in _SINGLE_MOTIONS:
        companions = _companions(context, noun)
        companion = pick(rng, companions) if companions else None
    first = _make_subject(rng, context, noun, direction, companion is not None)
    if companion is None:
        return (first,), None
    second = _make_subject(rng, context, companion, direction, True, first)
    relation = pick(rng, ("followed by", "next to") if directed else ("next to", "beside", "and"))
    return (first, second), relation


def _companions(context: SubjectContext, noun: Noun) -> list[Noun]:
    keys = [key for key in context.vocabulary.nouns if key in context.nouns]
    action = (context.place, context.motion)
    return [
        other
        for other in (context.nouns[key] for key in keys if key != noun.key)
        if other.kind == noun.kind and action in actions(other, context.vocabulary, context.split)
    ]


def _make_subject(
    rng: np.random.Generator,
    context: SubjectContext,
    noun: Noun,
    direction: str | None,
    paired: bool,
    first: Subject | None = None,
) -> Subject:
    motion = MOTIONS[context.motion]
    size_word = None
    if not noun.person and not paired and rng.random() < context.vocabulary.size_words:
        size_word = str(pick(rng, tuple(SIZE_WORDS)))
    sign = (
        _SIGNS[direction] if direction else (first.path.sign if first else int(pick(rng, (-1, 1))))
    )
    path, offset = _make_path(
        rng, context, noun, sign, SIZE_WORDS.get(size_word or "", 1.0), paired, first
    )
    facing = _SIGNS[direction] if direction else int(pick(rng, (-1, 1)))
    if context.motion == "circle":
        facing = -1
    art = _SIGNS.get(noun.facing, 0)
    verb = first.verb if first else pick(rng, motion.verbs_for(noun.kind))
    if first is None and motion.tail:
        verb += pick(rng, motion.tail)
    return Subject(
        noun=noun.key,
        name=pick(rng, noun.names),
        kind=noun.kind,
        motion=context.motion,
        verb=verb,
        direction=direction,
        facing=facing,
        mirrored=art not in (0, facing),
        tilt=noun.tilt if art else 0.0,
        colour=_choose_colour(rng, context.vocabulary, noun),
        size_word=size_word,
        path=path,
        offset=offset,
        phase=float(rng.random()),
        submerged=PLACES[context.place].medium == "water" and context.motion not in ALOFT,
    )


def _choose_colour(rng: np.random.Generator, vocabulary: Vocabulary, noun: Noun) -> str | None:
    """Sample a colour; None for persons and for nouns with a colour in their name."""
    if noun.person or noun.kind not in vocabulary.coloured_kinds or not vocabulary.colours:
        return None
    if any(word in _COLOUR_WORDS for name in noun.names for word in name.split()):
        return None
    return pick(rng, vocabulary.colours) if rng.random() < vocabulary.coloured else None


def _make_path(
    rng: np.random.Generator,
    context: SubjectContext,
    noun: Noun,
    sign: int,
    factor: float,
    paired: bool,
    first: Subject | None,
) -> tuple[Path, float]:
    """Sample size and limits of a path that stays in the frame; return it with its x offset."""
    place = PLACES[context.place]
    motion = context.motion
    limit = (
        (0.88 if motion in _VERTICAL_MOTIONS else 1.0)
        * (0.72 if paired else 1.0)
        / context.closeness
    )
    size = (
        2
        * float(rng.uniform(*context.vocabulary.sizes))
        * factor
        * (1.2 if noun.kind == "building" else 1.0)
    )
    size = min(size * limit, 0.8 if paired else 1.3) * context.narrow
    if first and abs(size - first.path.size) > 0.2 * first.path.size:
        size = first.path.size
    base = _base_height(rng, place, motion, size)
    if first:
        base = base if base == 0 else first.path.base
    buoyant = 0.0
    if place.medium == "water" and motion not in ALOFT and motion != "leap":
        buoyant = {"boat": 0.10, "swimmer": 0.35}.get(noun.kind, 0.16)
    gap = 0.55 * (first.path.size if first else size) if paired else 0.0
    offset = gap * sign if first is None else -gap * sign
    reach = max(0.36 * context.aspect, context.aspect / context.closeness - 0.55 * size - gap)
    headroom = max(0.12, 0.95 - (GROUND_LEVEL + base + size))
    phases = first.path.phases if first else (float(rng.random()), float(rng.random()))
    path = Path(
        size=size,
        reach=reach,
        headroom=headroom,
        sign=sign,
        base=base,
        phases=phases,
        animated=noun.animated,
        buoyant=buoyant,
    )
    return path, offset


def _base_height(rng: np.random.Generator, place: Place, motion: str, size: float) -> float:
    """Sample the height of the feet above the ground at rest, in half frame heights."""
    lift = -GROUND_LEVEL - size / 2  # centres the subject in the frame
    wobble = float(rng.uniform(-1, 1))
    if place.medium in ("air", "deep", "space"):
        if motion in ("rise", "fall", "sink"):
            return -0.25 if place.medium == "deep" else -0.92 - GROUND_LEVEL
        return lift + 0.12 * wobble
    if motion in ALOFT:
        return max(0.1, lift + 0.17 + 0.08 * wobble)
    return 0.0
