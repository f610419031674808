"""Replace character names in prompts with descriptions, because a model does not know the names.

"Mossy walks on the beach" becomes "a red cat walks on the beach"; the second mention becomes "the
red cat". An article before the name is replaced, and a possessive stays a possessive.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from skyloom.serve.api.errors import invalid
from skyloom.serve.queue.library import Character, CharacterLikeness

_DETERMINER = re.compile(
    r"(?<!\w)(a|an|the|my|your|his|her|its|our|their)(\s+)([\w-]+\s+)?$", re.IGNORECASE
)
_LOOKBEHIND = 100  # characters before a name that are searched for a determiner and an adjective
_NOT_ADJECTIVES = frozenset(
    {"and", "or", "but", "with", "of", "in", "on", "at", "by", "to", "for", "from", "is", "was"}
)
_WITHOUT_ARTICLE = frozenset(
    {"santa claus", "broccoli", "cheese", "popcorn", "sushi", "candy", "bubble tea"}
)
_MEASURES = {
    "pancakes": "stack of",
    "french fries": "box of",
    "fries": "box of",
    "sunglasses": "pair of",
    "headphones": "pair of",
    "books": "stack of",
    "scissors": "pair of",
}
_SOUND_CONSONANT = ("uni", "one", "ufo", "eu", "use", "ewe")
_SOUND_VOWEL = ("a", "e", "i", "o", "u", "hour", "honest", "heir", "suv")
_POSSESSIVE = re.compile(r"['\u2019](?!s\b)")


def substitute_characters(
    text: str, characters: Mapping[str, CharacterLikeness]
) -> tuple[str, frozenset[str]]:
    """Replace the names of described characters in a prompt.

    Returns the text and the names replaced.
    """
    described = {name: known for name, known in characters.items() if known.noun is not None}
    if not described:
        return text, frozenset()
    longest_first = sorted(described, key=len, reverse=True)
    pattern = re.compile("|".join(_name_pattern(name) for name in longest_first))
    result = ""
    position = 0
    replaced: set[str] = set()
    for found in pattern.finditer(text):
        name = found.group()
        result += text[position : found.start()]
        result = _append_description(result, described[name], again=name in replaced)
        replaced.add(name)
        position = found.end()
        if name.endswith("s") and (possessive := _POSSESSIVE.match(text, position)):
            result += "'s"
            position = possessive.end()
    return result + text[position:], frozenset(replaced)


def describe_characters(text: str, characters: Sequence[Character]) -> tuple[str, frozenset[str]]:
    """Replace character names by descriptions. Returns the text and the names replaced."""
    return substitute_characters(text, {one.name: one.likeness for one in characters})


def describe_in_card(card: Mapping[str, Any], characters: Sequence[Character]) -> dict[str, Any]:
    """Replace character names in a card; a prompt of another type is rejected later."""
    prompt = card.get("prompt")
    if not isinstance(prompt, str):
        return dict(card)
    return {**card, "prompt": describe_characters(prompt, characters)[0]}


def check_characters_named(characters: Sequence[Character], prompt: str) -> None:
    """Raise ApiError for a character that the prompt does not name."""
    for index, character in enumerate(characters):
        if character.name not in prompt:
            message = f"The prompt must name the character {character.name!r:.100}."
            raise invalid(f"characters[{index}]", message, "character_not_named")


def notice(character: Character, *, found: bool) -> str:
    """Return the notice for a client: the description used for a character, or that there is none.

    `found`: whether the name was replaced.
    """
    if not found:
        return f"The model does not know who {character.name} is: only the name is in the prompt."
    known = character.likeness
    from_receipt = known.source == "receipt"
    source = "the receipt of its clip" if from_receipt else "what the probe reads in its clip"
    return f'{character.name} is put in as "{known.description}", by {source}.'


def _append_description(text: str, known: CharacterLikeness, *, again: bool) -> str:
    """Append a description with the article that the text before it needs."""
    assert known.noun is not None
    phrase = _with_article(known.noun, known.colour)
    bare = re.sub(r"^an? ", "", phrase)
    found = _DETERMINER.search(text, max(0, len(text) - _LOOKBEHIND))
    if found is None or (found[3] and found[3].strip().lower() in _NOT_ADJECTIVES):
        return text + (f"the {bare}" if again else phrase)
    if found[3] or found[1].lower() not in ("a", "an"):
        return text + bare
    capital = found[1][0].isupper()
    return text[: found.start()] + (phrase[0].upper() + phrase[1:] if capital else phrase)


def _with_article(noun: str, colour: str | None) -> str:
    """Prepend the article: "an octopus", "a red car", "a pair of scissors", "popcorn"."""
    phrase = f"{colour} {noun}" if colour else noun
    if noun in _WITHOUT_ARTICLE:
        return phrase
    if noun in _MEASURES:
        phrase = f"{_MEASURES[noun]} {phrase}"
    vowel = phrase.startswith(_SOUND_VOWEL) and not phrase.startswith(_SOUND_CONSONANT)
    return f"{'an' if vowel else 'a'} {phrase}"


def _name_pattern(name: str) -> str:
    """Return a pattern for a name as a whole word; only ASCII edges need a word boundary.

    Other scripts may write a name without spaces around it.
    """
    begin, end = (
        r"\b" if edge.isascii() and (edge.isalnum() or edge == "_") else ""
        for edge in (name[0], name[-1])
    )
    return f"{begin}{re.escape(name)}{end}"
