# ruff: noqa: RUF001, SIM905
"""The tokenizer against sentencepiece and transformers, and cleaning against diffusers."""

import io
import random

import pytest
import sentencepiece
from diffusers.pipelines.wan import pipeline_wan
from tokenizers import Tokenizer
from transformers import T5Tokenizer

from skyloom.core.errors import CheckpointError
from skyloom.models.wan.tokenizer import (
    WanTokenizer,
    clean_prompt,
    parse_sentencepiece,
)

SYLLABLES = [a + b for a in "bcdfghklmnprstvwz" for b in ("a", "e", "i", "o", "u", "an", "er")]
CHINESE = [chr(0x4E00 + 37 * index) for index in range(60)]
SPECIAL = (
    "🦊 👩\u200d👧 🇫🇷 ❤️ “curly” ‘q’ &lt;b&gt;bold&lt;/b&gt; &amp;amp; &eacute; <b> ﬁ "
    "Ａｂｃ １２３ é e\u0301 ¨ ㍿ 각 한국어 日本語 猫が走る ｶﾞ кот Straße naïve … — \u2013 "
    "½ ² ™ ① İ ǆ ﷺ اللغة हिन्दी ไทย \u200b \u00a0 \u3000 \t \r\n "
    "\ufeff \ufffd â€œmojibakeâ€\u009d Ã© schÃ¶n"
).split(" ")
MARKERS = ["</s>", "<pad>", "<unk>"]  # transformers reads them as tokens, sentencepiece as text
NO_LIMIT = 10**6


def word(source: random.Random) -> str:
    kind = source.random()
    if kind < 0.15:
        return "".join(source.choices(CHINESE, k=source.randint(1, 4)))
    text = "".join(source.choices(SYLLABLES, k=source.randint(1, 4)))
    return text.capitalize() if kind < 0.3 else text + source.choice(["", "", ",", ".", "!", "é"])


def make_strings() -> list[str]:
    """300 prompts: empty, short, over 512 tokens, with all kinds of characters."""
    source = random.Random(0)
    long = " ".join(word(source) for _ in range(400))
    strings = ["", " ", "  a", "a  ", "\n", long, "猫の" * 300, "ba" * 600, *SPECIAL]
    while len(strings) < 300:
        count = source.choice([1, 2, 5, 12])
        words = [source.choice([word(source), source.choice(SPECIAL)]) for _ in range(count)]
        strings.append(source.choice([" ", "  ", ""]).join(words))
    return strings


STRINGS = make_strings()


def train(**options) -> bytes:
    """Train a SentencePiece model of 500 pieces."""
    source = random.Random(1)
    lines = [" ".join(word(source) for _ in range(source.randint(2, 12))) for _ in range(1500)]
    target = io.BytesIO()
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    settings = {"vocab_size": 500, "model_type": "unigram", "minloglevel": 2, **ids, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=target, **settings
    )
    return target.getvalue()


@pytest.fixture(scope="module")
def plain() -> bytes:
    """A model as T5's: unknown characters are one token."""
    return train()


@pytest.fixture(scope="module")
def with_bytes() -> bytes:
    """A model as UMT5's: unknown characters are spelled in bytes."""
    return train(byte_fallback=True)


def differing(tokenizer, expected, strings):
    return [text for text in strings if list(tokenizer(text, NO_LIMIT).ids) != expected(text)]


def transformers_tokenizer(content: bytes) -> T5Tokenizer:
    model = parse_sentencepiece(content)
    vocabulary = list(zip(model.texts, model.scores, strict=True))
    return T5Tokenizer(vocabulary, _spm_precompiled_charsmap=model.charsmap, extra_ids=0)


def test_the_strings_are_what_they_promise(plain):
    tokenizer = WanTokenizer.from_sentencepiece(plain)
    lengths = [len(tokenizer(text, NO_LIMIT).ids) for text in STRINGS]
    assert len(STRINGS) == 300
    assert min(lengths) == 1
    assert sum(length > 512 for length in lengths) == 2


