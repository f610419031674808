"""Synonyms of nouns: substitution, separation from the evaluation, and training."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diorama.evaluate.prompts import SYNONYMS
from diorama.train.text_synonyms import (
    SynonymConfig,
    read_synonyms,
    substitute_noun,
    train_synonyms,
)
from diorama.world.nouns import NOUNS
from skyloom.data.loader import CaptionTable
from skyloom.models.diorama.config import TextConfig
from skyloom.models.diorama.text_encoder import DioramaTextEncoder

WORDS = read_synonyms(Path(__file__).parents[2] / "recipes/synonyms.toml")


@pytest.mark.parametrize(
    ("caption", "words", "renamed"),
    [
        ("a cat walking on the beach", {"cat": ["tabby"]}, "a tabby walking on the beach"),
        ("a red car next to a cat", {"car": ["old van"]}, "a red old van next to a cat"),
        ("An owl is gliding.", {"owl": ["barn owl"]}, "A barn owl is gliding."),
        ("a house cat is here", {"cat": ["tabby"]}, "a tabby is here"),
        ("a cat", {"cat": ["old tom"]}, "an old tom"),
        ("a caterpillar", {"cat": ["tabby"]}, None),
        ("a dog", {"cat": ["tabby"]}, None),
    ],
)
def test_substitute_noun(caption: str, words: dict[str, list[str]], renamed: str | None):
    assert substitute_noun(caption, words, np.random.default_rng(0)) == renamed


def test_no_word_of_the_evaluation_is_taught():
    taught = {word for words in WORDS.values() for phrase in words for word in phrase.split()}
    evaluated = {word for phrase in SYNONYMS.values() for word in phrase.split()}
    assert not taught & evaluated
    assert not {phrase for words in WORDS.values() for phrase in words} & set(SYNONYMS.values())


def test_every_key_of_the_list_is_a_noun():
    assert set(WORDS) <= set(NOUNS)


def test_synonyms_are_learned_and_old_words_kept(tmp_path):
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "a",
        "cat",
        "dog",
        "tabby",
        "hound",
        "red",
        "old",
        "here",
    ]
    torch.manual_seed(0)
    config = TextConfig(
        len(pieces), width=16, layers=1, heads=2, ffn=32, positions=20, lexical=True, meaning=32
    )
    encoder = DioramaTextEncoder(config, pieces).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    texts = sorted(
        {
            f"{filler}a {noun} here{' old' * n}"
            for filler in ("", "red ")
            for noun in ("cat", "dog")
            for n in range(9)
        }
    )
    coded = encoder.encode(texts)
    tokens = torch.cat(
        [context[mask] for context, mask in zip(coded.context, coded.context_mask, strict=True)]
    )
    tensors = {"tokens": tokens, "lengths": coded.context_mask.sum(1), "pooled": coded.pooled}
    save_file(tensors, tmp_path / "captions.safetensors", metadata={"captions": json.dumps(texts)})
    table = CaptionTable(tmp_path / "captions.safetensors")
    words = {"cat": ["tabby"], "dog": ["hound"]}
    _, near = train_synonyms(
        encoder, table, words, SynonymConfig(steps=200, batch=16, lr=2e-3, noise=0.0)
    )
    assert near["other words"] > max(0.95, near["other words before"])
    assert near["same words"] > 0.95
