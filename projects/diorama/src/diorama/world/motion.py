"""Motions of a subject: each one is a function from time to a Pose, with its verbs.

Lengths are in half frame heights at the subject's depth, so a path fits frames of any size. `x` is
0 in the middle of the frame; `height` is the distance from the ground to the feet.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from jaxtyping import Float

Curve: TypeAlias = Float[np.ndarray, " t"]


@dataclass(frozen=True)
class Path:
    """Parameters of a subject's motion: size, limits, direction, random phases."""

    size: float
    reach: float  # largest distance between the centres of subject and frame
    headroom: float  # largest rise above the base that stays in the frame
    sign: int  # -1: to the left, 1: to the right
    base: float  # height at rest
    phases: tuple[float, float]  # two random numbers in [0, 1)
    animated: bool = True
    buoyant: float = 0.0  # depth below the water line, as a fraction of the size


@dataclass
class Pose:
    """Pose of a subject at each time.

    `depth` multiplies its distance; `roll` is counterclockwise, in radians; `pace` multiplies the
    speed of its animation.
    """

    x: Curve
    height: Curve
    depth: Curve
    scale: Curve
    roll: Curve
    stretch_x: Curve
    stretch_y: Curve
    pace: float = 1.0


_IRREVERSIBLE = ("fall",)  # motions without a reverse
Move: TypeAlias = Callable[[Pose, Path, Curve, Curve], None]


@dataclass(frozen=True)
class Motion:
    """A motion function with its verbs.

    `verbs` maps a kind of noun to gerunds; "" is the default. `directed` motions go left or right.
    `tail` holds phrases appended to the verb.
    """

    move: Move
    verbs: Mapping[str, tuple[str, ...]]
    directed: bool = False
    tail: tuple[str, ...] = field(default=())

    def verbs_for(self, kind: str) -> tuple[str, ...]:
        """Return the gerunds for a kind of noun."""
        return self.verbs.get(kind, self.verbs[""])


def pose_at(motion: str, path: Path, times: Curve, duration: float) -> Pose:
    """Compute the pose at each of `times` (seconds); one act of the motion takes `duration`.

    In longer scenes the motion alternates between forward and reverse; motions without a reverse
    stay at their end.
    """
    still = np.zeros_like(times)
    one = np.ones_like(times)
    base = path.base - path.buoyant * path.size
    pose = Pose(
        still.copy(), base + still, one.copy(), one.copy(), still.copy(), one.copy(), one.copy()
    )
    acts = times / duration
    MOTIONS[motion].move(
        pose, path, times, acts.clip(max=1) if motion in _IRREVERSIBLE else there_and_back(acts)
    )
    if MOTIONS[motion].directed:
        pose.stretch_x = np.where(_is_reverse(acts), -pose.stretch_x, pose.stretch_x)
    return pose


def there_and_back(acts: Curve) -> Curve:
    """Map a number of acts to progress in [0, 1]: rising in odd acts, falling in even ones."""
    return np.where(acts <= 1, acts, 1 - np.abs(1 - acts % 2))


def _is_reverse(acts: Curve) -> np.ndarray:
    return (acts > 1) & (acts % 2 > 1)


def _travel(pose: Pose, path: Path, progress: Curve) -> None:
    reach = path.reach * (0.88 + 0.12 * path.phases[0])
    pose.x += path.sign * (2 * progress - 1) * reach


def _hops(times: Curve, rate: float) -> Curve:
    beat = (times * rate) % 1
    return 4 * beat * (1 - beat)


def _squash(pose: Pose, path: Path, hop: Curve) -> None:
    landing = np.exp(-hop / 0.08)
    pose.stretch_y *= 1 - 0.16 * landing
    pose.stretch_x *= 1 + 0.13 * landing


def _walk(pose: Pose, path: Path, times: Curve, progress: Curve) -> None:
    _travel(pose, path, progress)
    if not path.animated:
        pose.roll += 0.08 * np.sin(times * 8)
        pose.height += 0.05 * path.size * np.abs(np.sin(times * 8))


