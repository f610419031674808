"""A scene: everything that will be seen, drawn from a vocabulary by a seed, before a single pixel is painted.

The noun is drawn first, then a place where it belongs, then something it can do there. One pair of (noun, place)
or (noun, motion) in ten is held out of training, by a hash that never changes.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from skyloom.core.errors import ConfigError
from skyloom.core.seeds import derive_seed
from skyloom.core.types import VideoShape
from skyloom.world.camera import GROUND_LEVEL
from skyloom.world.motion import MOTIONS, Path, motions_for
from skyloom.world.nouns import NOUNS, Noun
from skyloom.world.places import PLACES, Place
from skyloom.world.style import COLOURS
from skyloom.world.vocabulary import Vocabulary

Split = Literal["train", "heldout", "all"]
Item = TypeVar("Item")

STILL_SECONDS = 2.0  # how long the scene of a single picture would last
SIZE_WORDS = {"giant": 1.35, "huge": 1.35, "tiny": 0.55, "little": 0.6}
COLOURED_SHARE_KINDS = frozenset(
    {"car", "boat", "aircraft", "ball", "object", "swimmer", "flyer", "walker", "food", "building"}
)
_PAINTABLE_SMALL = frozenset({"car", "boat", "aircraft", "ball", "object", "swimmer"})
_SWIMS = frozenset({"turtle", "penguin", "duck", "crocodile", "seal", "otter", "frog", "mermaid", "lobster", "crab"})
_FLOATS = frozenset({"duck", "swan", "goose", "seal", "turtle"})
_ALOFT = frozenset({"fly", "arc", "hover", "circle"})
_TALL = frozenset({"jump", "bounce", "bounce along", "hop", "rise", "fall", "sink", "leap", "take off", "arc"})


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
    animated: bool
    colour: str | None
    size_word: str | None
    path: Path
    offset: float
    phase: float
    submerged: bool  # what is below the water line is hidden


@dataclass(frozen=True)
class Prop:
    """A tree or a stone that stands behind, in metres."""

    noun: str
    x: float
    z: float
    size: float


@dataclass(frozen=True)
class Look:
    """What chance decides about the painting."""

    offset: float
    sun: float
    clouds: float
    palette: float
    accent: float


@dataclass(frozen=True)
class Scene:
    """Everything that will be seen; pure data, a function of its seed and vocabulary."""

    seed: int
    place: str
    time_of_day: str | None
    subjects: tuple[Subject, ...]
    relation: str | None
    props: tuple[Prop, ...]
    camera: str
    camera_sign: int
    weather: str | None
    style: str | None
    shape: VideoShape
    fps: float
    look: Look

    @property
    def duration(self) -> float:
        """Seconds from the first to the last frame; of a single picture, of the scene it is taken from."""
        return (self.shape.frames - 1) / self.fps if self.shape.frames > 1 else STILL_SECONDS

    @property
    def times(self) -> np.ndarray:
        """The time of each frame; a single picture shows the middle of its scene."""
        if self.shape.frames == 1:
            return np.array([self.duration / 2])
        return np.arange(self.shape.frames) / self.fps


def is_held_out(noun: str, place_or_motion: str, share: float = 0.10) -> bool:
    """Whether training never sees this noun in this place, or doing this."""
    digest = hashlib.sha256(f"skyloom|{noun}|{place_or_motion}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32


def sample_scene(
    seed: int,
    vocabulary: Vocabulary,
    frames: int = 33,
    height: int = 128,
    width: int = 128,
    fps: float = 16,
    split: Split = "train",
    nouns: Mapping[str, Noun] = NOUNS,
) -> Scene:
    """Draw one scene. The same seed, vocabulary and shape give the same scene."""
    chance = np.random.default_rng(derive_seed(seed, "scene"))
    shape = VideoShape(frames, height, width)
    noun, place_name, motion = _choose_action(chance, vocabulary, split, nouns)
    place = PLACES[place_name]
    camera = _choose_camera(chance, vocabulary, motion)
    subjects, relation = _make_subjects(chance, vocabulary, split, nouns, noun, place_name, motion, shape)
    hours = [time for time in place.times if time in vocabulary.times]
    time_of_day = _pick(chance, hours) if hours else None
    weathers = [w for w in place.weathers if w in vocabulary.weathers and not (w == "rain" and time_of_day == "sunset")]
    weather = _pick(chance, weathers) if weathers and chance.random() < vocabulary.weather else None
    if weather in ("rain", "snow", "fog") and time_of_day == "day" and "cloudy" in hours:
        time_of_day = "cloudy"
    style = _pick(chance, vocabulary.styles) if vocabulary.styles and chance.random() < vocabulary.style else None
    return Scene(
        seed=seed,
        place=place_name,
        time_of_day=time_of_day,
        subjects=subjects,
        relation=relation,
        props=_make_props(chance, vocabulary, place, nouns, shape),
        camera=camera,
        camera_sign=int(_pick(chance, (-1, 1))),
        weather=weather,
        style=style,
        shape=shape,
        fps=fps,
        look=Look(*(float(value) for value in chance.random(5))),
    )


def _pick(chance: np.random.Generator, items: Sequence[Item], weights: Sequence[float] | None = None) -> Item:
    if weights is None:
        return items[int(chance.integers(len(items)))]
    shares = np.cumsum(np.asarray(weights, dtype=np.float64))
    return items[int(np.searchsorted(shares, chance.random() * shares[-1], side="right"))]


def possible_motions(noun: Noun, place_name: str) -> tuple[str, ...]:
    """What a noun can do in a place, in any vocabulary."""
    medium = PLACES[place_name].medium
    kind = noun.kind
    if medium == "deep" and noun.key in _SWIMS:
        return ("swim", "hover", "near")
    if medium == "water" and noun.key in _FLOATS:
        return ("sail", "bob")
    if medium == "deep" and kind == "boat":
        return ("sink",)
    if noun.key == "balloon":
        return ("rise", "drift", "float") if medium != "indoors" else ("rise", "float")
    return motions_for(kind, medium, noun.whole)


def actions(
    noun: Noun, vocabulary: Vocabulary, split: Split = "all"
) -> tuple[tuple[str, str], ...]:
    """The (place, motion) pairs that a split of a vocabulary allows a noun."""
    found = []
    for place in vocabulary.places:
        for motion in possible_motions(noun, place):
            if motion not in vocabulary.motions:
                continue
            held = is_held_out(noun.key, place, vocabulary.held_out) or is_held_out(noun.key, motion, vocabulary.held_out)
            if split == "all" or held == (split == "heldout"):
                found.append((place, motion))
    return tuple(found)


def _choose_action(
    chance: np.random.Generator, vocabulary: Vocabulary, split: Split, nouns: Mapping[str, Noun]
) -> tuple[Noun, str, str]:
    keys = vocabulary.nouns or tuple(nouns)
    keys = tuple(key for key in keys if nouns[key].kind != "plant")
    weights = [vocabulary.heroes if nouns[key].hero else 1.0 for key in keys]
    for _ in range(1000):
        noun = nouns[_pick(chance, keys, weights)]
        allowed = actions(noun, vocabulary, split)
        if not allowed:
            continue
        places = list(dict.fromkeys(place for place, _ in allowed))
        place = _pick(chance, places, [PLACES[name].popularity for name in places])
        here = [motion for name, motion in allowed if name == place]
        directed = [motion for motion in here if MOTIONS[motion].directed]
        others = [motion for motion in here if not MOTIONS[motion].directed]
        if directed and (not others or chance.random() < vocabulary.directed):
            return noun, place, _pick(chance, directed)
        return noun, place, _pick(chance, others)
    raise ConfigError(
        f"The vocabulary {vocabulary.name!r} has nothing to show in split {split!r}.", hint="Add nouns, places or motions."
    )


def _choose_camera(chance: np.random.Generator, vocabulary: Vocabulary, motion: str) -> str:
    """A pan beside a crossing subject would blur who moves: a moving camera suits the motion, or stands still."""
    moving = [camera for camera in vocabulary.cameras if camera != "static"]
    if MOTIONS[motion].directed:
        moving = [camera for camera in moving if not camera.startswith(("pan", "orbit"))]
    else:
        moving = [camera for camera in moving if camera != "follow"]
    if motion in ("near", "away", "grow", "shrink"):
        moving = []
    if not moving or chance.random() < vocabulary.static_camera:
        return "static"
    return _pick(chance, moving)


def _make_subjects(
    chance: np.random.Generator, vocabulary: Vocabulary, split: Split, nouns: Mapping[str, Noun],
    noun: Noun, place: str, motion: str, shape: VideoShape,
) -> tuple[tuple[Subject, ...], str | None]:
    direction = str(_pick(chance, ("left", "right"))) if MOTIONS[motion].directed else None
    companion = None
    if chance.random() < vocabulary.two_objects and motion not in ("roll", "spin", "turn", "near", "away", "circle"):
        fitting = [
            other for key, other in nouns.items()
            if (not vocabulary.nouns or key in vocabulary.nouns) and other.kind == noun.kind and key != noun.key
            and (place, motion) in actions(other, vocabulary, split)
        ]
        companion = _pick(chance, fitting) if fitting else None
    first = _make_subject(chance, vocabulary, noun, place, motion, direction, shape, companion is not None)
    if companion is None:
        return (first,), None
    second = _make_subject(chance, vocabulary, companion, place, motion, direction, shape, True, first)
    return (first, second), _pick(chance, ("followed by", "ahead of") if direction else ("next to", "beside", "and"))


def _make_subject(
    chance: np.random.Generator, vocabulary: Vocabulary, noun: Noun, place_name: str, motion: str,
    direction: str | None, shape: VideoShape, paired: bool, first: Subject | None = None,
) -> Subject:
    place = PLACES[place_name]
    size_word = None
    if not noun.person and not paired and chance.random() < vocabulary.size_words:
        size_word = str(_pick(chance, tuple(SIZE_WORDS)))
    path, offset = _make_path(chance, vocabulary, noun, place, motion, direction, shape, size_word, first, paired)
    facing = {"left": -1, "right": 1}.get(direction or "", int(_pick(chance, (-1, 1))))
    if motion == "circle":
        facing = -1
    art = {"left": -1, "right": 1}.get(noun.facing, 0)
    verb = first.verb if first else str(_pick(chance, MOTIONS[motion].verbs_for(noun.kind)))
    if first is None and MOTIONS[motion].tail:
        verb += _pick(chance, MOTIONS[motion].tail)
    return Subject(
        noun=noun.key,
        name=_pick(chance, noun.names),
        kind=noun.kind,
        motion=motion,
        verb=verb,
        direction=direction,
        facing=facing if art else 1,
        mirrored=art not in (0, facing),
        tilt=noun.tilt,
        animated=noun.animated,
        colour=_choose_colour(chance, vocabulary, noun),
        size_word=size_word,
        path=path,
        offset=offset,
        phase=float(chance.random()),
        submerged=place.medium == "water" and motion not in _ALOFT,
    )


def _choose_colour(chance: np.random.Generator, vocabulary: Vocabulary, noun: Noun) -> str | None:
    kinds = COLOURED_SHARE_KINDS if vocabulary.name == "full" else _PAINTABLE_SMALL
    if noun.person or noun.kind not in kinds or not vocabulary.colours:
        return None
    if any(colour in name.split() for name in noun.names for colour in (*COLOURS, "gold", "silver", "brown", "polar")):
        return None
    return _pick(chance, vocabulary.colours) if chance.random() < vocabulary.coloured else None


def _make_path(
    chance: np.random.Generator, vocabulary: Vocabulary, noun: Noun, place: Place, motion: str,
    direction: str | None, shape: VideoShape, size_word: str | None, first: Subject | None, paired: bool,
) -> tuple[Path, float]:
    """How large the subject is, where it rests and how far it may go, so that it stays in the frame."""
    aspect = shape.width / shape.height
    size = 2 * float(chance.uniform(*vocabulary.sizes)) * min(1.0, aspect) * SIZE_WORDS.get(size_word or "", 1.0)
    size *= {"building": 1.2, "car": 1.05, "bus": 1.1}.get(noun.kind, 1.0)
    if motion in _TALL:
        size *= 0.84
    if paired:
        size = min(size * 0.72, 0.8 * min(1.0, aspect))
    size = min(size, 1.3 * min(1.0, aspect))
    base = _base_height(chance, place, motion, size)
    buoyant = 0.0
    if place.medium == "water" and motion in ("sail", "bob", "near", "away", "swim"):
        buoyant = {"boat": 0.10, "swimmer": 0.35}.get(noun.kind, 0.16)
    sign = {"left": -1, "right": 1}.get(direction or "", int(_pick(chance, (-1, 1))))
    gap = 0.5 * size * 1.05 if paired else 0.0
    offset = (gap * sign if first is None else -gap * sign) if paired else 0.0
    reach = max(0.36 * aspect, aspect - 0.52 * size - gap)
    headroom = max(0.12, 0.95 - (GROUND_LEVEL + base + size))
    chances = first.path.chance if first else (float(chance.random()), float(chance.random()))
    return Path(size, reach, headroom, sign, base, chances, noun.animated, buoyant), offset


def _base_height(chance: np.random.Generator, place: Place, motion: str, size: float) -> float:
    """Height of the feet over the ground at rest, in half frame heights."""
    lift = -GROUND_LEVEL - size / 2  # what puts the middle of the subject in the middle of the frame
    wobble = float(chance.uniform(-1, 1))
    if place.medium in ("air", "deep", "space"):
        if motion in ("rise", "fall", "sink"):
            return -0.92 - GROUND_LEVEL if place.medium != "deep" else -0.25
        return lift + 0.12 * wobble
    if motion in _ALOFT:
        return max(0.1, lift + 0.17 + 0.08 * wobble)
    return 0.0


def _make_props(
    chance: np.random.Generator, vocabulary: Vocabulary, place: Place, nouns: Mapping[str, Noun], shape: VideoShape
) -> tuple[Prop, ...]:
    """A few props behind the subjects, to the sides."""
    known = [name for name in place.props if name in nouns]
    if not known:
        return ()
    sizes = {"tree": 4.2, "pine tree": 4.4, "palm tree": 4.8, "cactus": 3.0, "house": 4.5, "couch": 3.0, "chair": 2.2,
             "potted plant": 2.0, "lollipop": 3.4, "cupcake": 2.6, "coral": 1.8, "mushroom": 1.5, "sheaf of rice": 2.0}
    props = []
    for side in chance.permutation([-1, 1])[: int(chance.integers(0, vocabulary.most_props + 1))]:
        name = _pick(chance, known)
        depth = float(chance.uniform(9.0, 14.0)) if place.medium != "indoors" else 9.3
        across = float(side * chance.uniform(0.62, 1.05)) * shape.width / shape.height
        props.append(Prop(name, across * depth / 1.8, depth, sizes.get(name, 2.0) * float(chance.uniform(0.85, 1.15))))
    return tuple(props)  # fmt: skip
