"""Prompt adherence: accuracies per group and category, and their chance baselines."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from diorama.evaluate.prompts import Prompt
from diorama.world.caption import Facts
from skyloom.evaluate.metrics import Share, share_of
from skyloom.evaluate.report import Row
from skyloom.models.diorama.probe import NONE, ProbePrediction

# sources of chance baselines
SHUFFLED = "other prompts"
SAME_PLACE = "other prompts, same place"
COMMONEST = "commonest noun of the place"
TOP_K = 5

Check = Callable[[Facts, ProbePrediction], bool | None]

# category: whether a prediction agrees with the facts; None if the prompt does not specify it
CHECKS: dict[str, Check] = {
    "noun": lambda facts, predicted: predicted.noun == facts.noun,
    f"noun among the first {TOP_K}": lambda facts, predicted: facts.noun in predicted.nouns[:TOP_K],
    "place": lambda facts, predicted: predicted.place == facts.place,
    "time of day": lambda facts, predicted: (
        predicted.time_of_day == facts.time_of_day if facts.time_of_day else None
    ),
    "colour": lambda facts, predicted: predicted.colour == facts.colour if facts.colour else None,
    "direction": lambda facts, predicted: (
        predicted.direction == facts.direction if facts.direction else None
    ),
    "both nouns": lambda facts, predicted: (
        set(facts.nouns) <= set(predicted.things[:2]) if len(facts.nouns) > 1 else None
    ),
    "no direction": lambda facts, predicted: (
        None if facts.direction else predicted.direction == NONE
    ),
}


@dataclass(frozen=True)
class PromptResult:
    """Predictions for the videos of one prompt, one per seed."""

    prompt: Prompt
    predictions: tuple[ProbePrediction, ...]


def accuracies(results: Sequence[PromptResult], source: str) -> list[Row]:
    """Return the accuracy per group and category."""
    rows: list[Row] = []
    for group, members in _groups(results).items():
        for category, check in CHECKS.items():
            cases = [[check(one.prompt.facts, each) for each in one.predictions] for one in members]
            specified = [[hit for hit in case if hit is not None] for case in cases]
            share = share_of([case for case in specified if case])
            if share.cases:
                rows.append(Row(group, category, source, share))
    return rows


def chance_baselines(results: Sequence[PromptResult], commonest: Mapping[str, str]) -> list[Row]:
    """Return the accuracies that the same predictions reach by chance.

    Predictions are compared with every prompt of the group (the exact mean over all permutations);
    nouns also with prompts of the same place, and with the place's commonest noun.
    """
    rows: list[Row] = []
    for group, members in _groups(results).items():
        for category in CHECKS:
            rows += _shuffled(group, category, SHUFFLED, members)
            if category.startswith("noun"):
                rows += _shuffled(group, category, SAME_PLACE, members)
        if commonest:
            guesses = [
                [commonest.get(one.prompt.facts.place) == one.prompt.facts.noun] for one in members
            ]
            rows.append(Row(group, "noun", COMMONEST, share_of(guesses)))
    return rows


def _shuffled(group: str, category: str, source: str, members: Sequence[PromptResult]) -> list[Row]:
    """Check every prompt that specifies the category against the predictions of all of them."""
    check = CHECKS[category]
    specified = [one for one in members if check(one.prompt.facts, one.predictions[0]) is not None]
    if not specified:
        return []
    cases = [
        [bool(check(one.prompt.facts, each)) for each in other.predictions]
        for one in specified
        for other in specified
        if source == SHUFFLED or one.prompt.facts.place == other.prompt.facts.place
    ]
    value = share_of(cases).value
    return [Row(group, category, source, Share(value, math.nan, len(specified)))]


def _groups(results: Sequence[PromptResult]) -> dict[str, list[PromptResult]]:
    groups: dict[str, list[PromptResult]] = {}
    for result in results:
        groups.setdefault(result.prompt.group, []).append(result)
    return groups
