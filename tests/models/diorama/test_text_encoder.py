"""The text encoder: prompts independent of their batch, word vectors, eight bits."""

from dataclasses import replace

import pytest
import torch

from skyloom.models.diorama.config import TextConfig
from skyloom.models.diorama.text_encoder import (
    DioramaTextEncoder,
    load_text_encoder,
    save_text_encoder,
)

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "cat", "##s", "dog", "c", "##a", "##t"]
CONFIG = TextConfig(
    vocabulary=len(PIECES), width=24, layers=2, heads=4, ffn=48, positions=32, max_tokens=10
)


@pytest.fixture
def encoder() -> DioramaTextEncoder:
    torch.manual_seed(0)
    module = DioramaTextEncoder(CONFIG, PIECES).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def test_a_prompt_is_the_same_alone_and_in_company(encoder):
    alone, together = encoder.encode(["a cat"]), encoder.encode(["a red red red red dog", "a cat"])
    length = int(alone.context_mask.sum())
    assert torch.equal(alone.context[0, :length], together.context[1, :length])
    assert torch.equal(alone.pooled[0], together.pooled[1])
    assert not together.context[~together.context_mask].any()


def test_long_prompts_are_cut_and_counted(encoder):
    coded = encoder.encode(["a red " * 10, "a cat"])
    assert coded.truncated == (12, 0)
    assert coded.context_mask.sum(1).tolist() == [10, 4]


def test_words_fall_into_known_pieces(encoder):
    assert encoder.tokenizer.split("cats") == ["cat", "##s"]
    assert encoder.tokenizer.split("zebra") == ["[UNK]"]
    assert encoder.tokenizer("A Cát!") == [2, 4, 6, 1, 3]


def test_eight_bits_keep_the_meaning(encoder, tmp_path):
    save_text_encoder(tmp_path, encoder, {})
    loaded = load_text_encoder(tmp_path)
    assert not loaded.training
    first, second = (module.encode(["a red cat"]).pooled for module in (encoder, loaded))
    assert torch.cosine_similarity(first, second) > 0.99


def test_word_vectors_lie_beside_the_hidden_states_and_tell_words_apart(encoder):
    plain = encoder.encode(["a red cat", "a red dog"])
    encoder.config = replace(CONFIG, lexical=True)
    both = encoder.encode(["a red cat", "a red dog"])
    width = CONFIG.width
    assert (
        both.context.shape[-1] == both.pooled.shape[-1] == encoder.config.context_width == 2 * width
    )
    assert torch.equal(both.context[..., :width], plain.context)
    assert torch.equal(both.pooled[:, :width], plain.pooled)
    cat, dog = both.context[0, :, width:], both.context[1, :, width:]
    same = (cat == dog).all(-1)
    assert same[:5].tolist() == [True, True, True, False, True]
    bag = encoder.word_vectors(encoder.tokenizer("a red cat")[1:-1]).sum(0) / 3**0.5
    torch.testing.assert_close(both.pooled[0, width:], bag)
    assert not both.context[~both.context_mask].any()
