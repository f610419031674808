"""What each kind of noun can do in each medium. A missing pair means that it does not belong there."""

_THING = (
    "slide", "bounce along", "bounce", "spin", "float", "idle", "turn", "dance", "grow", "shrink", "fall",
)  # fmt: skip
_ADRIFT = ("drift", "float", "spin", "turn")
_ALOFT = ("drift", "float", "spin", "fall")
_DEEP = ("drift", "float", "sink")
_WAVES = ("sail", "bob")
_BEAST = ("walk", "run", "hop", "idle", "jump", "near", "away", "dance")
_WINGED = ("fly", "arc", "hover", "near", "away", "circle")
_MACHINE = ("fly", "hover", "near", "away")

_GOODS = {
    "ground": _THING,
    "indoors": _THING,
    "water": _WAVES,
    "deep": _DEEP,
    "air": _ALOFT,
    "space": _ADRIFT,
}
_TABLE: dict[str, dict[str, tuple[str, ...]]] = {
    "walker": {"ground": _BEAST, "indoors": _BEAST, "space": _ADRIFT},
    "person": {
        "ground": ("walk", "idle", "jump", "dance", "near", "away"),
        "indoors": ("walk", "idle", "jump", "dance"),
        "space": _ADRIFT,
    },
    "runner": {"ground": ("run", "near"), "indoors": ("run",)},
    "car": {
        "ground": ("drive", "idle", "near", "away"),
        "space": _ADRIFT,
        "deep": ("sink", "float"),
    },
    "flyer": {
        "ground": _WINGED,
        "water": _WINGED,
        "air": _WINGED,
        "indoors": ("fly", "hover"),
        "space": ("drift", "float"),
    },
    "aircraft": {
        "ground": (*_MACHINE, "take off"),
        "water": _MACHINE,
        "air": _MACHINE,
        "deep": ("sink", "float"),
        "space": ("fly", "drift", "float", "near"),
    },
    "swimmer": {
        "water": ("leap", "swim"),
        "deep": ("swim", "arc", "hover", "near", "circle"),
        "space": _ADRIFT,
    },
    "boat": {"water": ("sail", "bob", "near", "away"), "deep": ("sink", "float")},
    "ball": _GOODS
    | {
        "ground": ("roll", "bounce along", "bounce", "spin", "fall", "near"),
        "indoors": ("roll", "bounce along", "bounce"),
    },
    "object": _GOODS,
    "food": _GOODS,
    "building": {"ground": ("idle", "grow", "shrink")},
    "plant": {"ground": ("sway", "grow", "idle"), "indoors": ("sway", "idle")},
    "celestial": {
        "ground": ("rise", "float"),
        "water": ("rise", "float"),
        "air": ("rise", "float", "spin"),
        "space": ("spin", "drift", "float", "near"),
    },
}
# A head or a bust has no legs: it may hop and spin, never walk.
_BODILY = frozenset({"walk", "run", "near", "away", "idle"})
_HEADY = ("hop", "jump", "spin")
# Nouns that can do more than their kind.
_SWIMS = frozenset(
    {
        "turtle",
        "penguin",
        "duck",
        "crocodile",
        "seal",
        "otter",
        "frog",
        "mermaid",
        "lobster",
        "crab",
    }
)
_FLOATS = frozenset({"duck", "swan", "goose", "seal", "turtle"})


def motions_for(key: str, kind: str, medium: str, whole: bool) -> tuple[str, ...]:
    """What a noun can do in a medium; heads and busts (`whole` false) never walk."""
    if medium == "deep" and key in _SWIMS:
        return ("swim", "hover")
    if medium == "water" and key in _FLOATS:
        return _WAVES
    if key == "balloon":
        return ("rise", "float") if medium == "indoors" else ("rise", "drift", "float")
    moves = _TABLE.get(kind, {}).get(medium, ())
    if whole or kind not in ("walker", "person", "runner"):
        return moves
    hops = _HEADY if moves and medium in ("ground", "indoors") else ()
    return tuple(dict.fromkeys((*(move for move in moves if move not in _BODILY), *hops)))
