"""What may be made: the policy, a readable file of rules, and texts against it. Frames are watched in watch.py.

The bundled list (moderation.toml) holds the few things that are never made and stays in force whatever an operator
adds. It stops what is asked for plainly, in English; it is no judge of meaning. No classifier of frames is bundled.
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
DISTANCE, LOOK_BITS = 8, 64
_BUNDLED = Path(__file__).with_name("moderation.toml")
_WITHIN, _GLUED = 60, 3
_SECTIONS = {"version", "lists", "rules", "innocent", "pictures", "classifiers", "consent"}
_RULE = {"name": str, "groups": list, "message": str, "within": int}
_PICTURES = {"name": str, "looks": list, "message": str, "distance": int}
_CLASSIFIER = {"name": str, "call": str, "thresholds": dict, "message": str}
_LOOK = re.compile(r"[0-9a-f]{16}")
_CALL = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", re.ASCII)


@dataclass(frozen=True)
class ModerationResult:
    """Whether something may be made; if not, by which rule, because of which characters of the text (`span`: from,
    to) or `at` how many seconds of a video, and what to say to the user."""

    allowed: bool
    rule: str | None = None
    span: tuple[int, int] | None = None
    message: str | None = None
    at: float | None = None


@dataclass(frozen=True)
class Rule:
    """Refuses a text that meets every group (terms: words, phrases, or beginnings with *) within so many words."""

    name: str
    message: str
    groups: tuple[tuple[str, ...], ...]
    within: int = _WITHIN


@dataclass(frozen=True)
class PictureRule:
    """Refuses a frame whose look (registry.phash) differs from one of these in `distance` of 64 bits at most."""

    name: str
    message: str
    looks: tuple[int, ...]
    distance: int = DISTANCE


@dataclass(frozen=True)
class ClassifierRule:
    """Refuses a frame to which `call` ("package.module:function") gives a label's threshold, or more."""

    name: str
    message: str
    call: str
    thresholds: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Policy:
    """Rules in the order in which they are asked, and phrases whose words do not count; whether the server wants
    `consent` with media from outside."""

    rules: tuple[Rule, ...]
    innocent: tuple[str, ...] = ()
    pictures: tuple[PictureRule, ...] = ()
    classifiers: tuple[ClassifierRule, ...] = ()
    consent: bool = False


def check_prompt(text: str, policy: Policy | None = None) -> ModerationResult:
    """Whether a text may be asked for. Without a policy: the bundled one, with what SKYLOOM_POLICY adds."""
    policy = policy or current_policy()
    words = normalize_words(text)
    innocent = {
        place
        for phrase in policy.innocent
        for hit in _phrase(words, phrase)
        for place in hit.places
    }
    words = [word for word in words if word.place not in innocent or word.spelled]
    for rule in policy.rules:
        span = _met(words, rule)
        if span is not None:
            return ModerationResult(False, rule.name, span, rule.message)
    return ModerationResult(True)


def refuse_prompt(text: str, policy: Policy | None = None) -> None:
    """Raise SafetyError, naming rule and words, for a text that may not be asked for."""
    verdict = check_prompt(text, policy)
    if verdict.allowed:
        return
    start, end = verdict.span or (0, 0)
    raise SafetyError(
        f"Refused by the rule {verdict.rule} (characters {start} to {end}): {verdict.message}",
        hint="Ask for something else.",
        rule=verdict.rule,
        span=verdict.span,
    )


def current_policy() -> Policy:
    """The bundled policy, and after it the rules of the file that SKYLOOM_POLICY names. Raises ConfigError."""
    return load_policy(os.environ.get(POLICY) or None)


@cache
def load_policy(path: str | None) -> Policy:
    """The bundled policy and what a file adds to it: rules and lists, never innocent phrases. Raises ConfigError."""
    bundled = _parse(_BUNDLED)
    if path is None:
        return bundled
    added = _parse(Path(path))
    names = {rule.name for rule in bundled.rules}
    if taken := sorted(
        names & {rule.name for rule in (*added.rules, *added.pictures, *added.classifiers)}
    ):
        raise ConfigError(
            f"{path} has a rule {taken[0]!r}, which is bundled.", hint="Give it another name."
        )
    if added.innocent:
        raise ConfigError(
            f"{path} has innocent phrases.", hint="A policy of your own can only add rules."
        )
    rules = (*bundled.rules, *added.rules)
    return Policy(rules, bundled.innocent, added.pictures, added.classifiers, added.consent)


