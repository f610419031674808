"""A scene: everything that will be seen, drawn from a vocabulary by a seed, before any pixel is painted."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from skyloom.core.seeds import derive_seed
from skyloom.core.types import VideoShape
from skyloom.world.camera import CLOSENESS, FOCAL, camera_suits
from skyloom.world.motion import MOTIONS
from skyloom.world.nouns import NOUNS, Noun
from skyloom.world.places import PLACES, Place
from skyloom.world.style import COLOURLESS
from skyloom.world.subject import Casting, Split, Subject, choose_action, make_subjects, pick
from skyloom.world.vocabulary import Vocabulary

STILL_SECONDS = 2.0  # how long the scene of a single picture would last
ACT_SECONDS = 2.0  # how long one act takes in a scene that lasts longer
# metres
_PROP_SIZES = {
    "tree": 4.2, "pine tree": 4.4, "palm tree": 4.8, "cactus": 3.0, "house": 4.5, "couch": 3.0, "chair": 2.2,
    "potted plant": 2.0, "lollipop": 3.4, "cupcake": 2.6, "coral": 2.0, "mushroom": 1.5, "sheaf of rice": 2.0,
}  # fmt: skip


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
    def act(self) -> float:
        """Seconds that one act takes, from one side of the frame to the other: the whole scene, if it is short."""
        return min(self.duration, ACT_SECONDS)

    @property
    def times(self) -> Float[np.ndarray, " t"]:
        """The time of each frame; a single picture shows the middle of its scene."""
        if self.shape.frames == 1:
            return np.array([self.duration / 2])
        return np.arange(self.shape.frames) / self.fps


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
    noun, place_name, motion = choose_action(chance, vocabulary, split, nouns)
    place = PLACES[place_name]
    camera = _choose_camera(chance, vocabulary, motion)
    style = pick(chance, vocabulary.styles) if chance.random() < vocabulary.style else None
    if style in COLOURLESS:
        vocabulary = replace(vocabulary, coloured=0.0)
    casting = Casting(
        vocabulary, split, nouns, place_name, motion, shape, CLOSENESS.get(camera, 1.0)
    )
    subjects, relation = make_subjects(chance, casting, noun)
    time_of_day, weather = _choose_air(chance, vocabulary, place)
    return Scene(
        seed=seed,
        place=place_name,
        time_of_day=time_of_day,
        subjects=subjects,
        relation=relation,
        props=_make_props(
            chance, vocabulary, place, set(nouns) - {subject.noun for subject in subjects}, shape
        ),
        camera=camera,
        camera_sign=int(pick(chance, (-1, 1))),
        weather=weather,
        style=style,
        shape=shape,
        fps=fps,
        look=Look(*(float(value) for value in chance.random(5))),
    )


def _choose_camera(chance: np.random.Generator, vocabulary: Vocabulary, motion: str) -> str:
    """Draw from all moving cameras; one that does not suit the motion stands still instead."""
    moving = [name for name in vocabulary.cameras if name != "static"]
    if not moving or chance.random() < vocabulary.static_camera:
        return "static"
    camera = pick(chance, moving)
    return camera if camera_suits(camera, motion, MOTIONS[motion].directed) else "static"


def _choose_air(
    chance: np.random.Generator, vocabulary: Vocabulary, place: Place
) -> tuple[str | None, str | None]:
    """An hour and a weather that agree: what falls from clouds, falls from a gray or dark sky."""
    hours = [hour for hour in place.times if hour in vocabulary.times]
    hour = pick(chance, hours) if hours else None
    weathers = [weather for weather in place.weathers if weather in vocabulary.weathers]
    if not weathers or chance.random() >= vocabulary.weather:
        return hour, None
    weather = pick(chance, weathers)
    gray = [other for other in hours if other in ("cloudy", "night")]
    if weather in ("rain", "snow", "fog") and hour not in gray:
        return (pick(chance, gray), weather) if gray else (hour, None)
    return hour, weather


def _make_props(
    chance: np.random.Generator,
    vocabulary: Vocabulary,
    place: Place,
    nouns: Set[str],
    shape: VideoShape,
) -> tuple[Prop, ...]:
    """A few props behind the subjects, to the sides."""
    known = [name for name in place.props if name in nouns]
    if not known:
        return ()
    props = []
    for index in range(int(chance.integers(0, vocabulary.most_props + 1))):
        name = pick(chance, known)
        depth = float(chance.uniform(9.0, 14.0)) if place.medium != "indoors" else 9.3
        across = (
            (1 if index % 2 else -1)
            * float(chance.uniform(0.62, 1.05))
            * shape.width
            / shape.height
        )
        size = _PROP_SIZES.get(name, 2.0) * float(chance.uniform(0.85, 1.15))
        props.append(Prop(name, across * depth / FOCAL, depth, size))
    return tuple(props)