def _run(pose: Pose, path: Path, times: Curve, progress: Curve) -> None:
    _travel(pose, path, progress)
    pose.pace = 1.8
    pose.height += 0.06 * path.size * np.abs(np.sin(times * 10))
    pose.roll += 0.05 * np.sin(times * 10)


def _hop(pose: Pose, path: Path, times: Curve, progress: Curve) -> None:
    _travel(pose, path, progress)
    hop = _hops(times, 1.5)
    pose.height += hop * min(path.headroom, 0.35 * path.size)
    _squash(pose, path, hop)


def _drive(pose: Pose, path: Path, times: Curve, progress: Curve) -> None:
    _travel(pose, path, progress)
    pose.height += 0.008 * np.sin(times * 15)


def _fly(pose: Pose, path: Path, times: Curve, progress: Curve) -> None:
    _travel(pose, path, progress)
    pose.height += 0.08 * np.sin(times * 2.6 + 6.28 * path.phases[1])


def _swim(pose: Pose, path: Path, times: Curve, progress: Curve) -> None:
    _travel(pose, path, progress)
    pose.height += 0.07 * np.sin(times * 2.6 + 6.28 * path.phases[1])
    pose.roll += 0.06 * np.sin(times * 4)


def _sail(pose: Pose, path: Path, times: Curve, progress: Curve) -> None:
    _travel(pose, path, progress)
    _bob(pose, path, times, progress)


def _bob(pose: Pose, path: Path, times: Curve, progress: Curve) -> None:
    pose.height += 0.03 * np.sin(times * 2.4 + 6.28 * path.phases[1])
    pose.roll += 0.06 * np.sin(times * 2.1 + 6.28 * path.phases[0])


def _roll(pose: Pose, path: Path, times: Curve, progress: Curve) -> None:
    _travel(pose, path, progress)
    pose.roll -= pose.x / (0.42 * path.size)


def _slide(pose: Pose, path: Path, times: Curve, progress: Curve) -> None:
    _travel(pose, path, progress)


def _bounce_along(pose: Pose, path: Path, times: Curve, progress: Curve) -> None:
    _travel(pose, path, progress)
    hop = _hops(times, 1.3)
    pose.height += hop * min(path.headroom, 0.8)
    pose.roll -= pose.x * 1.2
    _squash(pose, path, hop)


def _drift(pose: Pose, path: Path, times: Curve, progress: Curve) -> None:
    _travel(pose, path, progress)
    pose.height += 0.05 * np.sin(times * 2)
    pose.roll += 0.18 * np.sin(times * 1.6 + 6.28 * path.phases[1])


def _arc(pose: Pose, path: Path, times: Curve, progress: Curve) -> None:
    _travel(pose, path, progress)
    rise = min(path.headroom, 0.45)
    pose.height += rise * (8 * progress * (1 - progress) - 1)
    pose.roll += path.sign * 0.4 * (1 - 2 * progress)


def _leap(pose: Pose, path: Path, times: Curve, progress: Curve) -> None:
    _travel(pose, path, progress)
    top = min(0.45, path.headroom)
    pose.height += -0.75 * path.size + 4 * progress * (1 - progress) * (0.75 * path.size + top)
    pose.roll += path.sign * 0.8 * (1 - 2 * progress)


def _idle(pose: Pose, path: Path, times: Curve, progress: Curve) -> None:
    return


def _jump(pose: Pose, path: Path, times: Curve, progress: Curve) -> None:
    hop = _hops(times + path.phases[0], 1.2)
    pose.height += hop * min(path.headroom, 0.5 * path.size)
    _squash(pose, path, hop)


def _bounce(pose: Pose, path: Path, times: Curve, progress: Curve) -> None:
    hop = _hops(times + path.phases[0], 1.1)
    pose.height += hop * min(path.headroom, 0.85)
    _squash(pose, path, hop)


def _spin(pose: Pose, path: Path, times: Curve, progress: Curve) -> None:
    pose.roll += 6.28 * (path.sign * times * 0.5 + path.phases[0])
    pose.height += 0.12


