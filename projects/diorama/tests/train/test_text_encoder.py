"""Building the text encoder: parity with transformers' BERT, pieces that are kept."""

import json

import numpy as np
import pytest
import torch

from diorama.train.text_encoder import convert_weights, known_texts, prune_vocabulary
from skyloom.models.diorama.config import TextConfig
from skyloom.models.diorama.text_encoder import DioramaTextEncoder

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "cat", "##s", "dog", "c", "##a", "##t"]
CONFIG = TextConfig(
    vocabulary=len(PIECES), width=24, layers=2, heads=4, ffn=48, positions=32, max_tokens=10
)


def test_parity_with_transformers():
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    torch.manual_seed(1)
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=len(PIECES),
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=32,
        )
    ).eval()
    state = {
        name: value for name, value in bert.state_dict().items() if not name.startswith("pooler")
    }
    encoder = DioramaTextEncoder(CONFIG, PIECES).eval()
    encoder.load_state_dict(convert_weights(state, list(range(len(PIECES)))))
    tokens = torch.tensor([[2, 4, 5, 6, 7, 3], [2, 4, 8, 3, 0, 0]])
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    with torch.no_grad():
        expected = bert(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        made = encoder(tokens, mask)
    assert (made - expected)[mask].abs().max() <= 1e-5


def test_pieces_of_nouns_captions_and_words_are_kept(tmp_path):
    np.save(tmp_path / "clips-00000.npy", np.zeros((1, 1, 2, 2, 3), np.uint8))
    row = {"captions": {"short": "a dog", "medium": "dogs", "long": "red cats"}}
    (tmp_path / "clips-00000.json").write_text(json.dumps([row]))
    (tmp_path / "words.txt").write_text("more\n")
    texts = known_texts([tmp_path], tmp_path / "words.txt")
    assert {"octopus", "a dog", "dogs", "red cats", "more"} <= set(texts)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "zoo", "dog", "##s", "a b"]
    assert prune_vocabulary(vocabulary, ["a dog", "dogs"], size=8) == [0, 1, 2, 3, 4, 5, 7, 8]
    assert prune_vocabulary(vocabulary, ["a dog", "dogs"], size=9) == [0, 1, 2, 3, 4, 5, 6, 7, 8]
