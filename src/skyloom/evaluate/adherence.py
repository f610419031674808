"""Which readings are right: shares per group and category, and what the same readings score by luck."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from skyloom.evaluate.metrics import Share, share_of
from skyloom.evaluate.probe import NONE, Reading
from skyloom.evaluate.prompts import Prompt
from skyloom.evaluate.report import Row
from skyloom.world.caption import Facts

SHUFFLED, SAME_PLACE, COMMONEST = (
    "other prompts",
    "other prompts, same place",
    "commonest noun of the place",
)
FIRST = 5

Judge = Callable[[Facts, Reading], bool | None]

# category: whether a reading is right about the facts; None where the prompt does not ask
JUDGES: dict[str, Judge] = {
    "noun": lambda facts, said: said.noun == facts.noun,
    f"noun among the first {FIRST}": lambda facts, said: facts.noun in said.nouns[:FIRST],
    "place": lambda facts, said: said.place == facts.place,
    "time of day": lambda facts, said: (
        said.time_of_day == facts.time_of_day if facts.time_of_day else None
    ),
    "colour": lambda facts, said: said.colour == facts.colour if facts.colour else None,
    "direction": lambda facts, said: said.direction == facts.direction if facts.direction else None,
    "both nouns": lambda facts, said: (
        set(facts.nouns) <= set(said.things[:2]) if len(facts.nouns) > 1 else None
    ),
    "no direction": lambda facts, said: None if facts.direction else said.direction == NONE,
}


@dataclass(frozen=True)
class Answer:
    """What was read in the videos of one prompt, one reading per seed."""

    prompt: Prompt
    readings: tuple[Reading, ...]


def judge(answers: Sequence[Answer], source: str) -> list[Row]:
    """The share of right readings per group and category."""
    rows = []
    for group, members in _groups(answers).items():
        for category, right in JUDGES.items():
            cases = [[right(one.prompt.facts, said) for said in one.readings] for one in members]
            asked = [[hit for hit in case if hit is not None] for case in cases]
            share = share_of([case for case in asked if case])
            if share.cases:
                rows.append(Row(group, category, source, share))
    return rows


def floors(answers: Sequence[Answer], commonest: Mapping[str, str]) -> list[Row]:
    """What the same readings score by luck.

    Held against every prompt of the group alike (the exact mean over all shuffles); for the noun also against
    prompts of the same place only, and the score of always saying the place's commonest noun.
    """
    rows = []
    for group, members in _groups(answers).items():
        for category in JUDGES:
            rows += _shuffled(group, category, SHUFFLED, members)
            if category.startswith("noun"):
                rows += _shuffled(group, category, SAME_PLACE, members)
        if commonest:
            guesses = [
                [commonest.get(one.prompt.facts.place) == one.prompt.facts.noun] for one in members
            ]
            rows.append(Row(group, "noun", COMMONEST, share_of(guesses)))
    return rows


def _shuffled(group: str, category: str, source: str, members: Sequence[Answer]) -> list[Row]:
    """Each prompt that asks for the category against the readings of all others, its own included."""
    right = JUDGES[category]
    asking = [one for one in members if right(one.prompt.facts, one.readings[0]) is not None]
    cases = [
        [bool(right(one.prompt.facts, said)) for said in other.readings]
        for one in asking
        for other in asking
        if source == SHUFFLED or one.prompt.facts.place == other.prompt.facts.place
    ]
    share = share_of(cases)
    return (
        [Row(group, category, source, Share(share.value, math.nan, len(asking)))] if asking else []
    )


def _groups(answers: Sequence[Answer]) -> dict[str, list[Answer]]:
    groups: dict[str, list[Answer]] = {}
    for answer in answers:
        groups.setdefault(answer.prompt.group, []).append(answer)
    return groups
