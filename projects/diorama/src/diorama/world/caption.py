"""Captions of a scene in three lengths, and the same facts as structured labels.

Captions are derived from the scene, so they are always correct. Medium and long captions always
state direction and time of day if the scene has them; short ones may omit them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diorama.world.camera import CAMERAS
from diorama.world.light import INDOOR_PHRASES, TIMES
from diorama.world.nouns import article
from diorama.world.places import PLACES
from diorama.world.scene import Scene
from diorama.world.style import COLOURLESS, COLOURS, STYLES
from diorama.world.subject import ALOFT, Subject
from diorama.world.weather import WEATHERS
from skyloom.core.seeds import derive_seed

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
    """Captions of one scene in three lengths."""

    short: str
    medium: str
    long: str


@dataclass(frozen=True)
class Facts:
    """Labels of a scene; `noun` is the key of the first subject."""

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
    """Return the labels of a scene."""
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
    """Write the captions of a scene; its seed determines the choice of words."""
    rng = np.random.default_rng(derive_seed(scene.seed, "caption"))
    writer = _CaptionWriter(scene, rng)
    return Captions(writer.short(), writer.medium(), writer.long())


def name_of(subject: Subject) -> str:
    """Return a subject's noun phrase with article, size and colour: "a tiny red bus"."""
    adjective = " ".join(word for word in (subject.size_word, subject.colour) if word)
    return article(subject.name, adjective or None)


def hour_phrases(scene: Scene) -> tuple[str, ...]:
    """List the caption phrases for a scene's time of day; empty if the scene has none."""
    if scene.time_of_day is None:
        return ()
    if PLACES[scene.place].medium == "indoors":
        return INDOOR_PHRASES[scene.time_of_day]
    return _without_colours(TIMES[scene.time_of_day].phrases, scene.style)


def _without_colours(phrases: tuple[str, ...], style: str | None) -> tuple[str, ...]:
    """Remove phrases with colour words if the style is monochrome."""
    if style not in COLOURLESS:
        return phrases
    return (
        tuple(phrase for phrase in phrases if not set(phrase.split()) & _COLOUR_WORDS)
        or phrases[:1]
    )


class _CaptionWriter:
    """Writes captions; every call of a part draws its wording again."""

    def __init__(self, scene: Scene, rng: np.random.Generator) -> None:
        self.scene = scene
        self.rng = rng
        self.subject = scene.subjects[0]

    def pick(self, options: Sequence[str]) -> str:
        return options[int(self.rng.integers(len(options)))]

    def subjects(self) -> str:
        first = name_of(self.subject)
        rest = self.scene.subjects[1:]
        return f"{first} {self.scene.relation} {name_of(rest[0])}" if rest else first

    def action(self, direction: bool) -> str:
        words = self.subject.verb
        if direction and self.subject.direction:
            words += " " + self.pick(_DIRECTIONS[self.subject.direction])
        return words

    def place(self) -> str:
        place = PLACES[self.scene.place]
        return self.pick(
            place.over if place.over and self.subject.motion in ALOFT else place.phrases
        )

    def time_of_day(self) -> str:
        return self.pick(hour_phrases(self.scene)) if self.scene.time_of_day else ""

    def detail(self) -> str:
        return self.pick(_without_colours(PLACES[self.scene.place].details, self.scene.style))

    def weather(self) -> str:
        return self.pick(WEATHERS[self.scene.weather].phrases) if self.scene.weather else ""

    def auxiliary(self) -> str:
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
        direction = bool(self.rng.random() < 0.4)
        parts = [self.subjects(), self.action(direction), self.place()]
        if self.rng.random() < 0.35:
            parts.append(self.time_of_day())
        return self.styled(_join(parts))

    def medium(self) -> str:
        subjects = self.subjects()
        action = self.action(True)
        place = self.place()
        hour = self.time_of_day()
        weather = self.weather()
        form = int(self.rng.integers(4))
        if self.scene.style:
            sentence = self.styled(_join([subjects, action, place, weather, hour]))
        elif form == 0 and hour:
            sentence = _join([hour + ",", subjects, self.auxiliary(), action, place, weather])
        elif form == 1:
            sentence = _join([subjects, self.auxiliary(), action, place, weather, hour])
        elif form == 2:
            sentence = _join([subjects, action, place, hour, weather])
        else:
            sentence = _join([subjects, place, hour, weather]) + ", " + action
        if self.scene.camera != "static":
            sentence += ", " + self.pick(CAMERAS[self.scene.camera])
        return sentence

    def long(self) -> str:
        opening = _join(
            [
                self.subjects(),
                self.auxiliary(),
                self.action(True),
                self.place(),
                self.weather(),
                self.time_of_day(),
            ]
        )
        if self.scene.style:
            opening = self.styled(
                _join(
                    [
                        self.subjects(),
                        self.action(True),
                        self.place(),
                        self.weather(),
                        self.time_of_day(),
                    ]
                )
            )
        sentences = [opening, self.detail()]
        if self.scene.camera != "static" or self.rng.random() < 0.5:
            sentences.append(self.pick(CAMERAS[self.scene.camera]))
        return " ".join(sentence[0].upper() + sentence[1:] + "." for sentence in sentences)


def _join(parts: Sequence[str]) -> str:
    return " ".join(part for part in parts if part)
