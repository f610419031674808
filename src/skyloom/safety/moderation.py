"""Moderation policy (TOML) and moderation of prompts; frames are checked in frame_moderation.py.

The bundled rules (moderation.toml) always apply; an operator's policy can only add rules. They
match words in English and do not understand meaning. No classifier of frames is bundled.
"""

import os
import re
import tomllib
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from skyloom.core.errors import ConfigError, SafetyError
from skyloom.safety.text_normalization import Word, normalize_words

POLICY = "SKYLOOM_POLICY"
DISTANCE = 8
HASH_BITS = 64
_BUNDLED = Path(__file__).with_name("moderation.toml")
_WITHIN = 60  # words
_MIN_PART = 3  # letters of each part of a compound word
_SECTIONS = {"version", "lists", "rules", "innocent", "pictures", "classifiers", "consent"}
_RULE_KEYS = {"name": str, "groups": list, "message": str, "within": int}
_PICTURE_KEYS = {"name": str, "looks": list, "message": str, "distance": int}
_CLASSIFIER_KEYS = {"name": str, "call": str, "thresholds": dict, "message": str}
_HASH = re.compile(r"[0-9a-f]{16}")
_CALL = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", re.ASCII)


@dataclass(frozen=True)
class ModerationResult:
    """Result of a check.

    If not `allowed`: the name of the rule, the characters of the text (`span`: first, last + 1) or
    the time in a video (`at`, seconds), and the message for the user.
    """

    allowed: bool
    rule: str | None = None
    span: tuple[int, int] | None = None
    message: str | None = None
    at: float | None = None


@dataclass(frozen=True)
class Rule:
    """Blocks a text with a term of every group within `within` words.

    A term is a word, a phrase, or a prefix that ends in *.
    """

    name: str
    message: str
    groups: tuple[tuple[str, ...], ...]
    within: int = _WITHIN


@dataclass(frozen=True)
class PictureRule:
    """Blocks a frame whose perceptual hash is within `distance` bits of one of `hashes`."""

    name: str
    message: str
    hashes: tuple[int, ...]
    distance: int = DISTANCE


@dataclass(frozen=True)
class ClassifierRule:
    """Blocks a frame if a score of `call` ("package.module:function") reaches its threshold."""

    name: str
    message: str
    call: str
    thresholds: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Policy:
    """Rules in the order in which they are checked.

    Words of `innocent` phrases are ignored. `consent`: input pictures and videos need a consent
    statement (consent.py).
    """

    rules: tuple[Rule, ...]
    innocent: tuple[str, ...] = ()
    pictures: tuple[PictureRule, ...] = ()
    classifiers: tuple[ClassifierRule, ...] = ()
    consent: bool = False


def check_prompt(text: str, policy: Policy | None = None) -> ModerationResult:
    """Check a prompt against a policy (default: the bundled one plus SKYLOOM_POLICY)."""
    policy = policy or current_policy()
    words = normalize_words(text)
    innocent = {
        index
        for phrase in policy.innocent
        for match in _find_term(words, phrase)
        for index in match.indices
    }
    words = [word for word in words if word.index not in innocent or word.spelled]
    for rule in policy.rules:
        span = _match_rule(words, rule)
        if span is not None:
            return ModerationResult(False, rule.name, span, rule.message)
    return ModerationResult(True)


def refuse_prompt(text: str, policy: Policy | None = None) -> None:
    """Check a prompt. Raises SafetyError with rule and characters if it is blocked."""
    result = check_prompt(text, policy)
    if result.allowed:
        return
    start, end = result.span or (0, 0)
    raise SafetyError(
        f"Refused by the rule {result.rule} (characters {start} to {end}): {result.message}",
        hint="Change the prompt.",
        rule=result.rule,
        span=result.span,
    )


def current_policy() -> Policy:
    """Load the bundled policy and the one in SKYLOOM_POLICY. Raises ConfigError."""
    return load_policy(os.environ.get(POLICY) or None)


@cache
def load_policy(path: str | None) -> Policy:
    """Load the bundled policy and add the rules of a file. Raises ConfigError."""
    bundled = _parse(_BUNDLED)
    if path is None:
        return bundled
    added = _parse(Path(path))
    names = {rule.name for rule in bundled.rules}
    if taken := sorted(
        names & {rule.name for rule in (*added.rules, *added.pictures, *added.classifiers)}
    ):
        raise ConfigError(
            f"{path}: {taken[0]!r} is the name of a bundled rule.", hint="Use another name."
        )
    if added.innocent:
        raise ConfigError(
            f"{path}: innocent phrases are not allowed.", hint="A policy can only add rules."
        )
    rules = (*bundled.rules, *added.rules)
    return Policy(rules, bundled.innocent, added.pictures, added.classifiers, added.consent)


