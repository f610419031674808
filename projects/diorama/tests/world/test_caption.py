"""Sentences say what is true, and nothing else."""

import dataclasses
import re

from hypothesis import given, settings
from hypothesis import strategies as st

from diorama.world.camera import CAMERAS
from diorama.world.caption import captions, facts, hour_phrases
from diorama.world.light import TIMES
from diorama.world.nouns import NOUNS
from diorama.world.places import PLACES
from diorama.world.scene import sample_scene
from diorama.world.style import COLOURS, STYLES
from diorama.world.vocabulary import FULL, SMALL
from diorama.world.weather import WEATHERS

SEEDS = st.integers(0, 2**62)
EAGER = dataclasses.replace(FULL, weather=0.6, style=0.4, coloured=0.7, two_objects=0.4)


def says(sentence, phrases):
    return any(phrase.lower() in sentence.lower() for phrase in phrases)


@given(SEEDS, st.sampled_from([EAGER, SMALL]))
@settings(max_examples=120, deadline=None)
def test_medium_and_long_say_every_fact(seed, vocabulary):
    scene = sample_scene(seed, vocabulary)
    fact, words = facts(scene), captions(scene)
    place = PLACES[fact.place]
    for sentence in (words.medium, words.long):
        assert all(says(sentence, NOUNS[noun].names) for noun in fact.nouns)
        assert says(sentence, place.phrases + place.over)
        assert says(sentence, [scene.subjects[0].verb])
        if fact.time_of_day:
            assert says(sentence, hour_phrases(scene))
        if fact.direction:
            assert fact.direction in sentence
        if fact.colour:
            assert fact.colour in sentence
        if fact.weather:
            assert says(sentence, WEATHERS[fact.weather].phrases)
        if fact.style:
            assert says(sentence, STYLES[fact.style][1])
        if fact.camera != "static":
            assert says(sentence, CAMERAS[fact.camera])


@given(SEEDS)
@settings(max_examples=120, deadline=None)
def test_no_sentence_says_what_is_not_there(seed):
    scene = sample_scene(seed, dataclasses.replace(SMALL, coloured=0.5, cameras=("static",)))
    fact = facts(scene)
    for sentence in dataclasses.astuple(captions(scene)):
        spoken = set(re.findall(r"[a-z]+", sentence.lower()))
        if not fact.direction:
            assert not spoken & {"left", "right", "leftward", "rightward"}
        for name, noun in NOUNS.items():
            if noun.kind in ("car", "boat") and name != fact.noun and name in SMALL.nouns:
                assert name not in spoken
        for hour, light in TIMES.items():
            if hour != fact.time_of_day:
                assert not any(f" {phrase}" in f" {sentence.lower()}" for phrase in light.phrases)


@given(SEEDS, st.sampled_from([EAGER, SMALL]))
@settings(max_examples=120, deadline=None)
def test_sentences_are_clean(seed, vocabulary):
    for sentence in dataclasses.astuple(captions(sample_scene(seed, vocabulary))):
        assert "  " not in sentence
        assert " ," not in sentence
        assert sentence == sentence.strip()
        assert not re.search(r"\b[Aa] [aeio]", sentence)
        assert not re.search(r"\b[Aa]n (?!suv)[^aeiou8h]", sentence)
        assert not re.search(r"\b(\w+) \1\b", sentence)


def test_sentences_grow_and_vary():
    words = [captions(sample_scene(seed, SMALL)) for seed in range(300)]
    short, medium, long = (
        sum(len(w) for w in column) for column in zip(*map(dataclasses.astuple, words), strict=True)
    )
    assert short < medium < long
    assert len({w.medium for w in words}) > 280


def test_persons_are_never_painted_in_words():
    for seed in range(600):
        scene = sample_scene(seed, dataclasses.replace(FULL, coloured=1.0, weather=0.0))
        if NOUNS[scene.subjects[0].noun].person and len(scene.subjects) == 1:
            name = scene.subjects[0].name
            before = captions(scene).medium.split(name)[0].split()[-2:]
            assert not set(before) & set(COLOURS)


def test_colourless_styles_say_no_colour():
    for seed in range(300):
        scene = sample_scene(seed, dataclasses.replace(FULL, style=1.0, coloured=1.0))
        if scene.style == "vintage":
            spoken = set(re.findall(r"[a-z]+", captions(scene).long.lower()))
            assert not spoken & {
                "green",
                "blue",
                "orange",
                "pink",
                "red",
                "yellow",
                "purple",
            } - set(word for subject in scene.subjects for word in subject.name.split())
