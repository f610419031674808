"""WordPiece tokenizer of the uncased BERT models (Wu et al. 2016, arXiv 1609.08144).

Text is lowercased, stripped of accents and split at spaces and punctuation; each word is split
greedily into the longest known pieces. Pieces inside a word begin with "##".
"""

import unicodedata
from collections.abc import Sequence

START = "[CLS]"
END = "[SEP]"
UNKNOWN = "[UNK]"
_MAX_WORD_LENGTH = 100
_ASCII_PUNCTUATION = frozenset("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
_IDEOGRAPHS = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2FA1F))


class Tokenizer:
    """Convert text to token ids; id i is the piece `vocabulary[i]`."""

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.vocabulary = list(vocabulary)
        self._ids = {piece: index for index, piece in enumerate(vocabulary)}

    def __call__(self, text: str) -> list[int]:
        """Return the token ids of a text, with the start and end tokens."""
        pieces = [piece for word in split_words(text) for piece in self.split(word)]
        return [self._ids[piece] for piece in (START, *pieces, END)]

    def split(self, word: str) -> list[str]:
        """Split a word into pieces; the unknown token if any part has none."""
        if len(word) > _MAX_WORD_LENGTH:
            return [UNKNOWN]
        pieces: list[str] = []
        start = 0
        while start < len(word):
            prefix = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((end for end in ends if prefix + word[start:end] in self._ids), None)
            if end is None:
                return [UNKNOWN]
            pieces.append(prefix + word[start:end])
            start = end
        return pieces


def split_words(text: str) -> list[str]:
    """Split into lowercase words without accents; punctuation and ideographs are single words."""
    words: list[str] = []
    current = ""
    for character in unicodedata.normalize("NFD", _clean(text).lower()):
        category = unicodedata.category(character)
        if category == "Mn":
            continue
        alone = _is_punctuation(character, category) or _is_ideograph(character)
        if (alone or character.isspace()) and current:
            words.append(current)
            current = ""
        if alone:
            words.append(character)
        elif not character.isspace():
            current += character
    return [*words, current] if current else words


def _clean(text: str) -> str:
    spaced = "".join(" " if c in "\t\n\r" or unicodedata.category(c) == "Zs" else c for c in text)
    return "".join(
        c
        for c in spaced
        if c != "\ufffd" and unicodedata.category(c) not in ("Cc", "Cf", "Co", "Cs")
    )


def _is_punctuation(character: str, category: str) -> bool:
    return character in _ASCII_PUNCTUATION or category.startswith("P")


def _is_ideograph(character: str) -> bool:
    return any(low <= ord(character) <= high for low, high in _IDEOGRAPHS)
