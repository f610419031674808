"""Scene description, sampled from a vocabulary by a seed, as input for rendering."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from diorama.world.camera import CLOSENESS, FOCAL, camera_suits
from diorama.world.motion import MOTIONS
from diorama.world.nouns import NOUNS, Noun
from diorama.world.places import PLACES, Place
from diorama.world.style import COLOURLESS
from diorama.world.subject import Split, Subject, SubjectContext, choose_action, make_subjects, pick
from diorama.world.vocabulary import Vocabulary
from skyloom.core.seeds import derive_seed
from skyloom.core.types import VideoShape

STILL_SECONDS = 2.0  # duration of the scene behind a still
ACT_SECONDS = 2.0  # duration of one act in longer scenes
# Sizes in metres.
_PROP_SIZES = {
    "tree": 4.2, "pine tree": 4.4, "palm tree": 4.8, "cactus": 3.0, "house": 4.5, "couch": 3.0,
    "chair": 2.2, "potted plant": 2.0, "lollipop": 3.4, "cupcake": 2.6, "coral": 2.0,
    "mushroom": 1.5, "sheaf of rice": 2.0,
}  # fmt: skip


@dataclass(frozen=True)
class Prop:
    """A static background object; position and size in metres."""

    noun: str
    x: float
    z: float
    size: float


@dataclass(frozen=True)
class PaintVariation:
    """Random parameters of the painting, each in [0, 1)."""

    offset: float
    sun: float
    clouds: float
    palette: float
    accent: float


@dataclass(frozen=True)
class Scene:
    """Complete description of a scene, determined by seed, vocabulary and shape."""

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
    variation: PaintVariation

    @property
    def duration(self) -> float:
        """Seconds from the first to the last frame; STILL_SECONDS for a still."""
        return (self.shape.frames - 1) / self.fps if self.shape.frames > 1 else STILL_SECONDS

    @property
    def act(self) -> float:
        """Seconds of one act, such as crossing the frame: the duration, at most ACT_SECONDS."""
        return min(self.duration, ACT_SECONDS)

    @property
    def times(self) -> Float[np.ndarray, " t"]:
        """Time of each frame in seconds; a still shows the middle of its scene."""
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
    """Sample a scene. The same arguments give the same scene."""
    rng = np.random.default_rng(derive_seed(seed, "scene"))
    shape = VideoShape(frames, height, width)
    noun, place_name, motion = choose_action(rng, vocabulary, split, nouns)
    place = PLACES[place_name]
    camera = _choose_camera(rng, vocabulary, motion)
    style = pick(rng, vocabulary.styles) if rng.random() < vocabulary.style else None
    if style in COLOURLESS:
        vocabulary = replace(vocabulary, coloured=0.0)
    context = SubjectContext(
        vocabulary, split, nouns, place_name, motion, shape, CLOSENESS.get(camera, 1.0)
    )
    subjects, relation = make_subjects(rng, context, noun)
    time_of_day, weather = _choose_air(rng, vocabulary, place)
    return Scene(
        seed=seed,
        place=place_name,
        time_of_day=time_of_day,
        subjects=subjects,
        relation=relation,
        props=_make_props(
            rng, vocabulary, place, set(nouns) - {subject.noun for subject in subjects}, shape
        ),
        camera=camera,
        camera_sign=int(pick(rng, (-1, 1))),
        weather=weather,
        style=style,
        shape=shape,
        fps=fps,
        variation=PaintVariation(*(float(value) for value in rng.random(5))),
    )


def _choose_camera(rng: np.random.Generator, vocabulary: Vocabulary, motion: str) -> str:
    """Sample a camera move; use the static camera if the move does not suit the motion."""
    moving = [name for name in vocabulary.cameras if name != "static"]
    if not moving or rng.random() < vocabulary.static_camera:
        return "static"
    camera = pick(rng, moving)
    return camera if camera_suits(camera, motion, MOTIONS[motion].directed) else "static"


def _choose_air(
    rng: np.random.Generator, vocabulary: Vocabulary, place: Place
) -> tuple[str | None, str | None]:
    """Sample time of day and weather; rain, snow and fog need a cloudy day or a night."""
    hours = [hour for hour in place.times if hour in vocabulary.times]
    hour = pick(rng, hours) if hours else None
    weathers = [weather for weather in place.weathers if weather in vocabulary.weathers]
    if not weathers or rng.random() >= vocabulary.weather:
        return hour, None
    weather = pick(rng, weathers)
    gray = [other for other in hours if other in ("cloudy", "night")]
    if weather in ("rain", "snow", "fog") and hour not in gray:
        return (pick(rng, gray), weather) if gray else (hour, None)
    return hour, weather


def _make_props(
    rng: np.random.Generator,
    vocabulary: Vocabulary,
    place: Place,
    nouns: Set[str],
    shape: VideoShape,
) -> tuple[Prop, ...]:
    """Sample props behind the subjects, to the left and right."""
    known = [name for name in place.props if name in nouns]
    if not known:
        return ()
    props = []
    for index in range(int(rng.integers(0, vocabulary.max_props + 1))):
        name = pick(rng, known)
        depth = float(rng.uniform(9.0, 14.0)) if place.medium != "indoors" else 9.3
        across = (
            (1 if index % 2 else -1) * float(rng.uniform(0.62, 1.05)) * shape.width / shape.height
        )
        size = _PROP_SIZES.get(name, 2.0) * float(rng.uniform(0.85, 1.15))
        props.append(Prop(name, across * depth / FOCAL, depth, size))
    return tuple(props)
