"""How a text is read before a policy looks at it: plain words with their places, whatever was done to hide them.

Case, accents, look-alike letters, invisible characters, digits for letters, stretched letters, letters spelled out
and marks inside words are undone. Every word remembers where in the original text it stands.
"""

import re
import unicodedata
from bisect import bisect_left
from dataclasses import dataclass

_ALIKE = str.maketrans(  # Cyrillic, Greek and phonetic letters that look like Latin ones
    "\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u043a\u043c\u0442\u043d\u0432\u0456\u0458\u0455\u0501\u04cf\u0433\u043f"
    "\u03b1\u03bf\u03c1\u03bd\u03c4\u03b9\u03ba\u03b5\u03c5\u03c7\u03c3\u0131\u0251\u0261\u026a\u1d0f\u1d1c\u029f\u0274",
    "aeopcyxkmthbijsdlrnaopvtikeuxoiagiouln",
)
_LEET = str.maketrans("034578@$!|+\u20ac", "oeastbasilte")
_TENS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
_AGES = {name: number for number, name in enumerate(_TENS.split())}
_YEARS = ("year", "years", "yr", "yrs")
_AGE_WORD = re.compile(r"(\d{1,2})(?:yo|yr|yrs|y)")
_WORD = re.compile(r"[a-z0-9@$!|+\u20ac]+")
_CHUNK = re.compile(r"\S+")
_STRETCHED = re.compile(r"(.)\1{2,}")
_SPELLED = 3
ADULT = 18
UNDERAGE = "underage"


@dataclass(frozen=True)
class Word:
    """One reading of a word: its letters, its number in the text, and from where to where it stands there."""

    text: str
    place: int
    start: int
    end: int
    spelled: bool = False


def normalize_words(text: str) -> list[Word]:
    """The words of a text in their order; one place may have several readings."""
    plain, origin = _plain(text)
    words: list[Word] = []
    found = [
        one for one in _WORD.finditer(plain) if any(letter.isalnum() for letter in one.group())
    ]
    for place, one in enumerate(found):
        bare = one.group().rstrip("!|+")
        start, end = origin[one.start()], origin[one.start() + len(bare) - 1] + 1
        words += [Word(reading, place, start, end) for reading in _readings(bare)]
    words += _ages(words)
    words += _spelled_out(words)
    return words + _without_marks(plain, origin, [one.start() for one in found])


def _plain(text: str) -> tuple[str, list[int]]:
    """Letters without case, accents and disguise, and where each came from."""
    letters: list[str] = []
    origin: list[int] = []
    for index, letter in enumerate(text):
        for part in unicodedata.normalize("NFKD", letter).casefold():
            for one in unicodedata.normalize("NFKD", part).translate(_ALIKE):
                if unicodedata.category(one) not in ("Mn", "Cf", "Me"):
                    letters.append(one)
                    origin.append(index)
    return "".join(letters), origin


def _readings(bare: str) -> set[str]:
    """What a run of letters, digits and signs may stand for."""
    if bare.isdigit() or _AGE_WORD.fullmatch(bare):
        return {bare}
    readings = {bare, *(bare.translate(_LEET).replace("1", letter) for letter in "il")}
    readings |= {_STRETCHED.sub(r"\1", one) for one in readings}
    return {one for one in readings if one.isalnum()}


def _ages(words: list[Word]) -> list[Word]:
    """An age below 18 as the word underage: "12 year old", "twelve years old", "14yo"."""
    first: dict[int, Word] = {}
    for word in words:
        first.setdefault(word.place, word)
    ages: list[Word] = []
    for place, word in first.items():
        glued = _AGE_WORD.fullmatch(word.text)
        number = (
            int(glued[1])
            if glued
            else _AGES.get(word.text, int(word.text) if word.text.isdigit() else ADULT)
        )
        after = [first[near].text for near in (place + 1, place + 2) if near in first]
        said = (
            glued
            or after[:1] == ["yo"]
            or (len(after) > 1 and after[0] in _YEARS and after[1] == "old")
        )
        if said and number < ADULT:
            ages.append(Word(UNDERAGE, place, word.start, word.end))
    return ages


def _spelled_out(words: list[Word]) -> list[Word]:
    """Runs of single letters, joined."""
    joined: list[Word] = []
    run: list[Word] = []
    single = {word.place: word for word in words if len(word.text) == 1 and word.text.isalpha()}
    for place in range(max((word.place for word in words), default=-1) + 2):
        if place in single:
            run.append(single[place])
            continue
        if len(run) >= _SPELLED:
            text = "".join(word.text for word in run)
            joined.append(Word(text, run[0].place, run[0].start, run[-1].end, spelled=True))
        run = []
    return joined


def _without_marks(plain: str, origin: list[int], starts: list[int]) -> list[Word]:
    """Words with marks inside, like n.u-de, without them."""
    found: list[Word] = []
    for chunk in _CHUNK.finditer(plain):
        bare = re.sub(r"[^a-z0-9]", "", chunk.group().translate(_LEET).replace("1", "i"))
        first, after = bisect_left(starts, chunk.start()), bisect_left(starts, chunk.end())
        if bare and after - first > 1:
            found.append(Word(bare, first, origin[chunk.start()], origin[chunk.end() - 1] + 1))
    return found