@dataclass(frozen=True)
class _Match:
    """Position of a term: word indices, first character, last character + 1."""

    indices: tuple[int, ...]
    start: int
    end: int


def _match_rule(words: Sequence[Word], rule: Rule) -> tuple[int, int] | None:
    """Return the shortest span of the text with a term of every group, or None."""
    groups = [
        [match for term in group for match in _find_term(words, term)] for group in rule.groups
    ]
    if not all(groups):
        return _match_compound(words, rule)
    finders = [_NextMatch(group) for group in groups]
    best: tuple[int, int] | None = None
    for number, group in enumerate(groups):
        for first in group:
            others = [
                finder.from_index(first.indices[0])
                for index, finder in enumerate(finders)
                if index != number
            ]
            span = _span(first, others, rule.within)
            if span and (best is None or span[1] - span[0] < best[1] - best[0]):
                best = span
    return best or _match_compound(words, rule)


def _span(first: _Match, others: Sequence[_Match | None], within: int) -> tuple[int, int] | None:
    """Return the span of `first` and all others, or None if one is missing or too far away."""
    matches = [first, *(match for match in others if match is not None)]
    if len(matches) <= len(others):
        return None
    last = max(index for match in matches for index in match.indices)
    if last - first.indices[0] > within:
        return None
    return first.start, max(match.end for match in matches)


class _NextMatch:
    """Finds the match of a group that ends first among those from a word index on."""

    def __init__(self, matches: Sequence[_Match]) -> None:
        ordered = sorted(matches, key=lambda match: match.indices[0])
        self._starts = [match.indices[0] for match in ordered]
        backwards = accumulate(
            reversed(ordered), lambda one, other: min(one, other, key=lambda match: match.end)
        )
        self._earliest_end = [*backwards][::-1]

    def from_index(self, index: int) -> _Match | None:
        """Return the match, None if there is none."""
        position = bisect_left(self._starts, index)
        return self._earliest_end[position] if position < len(self._earliest_end) else None


def _match_compound(words: Sequence[Word], rule: Rule) -> tuple[int, int] | None:
    """Find a compound word of one term of each of a rule's two groups."""
    if len(rule.groups) != len(("first", "second")):
        return None
    first, second = ({term.replace(" ", "").rstrip("*") for term in one} for one in rule.groups)
    max_length = max(map(len, first), default=0) + max(map(len, second), default=0)
    for word in words:
        if len(word.text) > max_length:
            continue
        for cut in range(_MIN_PART, len(word.text) - _MIN_PART + 1):
            head = word.text[:cut]
            tail = word.text[cut:]
            if (head in first and tail in second) or (head in second and tail in first):
                return word.start, word.end
    return None


def _find_term(words: Sequence[Word], term: str) -> Iterable[_Match]:
    """Find a word or phrase in a text."""
    parts = term.split()
    if len(parts) == 1:
        prefix = term.rstrip("*")
        for word in words:
            if _equals(word.text, term) or (word.spelled and prefix in word.text):
                yield _Match((word.index,), word.start, word.end)
        return
    by_index: dict[int, list[Word]] = {}
    for word in words:
        by_index.setdefault(word.index, []).append(word)
        if word.text == "".join(parts):
            yield _Match((word.index,), word.start, word.end)
    for index in by_index:
        run = [
            next((one for one in by_index.get(index + step, ()) if _equals(one.text, part)), None)
            for step, part in enumerate(parts)
        ]
        found = [word for word in run if word is not None]
        if len(found) == len(parts):
            yield _Match(tuple(word.index for word in found), found[0].start, found[-1].end)


def _equals(text: str, term: str) -> bool:
    return text.startswith(term[:-1]) if term.endswith("*") else text == term