def test_the_model_is_parsed_as_by_sentencepiece(plain, with_bytes):
    for content in (plain, with_bytes):
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        model = parse_sentencepiece(content)
        ids = range(len(processor))
        assert len(ids) == 500
        assert list(model.texts) == [processor.id_to_piece(i) for i in ids]
        assert list(model.scores) == [processor.get_score(i) for i in ids]
        assert [kind == 6 for kind in model.types] == [processor.is_byte(i) for i in ids]
        assert [kind == 3 for kind in model.types] == [processor.is_control(i) for i in ids]


@pytest.mark.parametrize("clean", [str, clean_prompt])
def test_tokens_equal_those_of_sentencepiece_and_transformers(plain, clean):
    strings = [clean(text) for text in STRINGS]
    tokenizer = WanTokenizer.from_sentencepiece(plain)
    processor = sentencepiece.SentencePieceProcessor(model_proto=plain)
    assert differing(tokenizer, lambda text: [*processor.encode(text), 1], strings + MARKERS) == []
    theirs = transformers_tokenizer(plain)
    assert differing(tokenizer, lambda text: theirs(text).input_ids, strings) == []


def test_unknown_characters_are_spelled_in_bytes_as_by_sentencepiece(with_bytes):
    strings = [clean_prompt(text) for text in STRINGS]
    tokenizer = WanTokenizer.from_sentencepiece(with_bytes)
    processor = sentencepiece.SentencePieceProcessor(model_proto=with_bytes)
    assert differing(tokenizer, lambda text: [*processor.encode(text), 1], strings + MARKERS) == []
    assert tokenizer("🦊", NO_LIMIT).ids != tokenizer("🐻", NO_LIMIT).ids


def test_added_symbols_are_whole_tokens_as_in_sentencepiece():
    content = train(user_defined_symbols=["<extra_id_0>"])
    tokenizer = WanTokenizer.from_sentencepiece(content)
    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    symbol = processor.piece_to_id("<extra_id_0>")
    assert symbol in tokenizer("a <extra_id_0>", NO_LIMIT).ids
    assert tokenizer("a <extra_id_0>", NO_LIMIT).ids == (*processor.encode("a <extra_id_0>"), 1)


def test_tokenizer_json_equals_transformers(plain, tmp_path):
    theirs = transformers_tokenizer(plain)
    theirs.save_pretrained(tmp_path)
    content = (tmp_path / "tokenizer.json").read_bytes()
    tokenizer = WanTokenizer.from_json(content)
    assert tokenizer.size == 500
    strings = [clean_prompt(text) for text in STRINGS] + MARKERS
    assert differing(tokenizer, lambda text: theirs(text).input_ids, strings) == []


def test_settings_of_padding_and_truncation_in_tokenizer_json_have_no_effect(plain, tmp_path):
    transformers_tokenizer(plain).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    expected = WanTokenizer.from_json(path.read_bytes())("a b c", NO_LIMIT)
    stored = Tokenizer.from_file(str(path))
    stored.enable_padding(length=20)
    stored.enable_truncation(3)
    assert WanTokenizer.from_json(stored.to_str().encode())("a b c", NO_LIMIT) == expected


def test_gguf_metadata_gives_the_same_tokens(with_bytes):
    model = parse_sentencepiece(with_bytes)
    metadata = {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": list(model.texts),
        "tokenizer.ggml.scores": list(model.scores),
        "tokenizer.ggml.token_type": list(model.types),
        "tokenizer.ggml.precompiled_charsmap": list(model.charsmap),
    }
    tokenizer = WanTokenizer.from_gguf(metadata)
    expected = WanTokenizer.from_sentencepiece(with_bytes)
    assert all(tokenizer(text, NO_LIMIT) == expected(text, NO_LIMIT) for text in STRINGS)
    damages = {
        "model": "bpe",
        "tokens": "a",
        "scores": [1.0],
        "token_type": ["a"] * 500,
        "precompiled_charsmap": [300],
    }
    for key, value in damages.items():
        with pytest.raises(CheckpointError, match="vocabulary is damaged"):
            WanTokenizer.from_gguf({**metadata, f"tokenizer.ggml.{key}": value})
    with pytest.raises(CheckpointError, match="vocabulary is damaged"):
        WanTokenizer.from_gguf({**metadata, "tokenizer.ggml.precompiled_charsmap": 10**12})


