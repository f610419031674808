"""Sentences for a scene, in three lengths, true by construction; and the same facts as data.

Medium and long sentences always say direction and hour where there are any; short ones may leave them out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from skyloom.core.seeds import derive_seed
from skyloom.world.camera import CAMERAS
from skyloom.world.light import INDOOR_PHRASES, TIMES
from skyloom.world.nouns import article
from skyloom.world.places import PLACES
from skyloom.world.scene import Scene
from skyloom.world.style import COLOURLESS, COLOURS, STYLES
from skyloom.world.subject import ALOFT, Subject
from skyloom.world.weather import WEATHERS

_DIRECTIONS = {
    "left": (
        "to the left",
        "from right to left",
        "toward the left",
        "leftward",
        "to the left side",
    ),
    "right": (
        "to the right",
        "from left to right",
        "toward the right",
        "rightward",
        "to the right side",
    ),
}

_COLOUR_WORDS = frozenset(COLOURS) - {"white", "black"} | {"mint", "colorful"}


@dataclass(frozen=True)
class Captions:
    """One scene in three lengths."""

    short: str
    medium: str
    long: str


@dataclass(frozen=True)
class Facts:
    """What a caption says, as data; `noun` is the key of the first subject."""

    noun: str
    place: str
    time_of_day: str | None
    direction: str | None
    colour: str | None
    motion: str
    camera: str
    weather: str | None
    style: str | None
    nouns: tuple[str, ...]


def facts(scene: Scene) -> Facts:
    """What is true of a scene."""
    first = scene.subjects[0]
    return Facts(
        noun=first.noun,
        place=scene.place,
        time_of_day=scene.time_of_day,
        direction=first.direction,
        colour=first.colour,
        motion=first.motion,
        camera=scene.camera,
        weather=scene.weather,
        style=scene.style,
        nouns=tuple(subject.noun for subject in scene.subjects),
    )


def captions(scene: Scene) -> Captions:
    """Say a scene in three lengths; the scene's seed chooses the words."""
    chance = np.random.default_rng(derive_seed(scene.seed, "caption"))
    words = _Words(scene, chance)
    return Captions(words.short(), words.medium(), words.long())


def name_of(subject: Subject) -> str:
    """A subject with its article, size and colour: "a tiny red bus"."""
    adjective = " ".join(word for word in (subject.size_word, subject.colour) if word)
    return article(subject.name, adjective or None)


def hour_phrases(scene: Scene) -> tuple[str, ...]:
    """What can be said of a scene's hour; nothing where there is none."""
    if scene.time_of_day is None:
        return ()
    if PLACES[scene.place].medium == "indoors":
        return INDOOR_PHRASES[scene.time_of_day]
    return _seen(TIMES[scene.time_of_day].phrases, scene.style)


def _seen(phrases: tuple[str, ...], style: str | None) -> tuple[str, ...]:
    """Without colour words if the style has no colours."""
    if style not in COLOURLESS:
        return phrases
    return (
        tuple(phrase for phrase in phrases if not set(phrase.split()) & _COLOUR_WORDS)
        or phrases[:1]
    )


class _Words:
    """The parts of a sentence, each drawn anew when asked for."""

    def __init__(self, scene: Scene, chance: np.random.Generator) -> None:
        self.scene, self.chance = scene, chance
        self.subject = scene.subjects[0]

    def pick(self, options: Sequence[str]) -> str:
        return options[int(self.chance.integers(len(options)))]

    def who(self) -> str:
        first, rest = name_of(self.subject), self.scene.subjects[1:]
        return f"{first} {self.scene.relation} {name_of(rest[0])}" if rest else first

    def act(self, direction: bool) -> str:
        words = self.subject.verb
        if direction and self.subject.direction:
            words += " " + self.pick(_DIRECTIONS[self.subject.direction])
        return words

    def where(self) -> str:
        place = PLACES[self.scene.place]
        return self.pick(
            place.over if place.over and self.subject.motion in ALOFT else place.phrases
        )

    def when(self) -> str:
        return self.pick(hour_phrases(self.scene)) if self.scene.time_of_day else ""

    def detail(self) -> str:
        return self.pick(_seen(PLACES[self.scene.place].details, self.scene.style))

    def weather(self) -> str:
        return self.pick(WEATHERS[self.scene.weather].phrases) if self.scene.weather else ""

    def be(self) -> str:
        plural = self.scene.relation == "and" or name_of(self.subject).split()[0] not in (
            "a",
            "an",
            "the",
        )
        return "are" if plural and self.scene.relation == "and" else "is"

    def styled(self, sentence: str) -> str:
        return (
            f"{self.pick(STYLES[self.scene.style][1])} {sentence}" if self.scene.style else sentence
        )

    def short(self) -> str:
        direction = bool(self.chance.random() < 0.4)
        parts = [self.who(), self.act(direction), self.where()]
        if self.chance.random() < 0.35:
            parts.append(self.when())
        return self.styled(_join(parts))

    def medium(self) -> str:
        who, act, where, when, weather = (
            self.who(),
            self.act(True),
            self.where(),
            self.when(),
            self.weather(),
        )
        form = int(self.chance.integers(4))
        if self.scene.style:
            sentence = self.styled(_join([who, act, where, weather, when]))
        elif form == 0 and when:
            sentence = _join([when + ",", who, self.be(), act, where, weather])
        elif form == 1:
            sentence = _join([who, self.be(), act, where, weather, when])
        elif form == 2:
            sentence = _join([who, act, where, when, weather])
        else:
            sentence = _join([who, where, when, weather]) + ", " + act
        if self.scene.camera != "static":
            sentence += ", " + self.pick(CAMERAS[self.scene.camera])
        return sentence

    def long(self) -> str:
        opening = _join(
            [self.who(), self.be(), self.act(True), self.where(), self.weather(), self.when()]
        )
        if self.scene.style:
            opening = self.styled(
                _join([self.who(), self.act(True), self.where(), self.weather(), self.when()])
            )
        sentences = [opening, self.detail()]
        if self.scene.camera != "static" or self.chance.random() < 0.5:
            sentences.append(self.pick(CAMERAS[self.scene.camera]))
        return " ".join(sentence[0].upper() + sentence[1:] + "." for sentence in sentences)


def _join(parts: Sequence[str]) -> str:
    return " ".join(part for part in parts if part)