def _turn(pose: Pose, path: Path, times: Curve, progress: Curve) -> None:
    face = np.cos(np.pi * (times * 0.8 + path.phases[0]))
    pose.stretch_x *= np.where(np.abs(face) < 0.12, np.where(face < 0, -0.12, 0.12), face)
    pose.height += 0.1


def _hover(pose: Pose, path: Path, times: Curve, progress: Curve) -> None:
    pose.height += 0.10 * np.sin(times * 2.6 + 6.28 * path.phases[0])
    pose.roll += 0.05 * np.sin(times * 2.2)


def _float(pose: Pose, path: Path, times: Curve, progress: Curve) -> None:
    pose.height += 0.12 + 0.08 * np.sin(times * 1.7 + 6.28 * path.phases[0])
    pose.roll += 0.2 * np.sin(times * 1.5 + 6.28 * path.phases[1])


def _rise(pose: Pose, path: Path, times: Curve, progress: Curve) -> None:
    pose.height += path.headroom * progress
    pose.roll += 0.06 * np.sin(times * 2)


def _fall(pose: Pose, path: Path, times: Curve, progress: Curve) -> None:
    pose.height += (path.headroom + 0.5 * path.size) * (1 - np.minimum(1, progress / 0.8) ** 2)
    pose.roll += (path.phases[0] - 0.5) * 2 * np.maximum(0, 1 - progress / 0.8)


def _sink(pose: Pose, path: Path, times: Curve, progress: Curve) -> None:
    pose.height += path.headroom * (1 - progress)
    pose.roll += 0.25 * np.sin(times * 1.4 + 6.28 * path.phases[1])


def _near(pose: Pose, path: Path, times: Curve, progress: Curve) -> None:
    ease = progress * progress * (3 - 2 * progress)
    pose.depth *= 1.9 / (1 + ease)
    _rock(pose, path, times)


def _away(pose: Pose, path: Path, times: Curve, progress: Curve) -> None:
    _near(pose, path, times, 1 - progress)


def _rock(pose: Pose, path: Path, times: Curve) -> None:
    if path.base < 0.1 and not path.animated:
        pose.roll += 0.06 * np.sin(times * 8)


def _dance(pose: Pose, path: Path, times: Curve, progress: Curve) -> None:
    pose.roll += 0.24 * np.sin(times * 6.28)
    pose.x += 0.16 * np.sin(times * 3.14)
    pose.height += 0.10 * _hops(times, 2)


def _grow(pose: Pose, path: Path, times: Curve, progress: Curve) -> None:
    pose.scale *= 0.3 + 0.7 * progress


def _shrink(pose: Pose, path: Path, times: Curve, progress: Curve) -> None:
    _grow(pose, path, times, 1 - progress)


def _circle(pose: Pose, path: Path, times: Curve, progress: Curve) -> None:
    angle = 6.28 * (times * 0.5 + path.phases[0])
    pose.x += min(path.reach, 0.55) * np.cos(angle)
    pose.depth *= 1.15 + 0.25 * np.sin(angle)
    # The sprite faces left; it moves to the left where the sine is positive.
    turn = np.sin(angle)
    pose.stretch_x *= (
        np.where(np.abs(turn) < 0.2, np.where(turn < 0, -0.2, 0.2), turn).clip(-0.7, 0.7) / 0.7
    )


def _take_off(pose: Pose, path: Path, times: Curve, progress: Curve) -> None:
    pose.height += path.headroom * 1.3 * progress**2 - path.base
    pose.x += 0.01 * np.sin(times * 30)


def _sway(pose: Pose, path: Path, times: Curve, progress: Curve) -> None:
    pose.roll += 0.10 * np.sin(times * 3 + 6.28 * path.phases[0])


_DEPART_PHRASES = (" into the distance", " away from the camera", " away")
_APPROACH_PHRASES = (" toward the camera", " towards us", " closer and closer")
_TRAVEL_VERBS = {
    "": ("moving",), "walker": ("walking", "running"), "person": ("walking",),
    "runner": ("running",), "car": ("driving",), "boat": ("sailing",), "aircraft": ("flying",),
    "flyer": ("flying",), "swimmer": ("swimming",), "ball": ("rolling",),
}  # fmt: skip

