"""Characters in prompts: who a clip shows is said in the place of the name, since a model knows no names.

"Mossy walks on the beach" becomes "a red cat walks on the beach"; later it is "the red cat". An article before the name
gives way, and a possessive stays one.
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta

from skyloom.serve.queue.library import Character, CharacterLikeness
from skyloom.world.nouns import article

_BEFORE = re.compile(
    r"(?<!\w)(a|an|the|my|your|his|her|its|our|their)(\s+)([\w-]+\s+)?$", re.IGNORECASE
)
_LOOK_BACK = 100  # characters in which an article and an adjective stand
_NO_ADJECTIVE = frozenset(
    {"and", "or", "but", "with", "of", "in", "on", "at", "by", "to", "for", "from", "is", "was"}
)
_GENITIVE = re.compile(r"['\u2019](?!s\b)")


def put_in(text: str, cast: Mapping[str, CharacterLikeness]) -> tuple[str, frozenset[str]]:
    """A prompt with what is known of characters where their names stand, and the names that it has found."""
    known = {name: likeness for name, likeness in cast.items() if likeness.noun is not None}
    if not known:
        return text, frozenset()
    names = re.compile("|".join(_whole(name) for name in sorted(known, key=len, reverse=True)))
    told, at, seen = "", 0, set[str]()
    for found in names.finditer(text):
        name = found.group()
        told += text[at : found.start()]
        told = _say(told, known[name], again=name in seen)
        seen.add(name)
        at = found.end()
        if name.endswith("s") and (mark := _GENITIVE.match(text, at)):
            told, at = f"{told}'s", mark.end()
    return told + text[at:], frozenset(seen)


def notice(character: Character, *, found: bool) -> str:
    """What a client is told of a character in a prompt."""
    known = character.likeness
    if not found:
        return f"The model does not know who {character.name} is: only the name is in the prompt."
    source = (
        "the receipt of its clip"
        if known.source == "receipt"
        else "what the probe reads in its clip"
    )
    return f'{character.name} is put in as "{known.description}", by {source}.'


def ends_at(expiry: str) -> float:
    """When a consent ends, in seconds since 1970: a date's last moment (UTC), or a time. Raises ValueError."""
    with suppress(ValueError):
        day = date.fromisoformat(expiry)
        return (
            datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()
            + timedelta(days=1).total_seconds()
        )
    moment = datetime.fromisoformat(expiry)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _say(before: str, known: CharacterLikeness, *, again: bool) -> str:
    """A text that goes on with a likeness, and with the article that it needs."""
    assert known.noun is not None
    whole = article(known.noun, known.colour)
    bare = re.sub(r"^an? ", "", whole)
    found = _BEFORE.search(before, max(0, len(before) - _LOOK_BACK))
    if found is None or (found[3] and found[3].strip().lower() in _NO_ADJECTIVE):
        return before + (f"the {bare}" if again else whole)
    if found[3] or found[1].lower() not in ("a", "an"):
        return before + bare
    return before[: found.start()] + (
        whole[0].upper() + whole[1:] if found[1][0].isupper() else whole
    )


def _whole(name: str) -> str:
    """A name as a word of its own, where letters are ASCII's: other scripts may write it without spaces."""
    begin, end = (
        r"\b" if edge.isascii() and (edge.isalnum() or edge == "_") else ""
        for edge in (name[0], name[-1])
    )
    return f"{begin}{re.escape(name)}{end}"