def _parse(path: Path) -> Policy:
    """Parse a policy file. Raises ConfigError."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The policy {path} cannot be read ({error}).", hint=f"Check the path in {POLICY}."
        ) from error
    if unknown := sorted(set(values) - _SECTIONS):
        raise ConfigError(
            f"The policy {path}: unknown key {unknown[0]!r}.", hint="See moderation.toml."
        )
    lists = {name: _terms(terms, path, name) for name, terms in values.get("lists", {}).items()}
    rules = tuple(_rule(rule, lists, path) for rule in values.get("rules", []))
    innocent = _terms(values.get("innocent", {}).get("phrases", []), path, "innocent")
    pictures = tuple(_picture_rule(rule, path) for rule in values.get("pictures", []))
    classifiers = tuple(_classifier_rule(rule, path) for rule in values.get("classifiers", []))
    consent = values.get("consent", False)
    if not isinstance(consent, bool):
        raise ConfigError(f"The policy {path}: consent must be true or false, got {consent!r:.40}.")
    return Policy(rules, innocent, pictures, classifiers, consent)


def _rule(values: Mapping[str, Any], lists: Mapping[str, tuple[str, ...]], path: Path) -> Rule:
    name = _check_keys(values, _RULE_KEYS, ("name", "groups", "message"), path)
    unknown = [group for group in values["groups"] if not lists.get(group)]
    if unknown or not values["groups"]:
        raise ConfigError(
            f"The policy {path}: the groups of rule {name!r} must be names of non-empty lists, "
            f"got {unknown[0] if unknown else values['groups']!r}.",
            hint="Add the list to [lists].",
        )
    groups = tuple(lists[group] for group in values["groups"])
    return Rule(name, values["message"], groups, values.get("within", _WITHIN))


def _picture_rule(values: Mapping[str, Any], path: Path) -> PictureRule:
    name = _check_keys(values, _PICTURE_KEYS, ("name", "looks", "message"), path)
    hashes = values["looks"]
    distance = values.get("distance", DISTANCE)
    if not hashes or not all(isinstance(one, str) and _HASH.fullmatch(one) for one in hashes):
        raise ConfigError(
            f"The policy {path}: looks of rule {name!r} must be hashes of 16 hex digits.",
            hint="Use the output of `skyloom moderate FILE --rule NAME`.",
        )
    if not 0 <= distance < HASH_BITS // 2:
        raise ConfigError(
            f"The policy {path}: distance of rule {name!r} must be 0 to {HASH_BITS // 2 - 1} "
            f"of {HASH_BITS} bits, got {distance}."
        )
    return PictureRule(name, values["message"], tuple(int(one, 16) for one in hashes), distance)


def _classifier_rule(values: Mapping[str, Any], path: Path) -> ClassifierRule:
    name = _check_keys(values, _CLASSIFIER_KEYS, ("name", "call", "thresholds", "message"), path)
    if not _CALL.fullmatch(values["call"]):
        raise ConfigError(
            f'The policy {path}: call of rule {name!r} must be "package.module:function", '
            f"got {values['call']!r}."
        )
    thresholds: dict[str, Any] = values["thresholds"]
    if not thresholds or not all(
        isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1
        for value in thresholds.values()
    ):
        raise ConfigError(
            f"The policy {path}: thresholds of rule {name!r} must be above 0 and at most 1, "
            f"got {thresholds!r:.80}.",
            hint="Write thresholds = { label = 0.8 }.",
        )
    pairs = tuple((label, float(value)) for label, value in thresholds.items())
    return ClassifierRule(name, values["message"], values["call"], pairs)


def _check_keys(
    values: Mapping[str, Any], keys: Mapping[str, type], needed: Sequence[str], path: Path
) -> str:
    """Check the keys and types of a rule; return its name. Raises ConfigError."""
    name = values.get("name", "?")
    for key, value in values.items():
        if key not in keys or not isinstance(value, keys[key]) or isinstance(value, bool):
            raise ConfigError(
                f"The policy {path}: unknown key or wrong type of {key!r} in rule {name!r}.",
                hint="See moderation.toml.",
            )
    if missing := sorted(set(needed) - set(values)):
        raise ConfigError(
            f"The policy {path}: rule {name!r} lacks the key {missing[0]!r}.", hint="Add it."
        )
    return name


def _terms(values: object, path: Path, name: str) -> tuple[str, ...]:
    """Normalize terms like texts: lower case, words separated by one space."""
    if not isinstance(values, list) or not all(
        isinstance(value, str) and value.strip("* ") for value in values
    ):
        raise ConfigError(
            f"The policy {path}: {name} must be a list of words.",
            hint='Write ["one", "two words", "prefix*"].',
        )
    return tuple(" ".join(value.casefold().replace("-", " ").split()) for value in values)