def test_prompts_are_cut_like_transformers_and_the_rest_is_counted(plain):
    tokenizer = WanTokenizer.from_sentencepiece(plain)
    theirs = transformers_tokenizer(plain)
    for text in map(clean_prompt, STRINGS):
        expected = theirs(text, truncation=True, max_length=64).input_ids
        whole = theirs(text).input_ids
        found = tokenizer(text, 64)
        assert list(found.ids) == expected
        assert found.dropped == len(whole) - len(expected)
        assert bool(found.dropped) == bool(found.dropped_text) or not found.dropped
        assert found.dropped_text in text


def test_the_first_dropped_words_are_quoted(plain):
    tokenizer = WanTokenizer.from_sentencepiece(plain)
    kept = len(tokenizer("ba be bi", NO_LIMIT).ids)
    found = tokenizer("ba be bi bo bu wa we wi wo wu", kept)
    assert found.dropped_text == "bo bu wa we wi wo"
    assert tokenizer("ba be bi", kept).dropped_text == ""


def test_cleaning_equals_that_of_diffusers():
    assert pipeline_wan.is_ftfy_available()
    for text in STRINGS:
        assert clean_prompt(text) == pipeline_wan.prompt_clean(text)
    assert clean_prompt("“A  fox” &amp;lt;b&amp;gt;\n") == '"A fox" <b>'


def field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2, len(content)]) + content


def test_damaged_models_are_refused(plain, with_bytes):
    good = field(1, b"\x0a\x05<unk>\x18\x02") + field(1, b"\x0a\x04</s>\x18\x03")
    assert WanTokenizer.from_sentencepiece(good)("a", NO_LIMIT).ids == (0, 1)
    damages = {
        "empty": b"",
        "no unknown token": field(1, b"\x0a\x04</s>\x18\x03"),
        "no end": field(1, b"\x0a\x05<unk>\x18\x02"),
        "two ends": good + field(1, b"\x0a\x04</s>\x18\x03"),
        "cut": plain[:-1],
        "cut in a number": good + b"\x80",
        "endless number": good + b"\xff" * 11,
        "too long": good + b"\x0a\xff\xff\xff\xff\x0f",
        "a group": good + b"\x0b",
        "text as number": good + field(1, b"\x08\x01"),
        "type as text": good + field(1, b"\x1a\x01a"),
        "score of 8 bytes": good + field(1, b"\x11" + bytes(8)),
        "score not finite": good + field(1, b"\x0a\x01a\x15\x00\x00\xc0\x7f"),
        "not UTF-8": good + field(1, b"\x0a\x01\xff"),
        "BPE": good + field(2, b"\x18\x02"),
        "character map": good + field(3, field(2, b"\xff\xff\xff\xff")),
        "piece as number": good + b"\x08\x01",
    }
    for name, content in damages.items():
        with pytest.raises(CheckpointError, match="vocabulary is damaged"):
            WanTokenizer.from_sentencepiece(content)
            pytest.fail(name)
    for content in (b"", b"{}", b"[]", b"\xff", b'{"model": 1}'):
        with pytest.raises(CheckpointError, match="vocabulary is damaged"):
            WanTokenizer.from_json(content)


def test_tokenizer_json_of_another_model_is_refused(plain):
    other = Tokenizer.from_str(transformers_tokenizer(plain).backend_tokenizer.to_str())
    other.post_processor = None
    with pytest.raises(CheckpointError, match="does not end prompts"):
        WanTokenizer.from_json(other.to_str().encode())


def test_mutated_models_are_refused_or_usable(with_bytes):
    source = random.Random(2)
    refused = 0
    for _ in range(60):
        content = bytearray(with_bytes)
        for _ in range(source.choice([1, 3, 30])):
            content[source.randrange(len(content))] = source.randrange(256)
        if source.random() < 0.2:
            del content[source.randrange(len(content)) :]
        try:
            tokenizer = WanTokenizer.from_sentencepiece(bytes(content))
            for text in STRINGS[8:40]:
                tokenizer(text, NO_LIMIT)
        except CheckpointError:
            refused += 1
    assert 5 < refused < 60
