"""Evaluation prompts: captions of scenes outside the training data, with their facts.

Seeds from `FIRST_SEED` on are reserved for evaluation. Prompts are balanced over nouns, places and
directions, so that the place alone predicts the noun as little as possible.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from diorama.world.caption import Facts, captions, facts
from diorama.world.nouns import NOUNS, Noun
from diorama.world.scene import Scene, sample_scene
from diorama.world.subject import choose_action
from diorama.world.vocabulary import Vocabulary
from skyloom.core.errors import RequestError
from skyloom.core.seeds import derive_seed
from skyloom.core.types import VideoShape

FIRST_SEED = 20_000_000
_SEEDS_APART = 100_000
_CANDIDATES = 12
_NATIVE = VideoShape(33, 128, 128)

# words that no caption uses, for nouns that captions do use
SYNONYMS: dict[str, str] = {
    "cat": "kitten", "dog": "puppy", "horse": "stallion", "rabbit": "bunny", "turtle": "terrapin",
    "duck": "duckling", "parrot": "macaw", "car": "sedan", "bus": "coach",
    "motorcycle": "motor scooter", "whale": "orca", "dolphin": "porpoise", "fish": "trout",
    "sailboat": "yacht", "helicopter": "chopper", "airplane": "jet", "rocket": "space shuttle",
    "ufo": "alien spacecraft", "robot": "android", "soccer ball": "football",
    "dragon": "wyvern", "dinosaur": "tyrannosaurus",
}  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """A caption, its facts and its scene; `group` names the part of the evaluation."""

    text: str
    facts: Facts
    scene: Scene
    group: str


def prompts_for(
    vocabulary: Vocabulary,
    count: int,
    seed: int = 0,
    *,
    held_out: bool = False,
    shape: VideoShape = _NATIVE,
    fps: float = 16.0,
    nouns: Mapping[str, Noun] = NOUNS,
) -> list[Prompt]:
    """Return captions of `count` scenes, half with a direction, of seen or held-out pairs."""
    if count < 1:
        raise RequestError(f"count must be >= 1, got {count}.")
    start = FIRST_SEED + (2 * seed + held_out) * _SEEDS_APART
    split = "heldout" if held_out else "train"
    scenes = [
        sample_scene(
            start + index,
            vocabulary,
            frames=shape.frames,
            height=shape.height,
            width=shape.width,
            fps=fps,
            split=split,
            nouns=nouns,
        )
        for index in range(_CANDIDATES * count)
    ]
    group = "held-out pairs" if held_out else "seen pairs"
    return [
        Prompt(captions(scene).medium, facts(scene), scene, group)
        for scene in _balance(scenes, count)
    ]


def _balance(scenes: list[Scene], count: int) -> list[Scene]:
    """Choose scenes greedily by the least frequent noun, pair, place and direction so far.

    Every second one has a direction and about every fourth a colour, if available.
    """
    left = list(scenes)
    taken: list[Scene] = []
    seen: Counter[object] = Counter()
    while len(taken) < count:
        directed = seen["directed"] * 2 <= len(taken)
        fitting = [scene for scene in left if (scene.subjects[0].direction is not None) == directed]
        coloured = seen["coloured"] * 4 <= len(taken)
        fitting = [
            one for one in fitting if (one.subjects[0].colour is not None) == coloured
        ] or fitting
        best = min(fitting or left, key=lambda scene: tuple(seen[key] for key in _keys(scene)))
        seen.update(_keys(best))
        seen["directed"] += best.subjects[0].direction is not None
        seen["coloured"] += best.subjects[0].colour is not None
        left.remove(best)
        taken.append(best)
    return taken


def _keys(scene: Scene) -> tuple[object, ...]:
    first = scene.subjects[0]
    return (
        first.noun,
        (first.noun, scene.place),
        scene.place,
        ("direction", first.direction),
        ("colour", first.colour),
    )


def synonym_prompts(vocabulary: Vocabulary, count: int, seed: int = 0) -> list[Prompt]:
    """Return captions of `count` scenes, each with a seen word and with an unseen synonym."""
    pairs: list[Prompt] = []
    start = FIRST_SEED + (2 * seed + 1) * _SEEDS_APART + _SEEDS_APART // 2
    scenes = [
        sample_scene(start + index, vocabulary, fps=16.0) for index in range(_CANDIDATES * count)
    ]
    named = [scene for scene in scenes if scene.subjects[0].noun in SYNONYMS]
    for scene in _balance(named, count):
        first = scene.subjects[0]
        renamed = replace(
            scene, subjects=(replace(first, name=SYNONYMS[first.noun]), *scene.subjects[1:])
        )
        for variant, group in ((scene, "seen words"), (renamed, "synonyms")):
            pairs.append(Prompt(captions(variant).medium, facts(variant), scene, group))
    return pairs


def two_object_prompts(vocabulary: Vocabulary, count: int, seed: int = 0) -> list[Prompt]:
    """Return captions of `count` scenes with two different subjects."""
    start = FIRST_SEED + (2 * seed + 2) * _SEEDS_APART - _SEEDS_APART // 4
    both = replace(vocabulary, two_objects=1.0)
    scenes = [sample_scene(start + index, both, fps=16.0) for index in range(_CANDIDATES * count)]
    pairs = [scene for scene in scenes if len({subject.noun for subject in scene.subjects}) > 1]
    return [
        Prompt(captions(scene).medium, facts(scene), scene, "two things")
        for scene in _balance(pairs, count)
    ]


def commonest_nouns(
    vocabulary: Vocabulary, draws: int = 6000, nouns: Mapping[str, Noun] = NOUNS
) -> dict[str, str]:
    """Return the most frequent noun of each place: the best guess from the place alone."""
    chance = np.random.default_rng(derive_seed(FIRST_SEED, "commonest"))
    drawn = [choose_action(chance, vocabulary, "train", nouns) for _ in range(draws)]
    counts = Counter((place, noun.key) for noun, place, _ in drawn)
    best: dict[str, str] = {}
    for (place, noun), _ in counts.most_common():
        best.setdefault(place, noun)
    return best
