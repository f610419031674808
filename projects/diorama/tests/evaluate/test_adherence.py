"""Accuracies and chance baselines, against counting by hand."""

from itertools import permutations

import pytest
import torch

from diorama.evaluate.adherence import (
    COMMONEST,
    SAME_PLACE,
    SHUFFLED,
    PromptResult,
    accuracies,
    chance_baselines,
)
from diorama.evaluate.prompts import Prompt, prompts_for
from diorama.world.vocabulary import SMALL
from skyloom.evaluate.report import Row
from skyloom.models.diorama.probe import ProbePrediction


def predicting(noun: str, prompt: Prompt, direction: str = "none") -> ProbePrediction:
    facts = prompt.facts
    features = torch.zeros(1, 4)
    return ProbePrediction(
        noun, facts.place, "day", "none", direction, (noun, *SMALL.nouns), features
    )


@pytest.fixture
def results() -> list[PromptResult]:
    prompts = prompts_for(SMALL, 6)
    predicted = [prompts[0], prompts[1], prompts[0], prompts[5], prompts[3], prompts[2]]
    return [
        PromptResult(mine, (predicting(yours.facts.noun, mine),))
        for mine, yours in zip(prompts, predicted, strict=True)
    ]


def share(rows: list[Row], category: str, source: str) -> Row:
    return next(row for row in rows if (row.category, row.source) == (category, source))


def test_right_nouns_are_counted(results: list[PromptResult]):
    row = share(accuracies(results, "generated"), "noun", "generated")
    assert row.share.value == pytest.approx(2 / 6)
    assert row.share.cases == 6


def test_direction_counts_only_where_the_prompt_has_one(results: list[PromptResult]):
    rows = accuracies(results, "generated")
    directed = sum(result.prompt.facts.direction is not None for result in results)
    assert share(rows, "direction", "generated").share.cases == directed
    assert share(rows, "direction", "generated").share.value == 0
    assert share(rows, "no direction", "generated").share.value == 1


def test_the_shuffled_baseline_is_the_mean_over_all_permutations(results: list[PromptResult]):
    truths = [result.prompt.facts.noun for result in results]
    predicted = [result.predictions[0].noun for result in results]
    scores = [
        sum(a == b for a, b in zip(truths, order, strict=True)) / len(truths)
        for order in permutations(predicted)
    ]
    floor = share(chance_baselines(results, {}), "noun", SHUFFLED).share.value
    assert floor == pytest.approx(sum(scores) / len(scores))


def test_a_constant_noun_reaches_its_baseline_only(results: list[PromptResult]):
    noun = results[0].prompt.facts.noun
    constant = [
        PromptResult(result.prompt, (predicting(noun, result.prompt),)) for result in results
    ]
    rows = chance_baselines(constant, {prompt.prompt.facts.place: noun for prompt in results})
    reached = share(accuracies(constant, "generated"), "noun", "generated").share.value
    assert share(rows, "noun", SHUFFLED).share.value == pytest.approx(reached)
    assert share(rows, "noun", COMMONEST).share.value == pytest.approx(reached)
    assert share(rows, "noun", SAME_PLACE).share.cases == 6
