"""What may be drawn: splits, affordances, and words that must never meet."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diorama.world.caption import facts
from diorama.world.motion import MOTIONS
from diorama.world.nouns import NOUNS
from diorama.world.places import PLACES
from diorama.world.scene import sample_scene
from diorama.world.style import COLOURS
from diorama.world.subject import actions, is_held_out
from diorama.world.vocabulary import FULL, SMALL, VOCABULARIES
from skyloom.core.errors import ConfigError

SEEDS = st.integers(0, 2**62)


def pairs(scene):
    return [
        (subject.noun, other)
        for subject in scene.subjects
        for other in (scene.place, subject.motion)
    ]


@given(SEEDS, st.sampled_from([FULL, SMALL]))
@settings(max_examples=100, deadline=None)
def test_training_never_shows_a_held_out_pair(seed, vocabulary):
    assert not any(
        is_held_out(*pair) for pair in pairs(sample_scene(seed, vocabulary, split="train"))
    )


@given(SEEDS, st.sampled_from([FULL, SMALL]))
@settings(max_examples=100, deadline=None)
def test_the_held_out_split_shows_nothing_else(seed, vocabulary):
    scene = sample_scene(seed, vocabulary, split="heldout")
    for subject in scene.subjects:
        assert is_held_out(subject.noun, scene.place) or is_held_out(subject.noun, subject.motion)


@pytest.mark.parametrize("vocabulary", [FULL, SMALL], ids=lambda vocabulary: vocabulary.name)
def test_no_noun_is_held_out_whole(vocabulary):
    assert [key for key in vocabulary.nouns if not actions(NOUNS[key], vocabulary, "train")] == []


def test_about_a_tenth_of_all_pairs_is_held_out():
    held = [is_held_out(noun, place) for noun in NOUNS for place in PLACES]
    assert 0.07 < sum(held) / len(held) < 0.13


@given(SEEDS)
@settings(max_examples=120, deadline=None)
def test_no_colour_and_no_size_word_ever_falls_on_a_person(seed):
    for vocabulary in (dataclasses.replace(FULL, coloured=1.0, size_words=1.0), FULL):
        for subject in sample_scene(seed, vocabulary).subjects:
            if NOUNS[subject.noun].person:
                assert subject.colour is None
                assert subject.size_word is None


@given(SEEDS)
@settings(max_examples=100, deadline=None)
def test_a_coloured_noun_has_no_colour_in_its_name(seed):
    subject = sample_scene(seed, dataclasses.replace(FULL, coloured=1.0)).subjects[0]
    assert subject.colour is None or not set(subject.name.split()) & set(COLOURS)


@given(SEEDS)
@settings(max_examples=100, deadline=None)
def test_heads_and_busts_never_walk(seed):
    for subject in sample_scene(seed, FULL).subjects:
        if not NOUNS[subject.noun].whole:
            assert subject.motion not in ("walk", "run")


@given(SEEDS)
@settings(max_examples=100, deadline=None)
def test_the_air_agrees_with_itself(seed):
    scene = sample_scene(seed, dataclasses.replace(FULL, weather=1.0))
    if scene.weather in ("rain", "snow", "fog"):
        assert scene.time_of_day in ("cloudy", "night")
    assert not (scene.weather == "snow" and scene.place == "desert")
    assert (scene.time_of_day is None) == (not PLACES[scene.place].times)


@given(SEEDS, st.sampled_from([(128, 128), (90, 160), (160, 90)]))
@settings(max_examples=100, deadline=None)
def test_directed_subjects_face_and_move_where_they_go(seed, shape):
    for subject in sample_scene(seed, FULL, height=shape[0], width=shape[1]).subjects:
        assert (subject.direction is not None) == MOTIONS[subject.motion].directed
        if subject.direction:
            assert (
                subject.path.sign == subject.facing == (1 if subject.direction == "right" else -1)
            )


def test_the_same_seed_draws_the_same_scene_and_another_seed_another():
    assert sample_scene(3, SMALL) == sample_scene(3, SMALL)
    assert sample_scene(3, SMALL) != sample_scene(4, SMALL)


def test_two_objects_belong_together():
    scenes = [sample_scene(seed, dataclasses.replace(FULL, two_objects=1.0)) for seed in range(200)]
    together = [scene for scene in scenes if len(scene.subjects) > 1]
    assert len(together) > 50
    for scene in together:
        first, second = scene.subjects
        assert first.noun != second.noun
        assert (scene.place, first.motion) in actions(NOUNS[second.noun], FULL, "train")
        assert facts(scene).nouns == (first.noun, second.noun)


def test_an_empty_vocabulary_says_so():
    with pytest.raises(ConfigError, match="no possible action"):
        sample_scene(0, dataclasses.replace(SMALL, nouns=()))


@pytest.mark.parametrize("vocabulary", VOCABULARIES.values(), ids=VOCABULARIES)
def test_vocabularies_name_only_what_exists(vocabulary):
    assert set(vocabulary.places) <= set(PLACES)
    assert set(vocabulary.motions) <= set(MOTIONS)
    assert set(vocabulary.colours) <= set(COLOURS)