MOTIONS: dict[str, Motion] = {
    "walk": Motion(_walk, {"": ("walking", "strolling", "wandering")}, directed=True),
    "run": Motion(_run, {"": ("running", "racing", "dashing")}, directed=True),
    "hop": Motion(_hop, {"": ("hopping", "bouncing along", "jumping along")}, directed=True),
    "drive": Motion(_drive, {"": ("driving", "rolling", "cruising")}, directed=True),
    "fly": Motion(
        _fly,
        {"": ("flying", "soaring", "gliding"), "aircraft": ("flying", "cruising"),
         "person": ("flying",)},
        directed=True,
    ),
    "swim": Motion(_swim, {"": ("swimming", "gliding")}, directed=True),
    "sail": Motion(
        _sail,
        {"": ("floating", "drifting", "swimming"), "boat": ("sailing", "cruising", "gliding"),
         "object": ("floating", "drifting"), "ball": ("floating", "drifting"),
         "food": ("floating", "drifting")},
        directed=True,
    ),
    "roll": Motion(_roll, {"": ("rolling", "rolling along", "tumbling")}, directed=True),
    "slide": Motion(_slide, {"": ("sliding", "gliding", "moving")}, directed=True),
    "bounce along": Motion(_bounce_along, {"": ("bouncing", "bouncing along")}, directed=True),
    "drift": Motion(_drift, {"": ("drifting", "floating")}, directed=True),
    "arc": Motion(
        _arc,
        {"": ("swooping", "flying in an arc"),
         "swimmer": ("swimming in an arc", "diving in a curve")},
        directed=True,
    ),
    "leap": Motion(
        _leap, {"": ("leaping", "jumping high", "leaping into the air")}, directed=True
    ),
    "idle": Motion(
        _idle,
        {"": ("resting", "standing still"), "walker": ("standing", "standing still", "waiting"),
         "person": ("standing", "standing still"), "car": ("parked", "standing still"),
         "object": ("standing still", "resting"), "ball": ("resting", "lying still"),
         "food": ("resting",), "building": ("standing",), "plant": ("growing", "standing")},
    ),
    "bob": Motion(_bob, {"": ("bobbing", "floating", "bobbing up and down")}),
    "jump": Motion(_jump, {"": ("jumping", "jumping up and down", "leaping up and down")}),
    "bounce": Motion(_bounce, {"": ("bouncing", "bouncing up and down")}),
    "spin": Motion(_spin, {"": ("spinning", "rotating", "spinning around")}),
    "turn": Motion(_turn, {"": ("turning around", "revolving", "spinning like a coin")}),
    "hover": Motion(
        _hover, {"": ("hovering", "floating in place"), "swimmer": ("floating", "hovering")}
    ),
    "float": Motion(_float, {"": ("floating", "hovering", "floating gently")}),
    "rise": Motion(_rise, {"": ("rising", "floating up", "rising up")}),
    "fall": Motion(_fall, {"": ("falling down", "dropping down", "falling from above")}),
    "sink": Motion(_sink, {"": ("sinking", "slowly sinking")}),
    "near": Motion(_near, _TRAVEL_VERBS, tail=_APPROACH_PHRASES),
    "away": Motion(_away, _TRAVEL_VERBS, tail=_DEPART_PHRASES),
    "dance": Motion(_dance, {"": ("dancing", "wiggling", "dancing around")}),
    "grow": Motion(_grow, {"": ("growing", "growing bigger", "getting bigger")}),
    "shrink": Motion(_shrink, {"": ("shrinking", "getting smaller")}),
    "circle": Motion(
        _circle,
        {"": ("flying in circles", "circling around"),
         "swimmer": ("swimming in circles", "circling around")},
    ),
    "take off": Motion(_take_off, {"": ("taking off", "lifting off", "launching into the air")}),
    "sway": Motion(_sway, {"": ("swaying", "swaying gently")}),
}  # fmt: skip
