"""Table of the places of scenes.

A place's `medium` determines the possible motions: ground, water (its surface), air, deep, space,
indoors.
"""

from dataclasses import dataclass

ANY_TIME = ("day", "sunset", "dawn", "night", "cloudy")
CLEAR_TIME = ("day", "sunset", "dawn", "night")
OUTDOOR_WEATHER = ("rain", "fog", "leaves", "petals")


@dataclass(frozen=True)
class Place:
    """A place: ground, backdrop on the horizon, props, and caption phrases.

    `over` holds the phrases for subjects in the air; `popularity` is a sampling weight.
    """

    medium: str
    ground: str | None
    backdrop: str | None
    times: tuple[str, ...]
    phrases: tuple[str, ...]
    details: tuple[str, ...]
    props: tuple[str, ...] = ()
    weathers: tuple[str, ...] = OUTDOOR_WEATHER
    over: tuple[str, ...] = ()
    popularity: float = 1.0


PLACES: dict[str, Place] = {
    "beach": Place(
        "ground", "beach", None, CLEAR_TIME,
        ("on the beach", "on a sandy beach", "at the beach", "by the sea shore"),
        ("the sea lies behind the sand", "waves roll onto the sand"),
        props=("palm tree",), weathers=("rain",),
    ),
    "meadow": Place(
        "ground", "grass", "hills", ANY_TIME,
        ("in a meadow", "in a green field", "on the grass", "in a grassy meadow"),
        ("green hills lie in the distance", "soft hills rise behind the grass"),
        props=("tree",),
    ),
    "desert": Place(
        "ground", "sand", "dunes", CLEAR_TIME,
        ("in the desert", "among sand dunes", "in a sandy desert", "on the desert sand"),
        ("dunes stretch to the horizon", "sand dunes rise in the distance"),
        props=("cactus",), weathers=(),
    ),
    "mountains": Place(
        "ground", "snow", "mountains", ANY_TIME,
        ("in the snowy mountains", "in the snow", "in front of snowy mountains",
         "on a snowy mountain field"),
        ("snowy peaks stand behind", "white mountain peaks rise in the distance"),
        props=("pine tree",), weathers=("snow", "fog"),
    ),
    "city": Place(
        "ground", "road", "skyline", ANY_TIME,
        ("in the city", "on a city street", "downtown", "in front of a city skyline"),
        ("tall buildings line the street", "a skyline stands behind the road"),
    ),
    "ocean": Place(
        "water", "water", None, ANY_TIME,
        ("on the ocean", "on the sea", "on the open water", "at sea"),
        ("calm water reaches to the horizon", "small waves cover the blue water"),
        weathers=("rain", "fog"),
        over=("over the ocean", "over the sea", "above the waves", "above the open water"),
        popularity=2.0,
    ),
    "sky": Place(
        "air", "cloudsea", None, CLEAR_TIME,
        ("in the sky", "above the clouds", "high in the sky", "over a sea of clouds"),
        ("soft clouds lie below", "white clouds drift underneath"),
        weathers=(), popularity=2.5,
    ),
    "underwater": Place(
        "deep", "seabed", None, (),
        ("underwater", "under the sea", "at the bottom of the sea", "deep in the ocean"),
        ("light rays fall through the water", "corals grow on the sea floor"),
        props=("coral",), weathers=("bubbles",), popularity=2.0,
    ),
    "space": Place(
        "space", None, None, (),
        ("in space", "in outer space", "among the stars", "in the galaxy"),
        ("stars glow in the dark", "a colorful nebula glows behind"),
        weathers=(), popularity=0.7,
    ),
    "forest": Place(
        "ground", "forest", "trees", ANY_TIME,
        ("in the forest", "in the woods", "among the trees", "in a forest clearing"),
        ("dark trees stand close together", "tall trees stand behind"),
        props=("pine tree", "tree", "mushroom"),
    ),
    "lake": Place(
        "water", "water", "mountains", CLEAR_TIME,
        ("on a lake", "on a mountain lake", "on a calm lake"),
        ("mountains stand behind the lake", "snowy peaks rise behind the water"),
        weathers=("rain", "fog"), over=("over a lake", "over a mountain lake", "above a calm lake"),
    ),
    "moon": Place(
        "ground", "moon", "craters", (),
        ("on the moon", "on the surface of the moon", "on a lunar plain"),
        ("gray hills stand against the black sky", "stars shine over the gray ground"),
        weathers=(),
    ),
    "room": Place(
        "indoors", "wood", "wall", ("day", "night"),
        ("in a room", "in a living room", "on a wooden floor", "indoors"),
        ("a window opens in the wall behind", "the wall behind has a window"),
        props=("couch", "potted plant", "chair"), weathers=("confetti",),
    ),
    "farm": Place(
        "ground", "field", "hills", ANY_TIME,
        ("on a farm", "in a farm field", "in the countryside", "on farmland"),
        ("green hills lie behind the fields", "rows of crops run into the distance"),
        props=("house", "sheaf of rice", "tree"),
    ),
    "stage": Place(
        "indoors", "stage", "curtain", (),
        ("on a stage", "on a theater stage", "in the spotlight", "in front of a curtain"),
        ("a heavy curtain hangs behind", "a spotlight falls on the floor"),
        weathers=("confetti",),
    ),
    "candy": Place(
        "ground", "candy", "candyhills", ("day", "sunset", "night"),
        ("in candy land", "in a candy world", "in a land of sweets"),
        ("pastel hills rise in the distance", "the ground is striped in pink and mint"),
        props=("lollipop", "cupcake"), weathers=("confetti",),
    ),
}  # fmt: skip
