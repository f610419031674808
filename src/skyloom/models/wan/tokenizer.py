"""Tokenizer of UMT5: prompts are cleaned as in Wan's training and cut into SentencePiece tokens.

The vocabulary is read from `tokenizer.json`, from a SentencePiece model (`spiece.model`, or the
tensor `spiece_model` of ComfyUI's files), or from the metadata of a GGUF file. The format of a
SentencePiece model is the protobuf of sentencepiece_model.proto (github.com/google/sentencepiece);
only the fields that tokenizing needs are read.
"""

import html
import math
import re
import struct
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import ftfy
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram

from skyloom.core.errors import CheckpointError

EOS = "</s>"
QUOTED_WORDS = 6
"""How many of the words that a prompt is too long for are quoted to the user."""

_HINT = "Fetch the text encoder's files again."
_MAX_VARINT_BYTES = 10
_VARINT = 0
_FIXED64 = 1
_BYTES = 2
_FIXED32 = 5
_PIECES = 1  # fields of ModelProto, SentencePiece, TrainerSpec and NormalizerSpec
_TRAINER = 2
_NORMALIZER = 3
_PIECE_TEXT = 1
_PIECE_SCORE = 2
_PIECE_TYPE = 3
_MODEL_TYPE = 3
_CHARSMAP = 2
_UNIGRAM = 1  # value of the model type
_NORMAL = 1  # values of a piece's type, the same in GGUF
_UNKNOWN = 2
_USER_DEFINED = 4
_BYTE = 6
_GGUF = "tokenizer.ggml."
_CHARSMAP_KEY = f"{_GGUF}precompiled_charsmap"
_SPACE = "▁"


@dataclass(frozen=True)
class SentencePieceModel:
    """Unigram vocabulary: one text, score (log probability) and type per piece.

    charsmap: compiled normalisation of characters, as SentencePiece writes it; may be empty.
    """

    texts: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    charsmap: bytes


@dataclass(frozen=True)
class PromptTokens:
    """Token ids of a prompt, the end token last.

    dropped: number of tokens beyond the limit. dropped_text: the first words of them.
    """

    ids: tuple[int, ...]
    dropped: int
    dropped_text: str


def clean_prompt(text: str) -> str:
    """Repair broken Unicode, decode HTML entities twice and collapse white space, as Wan does."""
    fixed = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", fixed).strip()