@dataclass(frozen=True)
class _Hit:
    places: tuple[int, ...]
    start: int
    end: int


def _met(words: Sequence[Word], rule: Rule) -> tuple[int, int] | None:
    """From where to where in the text a rule's groups are met, if all of them are, near enough."""
    hits = [[hit for term in group for hit in _phrase(words, term)] for group in rule.groups]
    soonest = [_Soonest(group) for group in hits]
    best: tuple[int, int] | None = None
    for number, first in (
        ((number, hit) for number, group in enumerate(hits) for hit in group) if all(hits) else ()
    ):
        others = [
            group.from_place(first.places[0])
            for index, group in enumerate(soonest)
            if index != number
        ]
        chosen = [first, *(hit for hit in others if hit is not None)]
        if len(chosen) < len(hits):
            continue
        last = max(place for hit in chosen for place in hit.places)
        span = first.start, max(hit.end for hit in chosen)
        if last - first.places[0] <= rule.within and (
            best is None or span[1] - span[0] < best[1] - best[0]
        ):
            best = span
    return best or _glued(words, rule)


class _Soonest:
    """Which hit of a group ends first, of those that begin at a place or after it."""

    def __init__(self, hits: Sequence[_Hit]) -> None:
        ordered = sorted(hits, key=lambda hit: hit.places[0])
        self._begin = [hit.places[0] for hit in ordered]
        backwards = accumulate(
            reversed(ordered), lambda one, other: min(one, other, key=lambda hit: hit.end)
        )
        self._hits = [*backwards][::-1]

    def from_place(self, place: int) -> _Hit | None:
        """That hit; None if there is none."""
        at = bisect_left(self._begin, place)
        return self._hits[at] if at < len(self._hits) else None


def _glued(words: Sequence[Word], rule: Rule) -> tuple[int, int] | None:
    """A word that is made of one term of each of a rule's two groups."""
    if len(rule.groups) != len(("one", "other")):
        return None
    one, other = ({term.replace(" ", "").rstrip("*") for term in group} for group in rule.groups)
    longest = max(map(len, one), default=0) + max(map(len, other), default=0)
    for word in words:
        for cut in range(_GLUED, len(word.text) - _GLUED + 1) if len(word.text) <= longest else ():
            parts = word.text[:cut], word.text[cut:]
            if (parts[0] in one and parts[1] in other) or (parts[0] in other and parts[1] in one):
                return word.start, word.end
    return None


def _phrase(words: Sequence[Word], term: str) -> Iterable[_Hit]:
    """Where the words of a term stand one after another."""
    wanted = term.split()
    if len(wanted) == 1:
        joined = term.rstrip("*")
        for word in words:
            if _is(word.text, term) or (word.spelled and joined in word.text):
                yield _Hit((word.place,), word.start, word.end)
        return
    by_place: dict[int, list[Word]] = {}
    for word in words:
        by_place.setdefault(word.place, []).append(word)
        if word.text == "".join(wanted):
            yield _Hit((word.place,), word.start, word.end)
    for place in by_place:
        run = [
            next((w for w in by_place.get(place + step, ()) if _is(w.text, one)), None)
            for step, one in enumerate(wanted)
        ]
        found = [word for word in run if word is not None]
        if len(found) == len(wanted):
            yield _Hit(tuple(word.place for word in found), found[0].start, found[-1].end)


def _is(text: str, term: str) -> bool:
    return text.startswith(term[:-1]) if term.endswith("*") else text == term


