"""The table of nouns: complete, unambiguous, and said with good grammar."""

import pytest

from diorama.world.nouns import KINDS, NOUNS, article
from diorama.world.places import PLACES
from diorama.world.vocabulary import SMALL

COLOURS = {"red", "blue", "green", "yellow", "purple", "pink", "black", "white"}


def test_the_table_is_large_and_has_heroes() -> None:
    assert 280 <= len(NOUNS) <= 330
    assert 100 <= sum(noun.hero for noun in NOUNS.values()) <= 140
    assert sum(noun.animated for noun in NOUNS.values()) > 150


def test_every_noun_is_complete() -> None:
    for noun in NOUNS.values():
        assert noun.names and all(name == name.strip().lower() for name in noun.names), noun
        assert noun.kind in KINDS, noun
        assert noun.facing in ("left", "right", "none"), noun
        assert all(0x23 <= int(code, 16) <= 0x1FAFF for code in noun.emoji.split("-")), noun
        assert -90 <= noun.tilt <= 90, noun
        assert not (noun.tilt and noun.facing == "none"), (
            f"what points somewhere faces somewhere: {noun}"
        )


def test_a_name_means_one_noun() -> None:
    names = [name for noun in NOUNS.values() for name in noun.names]
    assert len(names) == len(set(names))
    assert len({noun.emoji for noun in NOUNS.values()}) == len(NOUNS)


def test_every_kind_is_used() -> None:
    assert {noun.kind for noun in NOUNS.values()} == set(KINDS)


def test_nouns_of_the_scenes_are_there() -> None:
    wanted = {*SMALL.nouns, *(prop for place in PLACES.values() for prop in place.props)}
    assert wanted <= set(NOUNS)


def test_people_are_marked_and_unpainted() -> None:
    people = {key for key, noun in NOUNS.items() if noun.person}
    assert {"man", "woman", "astronaut", "fairy", "mermaid", "runner", "old woman"} <= people
    assert not {"cat", "car", "snowman", "robot"} & people
    words = {word for key in people for name in NOUNS[key].names for word in name.split()}
    assert not words & COLOURS


def test_no_skin_tones_and_no_flags() -> None:
    codes = [int(code, 16) for noun in NOUNS.values() for code in noun.emoji.split("-")]
    assert not [code for code in codes if 0x1F3FB <= code <= 0x1F3FF or 0x1F1E6 <= code <= 0x1F1FF]


def test_heads_and_fixed_poses_never_walk() -> None:
    assert not any(
        NOUNS[key].whole for key in ("lion", "panda", "astronaut", "alien", "dancer", "robot")
    )
    assert all(NOUNS[key].whole for key in ("cat", "tiger", "dinosaur", "man", "penguin"))


@pytest.mark.parametrize(
    ("name", "adjective", "phrase"),
    [
        ("octopus", None, "an octopus"),
        ("unicorn", None, "a unicorn"),
        ("ufo", None, "a ufo"),
        ("umbrella", None, "an umbrella"),
        ("hourglass", None, "an hourglass"),
        ("house", None, "a house"),
        ("airplane", "red", "a red airplane"),
        ("car", "orange", "an orange car"),
        ("ufo", "ancient", "an ancient ufo"),
        ("scissors", None, "a pair of scissors"),
        ("scissors", "blue", "a pair of blue scissors"),
        ("books", None, "a stack of books"),
        ("fries", None, "a box of fries"),
        ("popcorn", None, "popcorn"),
        ("popcorn", "purple", "purple popcorn"),
        ("santa claus", None, "santa claus"),
        ("something unlisted", None, "a something unlisted"),
    ],
)
def test_articles(name: str, adjective: str | None, phrase: str) -> None:
    assert article(name, adjective) == phrase


def test_plural_nouns_have_a_measure() -> None:
    plural = {key for key, noun in NOUNS.items() if noun.plural}
    assert {"scissors", "sunglasses", "books", "pancakes"} <= plural
    assert not {"cat", "popcorn"} & plural
    assert all(article(name).startswith("a ") for key in plural for name in NOUNS[key].names)
