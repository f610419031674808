"""Motions available to each kind of noun in each medium; a missing pair is not allowed."""

_OBJECT_MOTIONS = (
    "slide", "bounce along", "bounce", "spin", "float", "idle", "turn", "dance", "grow", "shrink",
    "fall",
)  # fmt: skip
_DRIFT_MOTIONS = ("drift", "float", "spin", "turn")
_AIR_MOTIONS = ("drift", "float", "spin", "fall")
_UNDERWATER_MOTIONS = ("drift", "float", "sink")
_SURFACE_MOTIONS = ("sail", "bob")
_ANIMAL_MOTIONS = ("walk", "run", "hop", "idle", "jump", "near", "away", "dance")
_FLYER_MOTIONS = ("fly", "arc", "hover", "near", "away", "circle")
_AIRCRAFT_MOTIONS = ("fly", "hover", "near", "away")

_OBJECT_MEDIA = {
    "ground": _OBJECT_MOTIONS,
    "indoors": _OBJECT_MOTIONS,
    "water": _SURFACE_MOTIONS,
    "deep": _UNDERWATER_MOTIONS,
    "air": _AIR_MOTIONS,
    "space": _DRIFT_MOTIONS,
}
_TABLE: dict[str, dict[str, tuple[str, ...]]] = {
    "walker": {"ground": _ANIMAL_MOTIONS, "indoors": _ANIMAL_MOTIONS, "space": _DRIFT_MOTIONS},
    "person": {
        "ground": ("walk", "idle", "jump", "dance", "near", "away"),
        "indoors": ("walk", "idle", "jump", "dance"),
        "space": _DRIFT_MOTIONS,
    },
    "runner": {"ground": ("run", "near"), "indoors": ("run",)},
    "car": {
        "ground": ("drive", "idle", "near", "away"),
        "space": _DRIFT_MOTIONS,
        "deep": ("sink", "float"),
    },
    "flyer": {
        "ground": _FLYER_MOTIONS,
        "water": _FLYER_MOTIONS,
        "air": _FLYER_MOTIONS,
        "indoors": ("fly", "hover"),
        "space": ("drift", "float"),
    },
    "aircraft": {
        "ground": (*_AIRCRAFT_MOTIONS, "take off"),
        "water": _AIRCRAFT_MOTIONS,
        "air": _AIRCRAFT_MOTIONS,
        "deep": ("sink", "float"),
        "space": ("fly", "drift", "float", "near"),
    },
    "swimmer": {
        "water": ("leap", "swim"),
        "deep": ("swim", "arc", "hover", "near", "circle"),
        "space": _DRIFT_MOTIONS,
    },
    "boat": {"water": ("sail", "bob", "near", "away"), "deep": ("sink", "float")},
    "ball": _OBJECT_MEDIA
    | {
        "ground": ("roll", "bounce along", "bounce", "spin", "fall", "near"),
        "indoors": ("roll", "bounce along", "bounce"),
    },
    "object": _OBJECT_MEDIA,
    "food": _OBJECT_MEDIA,
    "building": {"ground": ("idle", "grow", "shrink")},
    "plant": {"ground": ("sway", "grow", "idle"), "indoors": ("sway", "idle")},
    "celestial": {
        "ground": ("rise", "float"),
        "water": ("rise", "float"),
        "air": ("rise", "float", "spin"),
        "space": ("spin", "drift", "float", "near"),
    },
}
# Heads and busts have no legs: motions on legs are replaced by added and spins.
_LEG_MOTIONS = frozenset({"walk", "run", "near", "away", "idle"})
_HEAD_MOTIONS = ("hop", "jump", "spin")
# Nouns with motions beyond those of their kind.
_SWIMMING_NOUNS = frozenset(
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
_FLOATING_NOUNS = frozenset({"duck", "swan", "goose", "seal", "turtle"})


def motions_for(key: str, kind: str, medium: str, whole: bool) -> tuple[str, ...]:
    """List the motions of a noun in a medium; heads and busts (`whole` false) never walk."""
    if medium == "deep" and key in _SWIMMING_NOUNS:
        return ("swim", "hover")
    if medium == "water" and key in _FLOATING_NOUNS:
        return _SURFACE_MOTIONS
    if key == "balloon":
        return ("rise", "float") if medium == "indoors" else ("rise", "drift", "float")
    moves = _TABLE.get(kind, {}).get(medium, ())
    if whole or kind not in ("walker", "person", "runner"):
        return moves
    added = _HEAD_MOTIONS if moves and medium in ("ground", "indoors") else ()
    return tuple(dict.fromkeys((*(move for move in moves if move not in _LEG_MOTIONS), *added)))
