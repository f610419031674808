"""Shares and their floors, against counting by hand."""

from itertools import permutations

import pytest
import torch

from skyloom.evaluate.adherence import COMMONEST, SAME_PLACE, SHUFFLED, Answer, floors, judge
from skyloom.evaluate.probe import Reading
from skyloom.evaluate.prompts import Prompt, prompts_for
from skyloom.evaluate.report import Row
from skyloom.world.vocabulary import SMALL


def saying(noun: str, prompt: Prompt, direction: str = "none") -> Reading:
    facts = prompt.facts
    features = torch.zeros(1, 4)
    return Reading(noun, facts.place, "day", "none", direction, (noun, *SMALL.nouns), features)


@pytest.fixture
def answers() -> list[Answer]:
    prompts = prompts_for(SMALL, 6)
    said = [prompts[0], prompts[1], prompts[0], prompts[5], prompts[3], prompts[2]]
    return [
        Answer(mine, (saying(yours.facts.noun, mine),))
        for mine, yours in zip(prompts, said, strict=True)
    ]


def share(rows: list[Row], category: str, source: str) -> Row:
    return next(row for row in rows if (row.category, row.source) == (category, source))


def test_right_nouns_are_counted(answers: list[Answer]):
    row = share(judge(answers, "generated"), "noun", "generated")
    assert row.share.value == pytest.approx(2 / 6)
    assert row.share.cases == 6


def test_direction_is_asked_only_where_the_prompt_has_one(answers: list[Answer]):
    rows = judge(answers, "generated")
    directed = sum(answer.prompt.facts.direction is not None for answer in answers)
    assert share(rows, "direction", "generated").share.cases == directed
    assert share(rows, "direction", "generated").share.value == 0
    assert share(rows, "no direction", "generated").share.value == 1


def test_the_shuffled_floor_is_the_mean_over_all_permutations(answers: list[Answer]):
    truths = [answer.prompt.facts.noun for answer in answers]
    said = [answer.readings[0].noun for answer in answers]
    scores = [
        sum(a == b for a, b in zip(truths, order, strict=True)) / len(truths)
        for order in permutations(said)
    ]
    floor = share(floors(answers, {}), "noun", SHUFFLED).share.value
    assert floor == pytest.approx(sum(scores) / len(scores))


def test_one_who_says_the_same_noun_everywhere_is_at_its_floor(answers: list[Answer]):
    noun = answers[0].prompt.facts.noun
    stubborn = [Answer(answer.prompt, (saying(noun, answer.prompt),)) for answer in answers]
    rows = floors(stubborn, {prompt.prompt.facts.place: noun for prompt in answers})
    reached = share(judge(stubborn, "generated"), "noun", "generated").share.value
    assert share(rows, "noun", SHUFFLED).share.value == pytest.approx(reached)
    assert share(rows, "noun", COMMONEST).share.value == pytest.approx(reached)
    assert share(rows, "noun", SAME_PLACE).share.cases == 6
