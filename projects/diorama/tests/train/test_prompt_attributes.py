"""Prompt attributes: learned from captions including word order, equal in table and encoder."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diorama.train.prompt_attributes import (
    FACTS,
    AttributesConfig,
    add_attributes,
    read_labels,
    train_attributes,
)
from skyloom.data.loader import CaptionTable
from skyloom.models.diorama.config import TextConfig
from skyloom.models.diorama.prompt_attributes import PromptAttributes
from skyloom.models.diorama.text_encoder import (
    DioramaTextEncoder,
    load_text_encoder,
    save_text_encoder,
)

PIECES = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "a",
    "cat",
    "dog",
    "from",
    "to",
    "left",
    "right",
    "walking",
]
CONFIG = TextConfig(
    len(PIECES), width=16, layers=1, heads=2, ffn=32, positions=20, max_tokens=14, lexical=True
)
SMALL = AttributesConfig(width=32, steps=250, batch=32, hidden_words=0.2, noise=0.02)


@pytest.fixture
def encoder() -> DioramaTextEncoder:
    torch.manual_seed(0)
    module = DioramaTextEncoder(CONFIG, PIECES).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


@pytest.fixture
def folder(tmp_path, encoder):
    """Captions whose direction depends on the order of words alone, with their facts."""
    rows = []
    for number in range(120):
        noun = ("cat", "dog")[number % 2]
        first, last = (("left", "right"), ("right", "left"))[number // 2 % 2]
        filler = "a " * (1 + number // 4 % 3)
        text = f"{filler}{noun} {'walking ' * (number // 12 % 4)}from {first} to {last}"
        facts = {name: "none" for name in FACTS} | {
            "noun": noun,
            "nouns": [noun],
            "direction": last,
        }
        rows.append({"captions": {"medium": text}, "facts": facts})
    (tmp_path / "clips-00000.json").write_text(json.dumps(rows))
    np.save(tmp_path / "clips-00000.npy", np.zeros((120, 1, 2, 2, 3), np.uint8))
    texts = sorted({row["captions"]["medium"] for row in rows})
    encoded = encoder.encode(texts)
    tokens = torch.cat(
        [context[mask] for context, mask in zip(encoded.context, encoded.context_mask, strict=True)]
    )
    table = {"tokens": tokens, "lengths": encoded.context_mask.sum(1), "pooled": encoded.pooled}
    save_file(table, tmp_path / "captions.safetensors", metadata={"captions": json.dumps(texts)})
    return tmp_path


def test_it_learns_from_the_order_of_words(folder):
    table = CaptionTable(folder / "captions.safetensors")
    labels = read_labels(table, [folder])
    assert labels.labels[FACTS.index("direction")] == ("left", "right")
    network, shares = train_attributes(table, labels, SMALL)
    assert shares["noun"] == shares["direction"] == 1.0
    again, _ = train_attributes(table, labels, replace(SMALL, steps=3))
    once_more, _ = train_attributes(table, labels, replace(SMALL, steps=3))
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), once_more.parameters(), strict=True)
    )
    context, mask, _ = table.gather(range(4))
    norms = network(context, mask).square().mean(-1)
    torch.testing.assert_close(norms, torch.ones(4), atol=1e-3, rtol=0)


def test_padding_does_not_count():
    torch.manual_seed(0)
    network = PromptAttributes(8, 12).eval()
    context = torch.randn(1, 5, 8)
    padded = torch.cat([context, torch.randn(1, 3, 8)], 1)
    mask = torch.arange(8)[None] < 5
    torch.testing.assert_close(
        network(padded, mask), network(context, mask[:, :5]), atol=1e-5, rtol=0
    )


def test_the_table_and_the_encoder_agree(folder, encoder):
    whole = DioramaTextEncoder(replace(CONFIG, meaning=32), PIECES).eval()
    torch.manual_seed(1)
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    whole.load_state_dict(whole.state_dict() | encoder.state_dict())
    save_text_encoder(folder / "text", whole, {})
    add_attributes(folder / "captions.safetensors", whole)
    table = CaptionTable(folder / "captions.safetensors")
    assert table.pooled.shape[1] == whole.config.pooled_width == 2 * 16 + 32
    text, row = next(iter(table.index.items()))
    encoded = whole.encode([text])
    torch.testing.assert_close(table.pooled[row].float(), encoded.pooled[0], atol=2e-2, rtol=0)
    loaded = load_text_encoder(folder / "text").encode([text])
    assert loaded.pooled.shape == encoded.pooled.shape
    assert (loaded.pooled - encoded.pooled).square().mean() < 0.05
