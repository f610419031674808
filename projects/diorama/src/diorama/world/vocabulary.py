"""Vocabularies: the sets of nouns, places, motions and other choices that scenes sample from."""

from dataclasses import dataclass, replace

from diorama.world.camera import CAMERAS
from diorama.world.motion import MOTIONS
from diorama.world.nouns import NOUNS
from diorama.world.places import PLACES
from diorama.world.style import COLOURS, STYLES
from diorama.world.weather import WEATHERS
from skyloom.core.errors import ConfigError


@dataclass(frozen=True)
class Vocabulary:
    """Possible values of a scene's parameters, with probabilities.

    two_objects, static_camera, directed, weather, style, coloured, size_words: probabilities.
    sizes: range of a subject's height, as fractions of the frame height.
    heroes: sampling weight of nouns marked as heroes.
    """

    name: str
    nouns: tuple[str, ...]
    places: tuple[str, ...]
    times: tuple[str, ...]
    motions: tuple[str, ...]
    cameras: tuple[str, ...]
    weathers: tuple[str, ...] = ()
    styles: tuple[str, ...] = ()
    colours: tuple[str, ...] = ()
    two_objects: float = 0.0
    static_camera: float = 0.75
    directed: float = 0.68
    weather: float = 0.0
    style: float = 0.0
    coloured: float = 0.25
    coloured_kinds: frozenset[str] = frozenset(
        {"car", "boat", "aircraft", "ball", "object", "swimmer"}
    )
    sizes: tuple[float, float] = (0.40, 0.56)
    size_words: float = 0.0
    heroes: float = 1.0
    max_props: int = 2


SMALL = Vocabulary(
    name="small",
    nouns=(
        "cat", "dog", "horse", "elephant", "penguin", "rabbit", "turtle", "dinosaur", "tiger",
        "duck", "car", "bus", "tractor", "motorcycle", "parrot", "butterfly", "bee", "owl",
        "dragon", "helicopter", "rocket", "ufo", "balloon", "airplane", "fish", "whale", "octopus",
        "dolphin", "sailboat", "snowman", "pumpkin", "robot", "soccer ball",
    ),
    places=(
        "beach", "meadow", "desert", "mountains", "city", "ocean", "sky", "underwater", "space",
    ),
    times=("day", "sunset", "night"),
    motions=(
        "walk", "run", "drive", "fly", "swim", "sail", "roll", "hop", "leap", "drift",
        "idle", "hover", "float", "bounce", "jump", "near", "bob", "spin", "sink",
    ),
    cameras=("static", "pan left", "pan right", "zoom in"),
    static_camera=0.65,
    directed=0.75,
    sizes=(0.46, 0.60),
    colours=("red", "blue", "green", "yellow", "purple", "white"),
)  # fmt: skip

DIORAMA = replace(
    SMALL,
    name="diorama",
    cameras=("static", "pan left", "pan right", "zoom in", "zoom out"),
    weathers=("rain", "snow"),
    two_objects=0.22,
    static_camera=0.75,
    directed=0.85,
    weather=0.12,
    coloured=0.3,
)

FULL = Vocabulary(
    name="full",
    nouns=tuple(key for key, noun in NOUNS.items() if noun.kind != "plant"),
    places=tuple(PLACES),
    times=("day", "sunset", "dawn", "night", "cloudy"),
    motions=tuple(MOTIONS),
    cameras=tuple(CAMERAS),
    weathers=tuple(WEATHERS),
    styles=tuple(STYLES),
    colours=tuple(COLOURS),
    two_objects=0.20,
    static_camera=0.5,
    directed=0.55,
    weather=0.25,
    style=0.15,
    coloured=0.35,
    coloured_kinds=frozenset(
        {"car", "boat", "aircraft", "ball", "object", "swimmer", "walker", "flyer", "building"}
    ),
    sizes=(0.34, 0.52),
    size_words=0.12,
    heroes=3.0,
    max_props=4,
)

TINY = Vocabulary(
    name="tiny",
    nouns=("ball", "cube", "star", "ring", "boat", "fish", "bird", "wagon"),
    places=("beach", "meadow", "ocean", "sky", "underwater"),
    times=("day", "night"),
    motions=SMALL.motions,
    cameras=("static", "zoom in"),
    colours=("red", "blue"),
)

VOCABULARIES = {vocabulary.name: vocabulary for vocabulary in (FULL, DIORAMA, SMALL, TINY)}


def find_vocabulary(name: str) -> Vocabulary:
    """Look up a vocabulary by name. Raises ConfigError."""
    if name not in VOCABULARIES:
        raise ConfigError(
            f"vocabulary must be one of {', '.join(VOCABULARIES)}, got {name!r}.",
            hint="Use one of these names.",
        )
    return VOCABULARIES[name]
