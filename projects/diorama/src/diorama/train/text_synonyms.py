"""Teach prompt attributes synonyms: "a tabby" gets the attributes of "a cat".

A noun of each caption is replaced by a synonym. The network learns to output what it did for the
original caption, and to keep its output for that one, so the denoising network needs no new
training. Words outside the list profit as far as the text encoder places them near (docs/log.md).
"""

import copy
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diorama.train.prompt_attributes import add_attributes, hide_words
from diorama.train.text_encoder import SOURCE
from diorama.world.nouns import NOUNS, article
from skyloom.core.seeds import derive_seed, generator
from skyloom.data.loader import CaptionTable
from skyloom.models.base import TextContext
from skyloom.models.diorama.prompt_attributes import PromptAttributes
from skyloom.models.diorama.text_encoder import (
    DioramaTextEncoder,
    load_text_encoder,
    save_text_encoder,
)

_BATCH = 64


@dataclass(frozen=True)
class SynonymConfig:
    """Settings of synonym training; captions: number of captions with a synonym."""

    captions: int = 8_000
    steps: int = 600
    batch: int = 64
    lr: float = 5e-4
    hidden_words: float = 0.3
    noise: float = 0.1
    seed: int = 0


def read_synonyms(path: Path) -> dict[str, tuple[str, ...]]:
    """Read the synonyms per noun key from a TOML file."""
    return {
        noun: tuple(words)
        for noun, words in tomllib.loads(path.read_text(encoding="utf-8")).items()
    }


def substitute_noun(
    caption: str, words: Mapping[str, Sequence[str]], random: np.random.Generator
) -> str | None:
    """Replace the first noun that has synonyms by one of them; None if no noun has."""
    names = {name: noun for noun in words for name in NOUNS[noun].names}
    pattern = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    found = re.search(rf"\b(?:(an?) )?({pattern})\b", caption, flags=re.IGNORECASE)
    if found is None:
        return None
    options = words[names[found[2].lower()]]
    word = options[int(random.integers(len(options)))]
    new = article(word) if found[1] else word
    if found[1] and found[1][0].isupper():
        new = new[0].upper() + new[1:]
    return caption[: found.start()] + new + caption[found.end() :]


def substitute_nouns(
    table: CaptionTable, words: Mapping[str, Sequence[str]], config: SynonymConfig
) -> tuple[list[int], list[str]]:
    """Return rows of the table, and their captions with a synonym each."""
    random = np.random.default_rng(derive_seed(config.seed, "synonyms"))
    captions = sorted(table.index, key=lambda text: table.index[text])
    rows: list[int] = []
    renamed: list[str] = []
    for row in random.permutation(len(captions)).tolist():
        new = substitute_noun(captions[row], words, random)
        if new is not None:
            rows.append(row)
            renamed.append(new)
        if len(rows) == config.captions:
            break
    return rows, renamed


def train_synonyms(
    encoder: DioramaTextEncoder,
    table: CaptionTable,
    words: Mapping[str, Sequence[str]],
    config: SynonymConfig,
) -> tuple[PromptAttributes, dict[str, float]]:
    """Train; also return cosine similarities to the old attributes on held-out captions."""
    assert encoder.meaning is not None
    torch.manual_seed(config.seed)
    width = encoder.config.context_width
    rows, renamed = substitute_nouns(table, words, config)
    pieces = [
        encoder.encode_together(renamed[i : i + _BATCH]) for i in range(0, len(renamed), _BATCH)
    ]
    network = copy.deepcopy(encoder.meaning).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, config.steps)
    kept = max(1, len(rows) // 20)
    for step in range(config.steps):
        random = generator(config.seed, "step", step)
        picked = (
            kept + torch.randint(0, len(rows) - kept, (config.batch,), generator=random)
        ).tolist()
        context, mask, pooled = table.gather([rows[i] for i in picked])
        target = pooled[:, width:]
        loss = torch.zeros(())
        for inputs, known in ((context, mask), _gather(pieces, picked)):
            hide = torch.rand(config.batch, generator=random) < config.hidden_words
            noisy = hide_words(inputs, hide)
            noisy = noisy + config.noise * torch.randn(noisy.shape, generator=random)
            loss = loss + F.mse_loss(network(noisy, known), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    held_out = _gather(pieces, range(kept))
    return network.eval(), _similarities(network, encoder.meaning, table, rows[:kept], held_out)


def _gather(pieces: Sequence[TextContext], picked: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return padded contexts and masks of selected renamed captions."""
    chosen = [(pieces[i // _BATCH], i % _BATCH) for i in picked]
    length = max(piece.context.shape[1] for piece, _ in chosen)
    padded = [
        F.pad(piece.context[i], (0, 0, 0, length - piece.context.shape[1])) for piece, i in chosen
    ]
    masks = [
        F.pad(piece.context_mask[i], (0, length - piece.context.shape[1])) for piece, i in chosen
    ]
    return torch.stack(padded), torch.stack(masks)


@torch.no_grad()
def _similarities(
    network: PromptAttributes,
    old: PromptAttributes,
    table: CaptionTable,
    rows: Sequence[int],
    renamed: tuple[Float[Tensor, "b m k"], Tensor],
) -> dict[str, float]:
    context, mask, _ = table.gather(rows)
    target = old(context, mask)
    outputs = {
        "same words": network(context, mask),
        "other words": network(*renamed),
        "other words before": old(*renamed),
    }
    return {
        name: F.cosine_similarity(output, target).mean().item() for name, output in outputs.items()
    }


def build_synonyms(
    text: Path, captions: Path, words: Path, config: SynonymConfig, out: Path
) -> dict[str, float]:
    """Train on a caption table, write text encoder and table; return cosine similarities."""
    encoder = load_text_encoder(text)
    table = CaptionTable(captions)
    encoder.meaning, similarities = train_synonyms(encoder, table, read_synonyms(words), config)
    save_text_encoder(out, encoder, {**SOURCE, "synonyms": json.dumps(similarities)})
    add_attributes(captions, load_text_encoder(out))
    return similarities
