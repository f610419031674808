"""Normalize a text to words with their positions, before moderation.

Undoes case, accents, look-alike letters, invisible characters, digits for letters, stretched
letters, letters spelled out, and punctuation inside words.
"""

import re
import unicodedata
from bisect import bisect_left
from dataclasses import dataclass

_CONFUSABLES = str.maketrans(  # Cyrillic, Greek and phonetic letters that look like Latin ones
    "\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u043a\u043c\u0442\u043d\u0432\u0456\u0458\u0455"
    "\u0501\u04cf\u0433\u043f\u03b1\u03bf\u03c1\u03bd\u03c4\u03b9\u03ba\u03b5\u03c5\u03c7\u03c3"
    "\u0131\u0251\u0261\u026a\u1d0f\u1d1c\u029f\u0274",
    "aeopcyxkmthbijsdlrnaopvtikeuxoiagiouln",
)
_LEET = str.maketrans("034578@$!|+\u20ac", "oeastbasilte")
_NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen"
)
_AGES = {name: number for number, name in enumerate(_NUMBERS.split())}
_YEARS = ("year", "years", "yr", "yrs")
_AGE_WORD = re.compile(r"(\d{1,2})(?:yo|yr|yrs|y)")
_WORD = re.compile(r"[a-z0-9@$!|+\u20ac]+")
_CHUNK = re.compile(r"\S+")
_STRETCHED = re.compile(r"(.)\1{2,}")
_MIN_SPELLED = 3  # single letters in a row
ADULT = 18
UNDERAGE = "underage"


@dataclass(frozen=True)
class Word:
    """One reading of a word: text, index of the word, first character, last character + 1."""

    text: str
    index: int
    start: int
    end: int
    spelled: bool = False


def normalize_words(text: str) -> list[Word]:
    """Return the words of a text in order; a word may have several readings."""
    plain, origin = _simplify(text)
    words: list[Word] = []
    matches = [
        match for match in _WORD.finditer(plain) if any(one.isalnum() for one in match.group())
    ]
    for index, match in enumerate(matches):
        bare = match.group().rstrip("!|+")
        start = origin[match.start()]
        end = origin[match.start() + len(bare) - 1] + 1
        words += [Word(reading, index, start, end) for reading in _readings(bare)]
    words += _ages(words)
    words += _spelled_out(words)
    return words + _without_punctuation(plain, origin, [match.start() for match in matches])


def _simplify(text: str) -> tuple[str, list[int]]:
    """Return letters without case, accents and disguise, and the original index of each."""
    letters: list[str] = []
    origin: list[int] = []
    for index, letter in enumerate(text):
        for part in unicodedata.normalize("NFKD", letter).casefold():
            for one in unicodedata.normalize("NFKD", part).translate(_CONFUSABLES):
                if unicodedata.category(one) not in ("Mn", "Cf", "Me"):
                    letters.append(one)
                    origin.append(index)
    return "".join(letters), origin


def _readings(bare: str) -> set[str]:
    """Return the possible readings of a run of letters, digits and signs."""
    if bare.isdigit() or _AGE_WORD.fullmatch(bare):
        return {bare}
    readings = {bare, *(bare.translate(_LEET).replace("1", letter) for letter in "il")}
    readings.update([_STRETCHED.sub(r"\1", one) for one in readings])
    return {one for one in readings if one.isalnum()}


def _ages(words: list[Word]) -> list[Word]:
    """Return the word "underage" for ages below 18: "12 year old", "twelve years old", "14yo"."""
    first: dict[int, Word] = {}
    for word in words:
        first.setdefault(word.index, word)
    ages: list[Word] = []
    for index, word in first.items():
        after = [first[near].text for near in (index + 1, index + 2) if near in first]
        if _age(word.text, after) < ADULT:
            ages.append(Word(UNDERAGE, index, word.start, word.end))
    return ages


def _age(text: str, after: list[str]) -> int:
    """Return the age in a word and the two words after it; ADULT if it is not an age."""
    if joined := _AGE_WORD.fullmatch(text):
        return int(joined[1])
    is_age = after[:1] == ["yo"] or (len(after) > 1 and after[0] in _YEARS and after[1] == "old")
    if not is_age:
        return ADULT
    return _AGES.get(text, int(text) if text.isdigit() else ADULT)


def _spelled_out(words: list[Word]) -> list[Word]:
    """Join runs of single letters."""
    joined: list[Word] = []
    run: list[Word] = []
    single = {word.index: word for word in words if len(word.text) == 1 and word.text.isalpha()}
    for index in range(max((word.index for word in words), default=-1) + 2):
        if index in single:
            run.append(single[index])
            continue
        if len(run) >= _MIN_SPELLED:
            text = "".join(word.text for word in run)
            word = Word(text, run[0].index, run[0].start, run[-1].end, spelled=True)
            joined.append(word)
        run = []
    return joined


def _without_punctuation(plain: str, origin: list[int], starts: list[int]) -> list[Word]:
    """Return words with punctuation inside, like n.u-de, without it."""
    found: list[Word] = []
    for chunk in _CHUNK.finditer(plain):
        bare = re.sub(r"[^a-z0-9]", "", chunk.group().translate(_LEET).replace("1", "i"))
        first = bisect_left(starts, chunk.start())
        after = bisect_left(starts, chunk.end())
        if bare and after - first > 1:
            end = origin[chunk.end() - 1] + 1
            found.append(Word(bare, first, origin[chunk.start()], end))
    return found