def _parse(path: Path) -> Policy:
    """A policy file. Raises ConfigError naming what is wrong with it."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The policy {path} cannot be read ({error}).", hint=f"Check the path in {POLICY}."
        ) from error
    if unknown := sorted(set(values) - _SECTIONS):
        raise ConfigError(
            f"The policy {path} has an unknown key {unknown[0]!r}.", hint="See moderation.toml."
        )
    lists = {name: _terms(terms, path, name) for name, terms in values.get("lists", {}).items()}
    rules = tuple(_rule(rule, lists, path) for rule in values.get("rules", []))
    innocent = _terms(values.get("innocent", {}).get("phrases", []), path, "innocent")
    pictures = tuple(_picture_rule(rule, path) for rule in values.get("pictures", []))
    classifiers = tuple(_classifier_rule(rule, path) for rule in values.get("classifiers", []))
    consent = values.get("consent", False)
    if not isinstance(consent, bool):
        raise ConfigError(
            f"The policy {path}: consent is {consent!r:.40}.", hint="Write true or false."
        )
    return Policy(rules, innocent, pictures, classifiers, consent)


def _rule(values: Mapping[str, Any], lists: Mapping[str, tuple[str, ...]], path: Path) -> Rule:
    name = _check_keys(values, _RULE, ("name", "groups", "message"), path)
    unknown = [group for group in values["groups"] if not lists.get(group)]
    if unknown or not values["groups"]:
        named = repr(unknown[0]) if unknown else "no group"
        raise ConfigError(
            f"The policy {path}: rule {name!r} names {named}, no filled list.",
            hint="Add it to [lists].",
        )
    groups = tuple(lists[group] for group in values["groups"])
    return Rule(name, values["message"], groups, values.get("within", _WITHIN))


def _picture_rule(values: Mapping[str, Any], path: Path) -> PictureRule:
    name = _check_keys(values, _PICTURES, ("name", "looks", "message"), path)
    looks, distance = values["looks"], values.get("distance", DISTANCE)
    if not looks or not all(isinstance(look, str) and _LOOK.fullmatch(look) for look in looks):
        hint = "Write what `skyloom moderate FILE --rule NAME` prints."
        raise ConfigError(f"The policy {path}: rule {name!r} has looks that are none.", hint=hint)
    if not 0 <= distance < LOOK_BITS // 2:
        hint = f"Use 0 (the very look) to {LOOK_BITS // 2 - 1} of {LOOK_BITS} bits."
        raise ConfigError(
            f"The policy {path}: rule {name!r} has a distance of {distance}.", hint=hint
        )
    return PictureRule(name, values["message"], tuple(int(look, 16) for look in looks), distance)


def _classifier_rule(values: Mapping[str, Any], path: Path) -> ClassifierRule:
    name = _check_keys(values, _CLASSIFIER, ("name", "call", "thresholds", "message"), path)
    if not _CALL.fullmatch(values["call"]):
        hint = 'Write "package.module:function".'
        raise ConfigError(f"The policy {path}: rule {name!r} calls {values['call']!r}.", hint=hint)
    thresholds: dict[str, Any] = values["thresholds"]
    if not thresholds or not all(
        isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1
        for value in thresholds.values()
    ):
        hint = "Write thresholds = { label = 0.8 }, above 0 and at most 1."
        raise ConfigError(f"The policy {path}: rule {name!r} has wrong thresholds.", hint=hint)
    told = tuple((label, float(value)) for label, value in thresholds.items())
    return ClassifierRule(name, values["message"], values["call"], told)


def _check_keys(
    values: Mapping[str, Any], keys: Mapping[str, type], needed: Sequence[str], path: Path
) -> str:
    """The name of a rule whose keys are known, of the right kind and complete. Raises ConfigError."""
    name = values.get("name", "?")
    for key, value in values.items():
        if key not in keys or not isinstance(value, keys[key]) or isinstance(value, bool):
            raise ConfigError(
                f"The policy {path}: rule {name!r} has a wrong {key!r}.",
                hint="See moderation.toml.",
            )
    if missing := sorted(set(needed) - set(values)):
        raise ConfigError(
            f"The policy {path}: rule {name!r} has no {missing[0]!r}.", hint="Add it."
        )
    return name


def _terms(values: object, path: Path, name: str) -> tuple[str, ...]:
    """Terms as they are read in texts: lower case, words apart by one space."""
    if not isinstance(values, list) or not all(
        isinstance(value, str) and value.strip("* ") for value in values
    ):
        raise ConfigError(
            f"The policy {path}: {name} is no list of words.",
            hint='Write ["one", "two words", "begin*"].',
        )
    return tuple(" ".join(value.casefold().replace("-", " ").split()) for value in values)