class WanTokenizer:
    """Cuts a cleaned prompt into token ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @property
    def size(self) -> int:
        """Number of tokens in the vocabulary."""
        return self._tokenizer.get_vocab_size()

    @classmethod
    def from_json(cls, content: bytes) -> "WanTokenizer":
        """Read `tokenizer.json`. Raises CheckpointError for another content."""
        with _library_errors():
            tokenizer = Tokenizer.from_buffer(content)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        found = cls(tokenizer)
        if found("", 1).ids != (tokenizer.token_to_id(EOS),):
            raise _damaged(f"it does not end prompts with {EOS}")
        return found

    @classmethod
    def from_sentencepiece(cls, content: bytes) -> "WanTokenizer":
        """Read a SentencePiece model. Raises CheckpointError for a damaged or other one."""
        return cls(_unigram(parse_sentencepiece(content)))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> "WanTokenizer":
        """Read the vocabulary in the metadata of a GGUF file. Raises CheckpointError."""
        if metadata.get(f"{_GGUF}model") != "t5":
            raise _damaged("the GGUF file has no SentencePiece vocabulary")
        texts = _items(metadata, f"{_GGUF}tokens", str)
        scores = _items(metadata, f"{_GGUF}scores", float)
        types = _items(metadata, f"{_GGUF}token_type", int)
        charsmap = _items(metadata, _CHARSMAP_KEY, int) if _CHARSMAP_KEY in metadata else []
        if not len(texts) == len(scores) == len(types):
            raise _damaged("its tokens, scores and types differ in number")
        try:
            model = SentencePieceModel(texts, scores, types, bytes(charsmap))
        except ValueError as error:
            raise _damaged("its character map does not consist of bytes") from error
        return cls(_unigram(model))

    def __call__(self, text: str, limit: int) -> PromptTokens:
        """Tokenize a cleaned prompt; tokens beyond `limit`, which includes the end, are dropped."""
        with _library_errors():
            encoding = self._tokenizer.encode(text)
        ids = encoding.ids
        dropped = max(0, len(ids) - limit)
        if not dropped:
            return PromptTokens(tuple(ids), 0, "")
        begin = encoding.offsets[limit - 1][0]
        words = text[begin:].split()[:QUOTED_WORDS]
        return PromptTokens((*ids[: limit - 1], ids[-1]), dropped, " ".join(words))


def parse_sentencepiece(content: bytes) -> SentencePieceModel:
    """Read the vocabulary of a SentencePiece model. Raises CheckpointError."""
    texts: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    charsmap = b""
    for field, value in _fields(content):
        if field == _PIECES:
            piece = dict(_fields(_as_bytes(value)))
            texts.append(_text(piece.get(_PIECE_TEXT, b"")))
            scores.append(_float(piece.get(_PIECE_SCORE, b"\0\0\0\0")))
            types.append(_integer(piece.get(_PIECE_TYPE, _NORMAL)))
        elif field == _TRAINER:
            kind = dict(_fields(_as_bytes(value))).get(_MODEL_TYPE, _UNIGRAM)
            if kind != _UNIGRAM:
                raise _damaged(f"its type must be {_UNIGRAM} (unigram), got {kind!r}")
        elif field == _NORMALIZER:
            charsmap = _as_bytes(dict(_fields(_as_bytes(value))).get(_CHARSMAP, b""))
    return SentencePieceModel(texts, scores, types, charsmap)


def _unigram(model: SentencePieceModel) -> Tokenizer:
    """Make the tokenizer of a vocabulary: ids are the positions of the pieces.

    Pieces that text never matches (control, unknown, unused) get a name with a space, which
    normalised text does not contain.
    """
    matched = (_NORMAL, _USER_DEFINED, _BYTE)
    names = [
        text if kind in matched else f" {text}"
        for text, kind in zip(model.texts, model.types, strict=True)
    ]
    end = f" {EOS}"
    if model.types.count(_UNKNOWN) != 1 or names.count(end) != 1:
        raise _damaged(f"it must have one unknown token and one {EOS}")
    if not all(math.isfinite(score) for score in model.scores):
        raise _damaged("a score is not finite")
    vocabulary = list(zip(names, model.scores, strict=True))
    unknown = model.types.index(_UNKNOWN)
    with _library_errors():
        unigram = Unigram(vocabulary, unk_id=unknown, byte_fallback=_BYTE in model.types)
        mapped = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    tokenizer = Tokenizer(unigram)
    tokenizer.normalizer = normalizers.Sequence(
        [*mapped, normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="always", split=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, names.index(end))]
    )
    return tokenizer


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield number and value of every field of a protobuf message. Raises CheckpointError."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, wire_type = divmod(key, 8)
        if wire_type == _VARINT:
            value, position = _varint(message, position)
            yield number, value
            continue
        size = {_FIXED32: 4, _FIXED64: 8}.get(wire_type)
        if wire_type == _BYTES:
            size, position = _varint(message, position)
        if size is None or position + size > len(message):
            raise _damaged("it is cut off or no protobuf")
        yield number, message[position : position + size]
        position += size


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """Read an integer of 7 bits per byte; return it and the position after it."""
    value = 0
    for index, byte in enumerate(message[position : position + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << (7 * index)
        if not byte & 0x80:
            return value, position + index + 1
    raise _damaged("it is cut off or no protobuf")


def _as_bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise _damaged("a field has the wrong type")
    return value


def _text(value: int | bytes) -> str:
    try:
        return _as_bytes(value).decode()
    except UnicodeDecodeError as error:
        raise _damaged("a token is not UTF-8") from error


def _float(value: int | bytes) -> float:
    content = _as_bytes(value)
    if len(content) != struct.calcsize("<f"):
        raise _damaged("a score is no number in 32 bits")
    return float(struct.unpack("<f", content)[0])


def _integer(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise _damaged("a field has the wrong type")
    return value


def _items(metadata: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    """Return a list in GGUF's metadata, whose items are of one type."""
    value = metadata.get(name)
    items = cast(list[Any], value) if isinstance(value, list) else None
    if items is None or not all(type(item) is kind for item in items):
        raise _damaged(f"the GGUF file has no valid list {name}")
    return items


@contextmanager
def _library_errors() -> Generator[None]:
    """Turn the library's plain exceptions and panics into CheckpointError."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise _damaged(str(error)) from error
        raise


def _damaged(cause: str) -> CheckpointError:
    return CheckpointError(f"The text encoder's vocabulary is damaged: {cause}.", hint=_HINT)
