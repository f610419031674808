"""Prompts: balanced, of the right split, with synonyms that no caption uses."""

from collections import Counter

import pytest

from diorama.evaluate.prompts import (
    SYNONYMS,
    commonest_nouns,
    prompts_for,
    synonym_prompts,
    two_object_prompts,
)
from diorama.world.nouns import NOUNS
from diorama.world.subject import is_held_out
from diorama.world.vocabulary import DIORAMA, SMALL
from skyloom.core.errors import RequestError


def held(noun: str, place: str, motion: str) -> bool:
    return is_held_out(noun, place) or is_held_out(noun, motion)


@pytest.mark.parametrize("held_out", [False, True])
def test_pairs_are_of_the_requested_split(held_out: bool):
    prompts = prompts_for(SMALL, 20, held_out=held_out)
    assert len({prompt.text for prompt in prompts}) == 20
    for prompt in prompts:
        assert held(prompt.facts.noun, prompt.facts.place, prompt.facts.motion) == held_out


def test_nouns_places_and_directions_come_equally_often():
    prompts = prompts_for(SMALL, 2 * len(SMALL.nouns))
    nouns = Counter(prompt.facts.noun for prompt in prompts)
    places = Counter(prompt.facts.place for prompt in prompts)
    directions = Counter(prompt.facts.direction for prompt in prompts)
    assert set(nouns) == set(SMALL.nouns)
    assert max(nouns.values()) <= 3
    assert max(places.values()) - min(places.values()) <= 5
    assert abs(directions["left"] - directions["right"]) <= 4
    assert directions[None] == len(prompts) / 2


def test_the_same_seed_gives_the_same_prompts_and_another_seed_others():
    first = [prompt.text for prompt in prompts_for(SMALL, 8, 3)]
    assert first == [prompt.text for prompt in prompts_for(SMALL, 8, 3)]
    assert not set(first) & {prompt.text for prompt in prompts_for(SMALL, 8, 4)}


def test_no_prompts_is_an_error():
    with pytest.raises(RequestError, match="count must be >= 1, got 0"):
        prompts_for(SMALL, 0)


def test_synonyms_are_in_no_caption():
    known = {word for noun in NOUNS.values() for name in noun.names for word in name.split()}
    used = {word for synonym in SYNONYMS.values() for word in synonym.split()}
    assert set(SYNONYMS) <= set(SMALL.nouns)
    assert not used & {
        word for key in SMALL.nouns for name in NOUNS[key].names for word in name.split()
    }
    assert not set(SYNONYMS.values()) & {name for key in SMALL.nouns for name in NOUNS[key].names}
    assert known


def test_a_synonym_replaces_the_seen_word():
    prompts = synonym_prompts(SMALL, 6)
    for seen, renamed in zip(prompts[::2], prompts[1::2], strict=True):
        assert (seen.group, renamed.group) == ("seen words", "synonyms")
        assert seen.facts == renamed.facts
        assert SYNONYMS[seen.facts.noun] in renamed.text
        assert renamed.text != seen.text


def test_the_commonest_noun_of_a_place_is_one_that_training_shows_there():
    best = commonest_nouns(SMALL, draws=800)
    assert set(best) == set(SMALL.places)
    assert not any(is_held_out(noun, place) for place, noun in best.items())


def test_two_things_are_two_and_both_are_named():
    prompts = two_object_prompts(DIORAMA, 6)
    assert len(prompts) == 6
    for prompt in prompts:
        assert len(set(prompt.facts.nouns)) == 2
        for subject in prompt.scene.subjects:
            assert subject.name in prompt.text
