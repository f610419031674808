"""Teach the reader of prompts other words for things: what it makes of "a tabby" becomes what it makes of "a cat".

python -m skyloom.train.text_synonyms --text FOLDER --captions TABLE --words recipes/synonyms.toml --out FOLDER

Captions get another word in the place of a noun; the reader learns to answer as it did for the caption itself,
and to keep its answer for that one, so a transformer trained on its vectors needs no new training. Words the list
does not have profit as far as the text encoder puts them near those it has (docs/log.md).
"""

import argparse
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

from skyloom.core.seeds import derive_seed, generator
from skyloom.data.loader import CaptionTable
from skyloom.models.prompt_attributes import Meaning
from skyloom.models.text import TextContext, TextEncoder, load_text_encoder, save_text_encoder
from skyloom.train.prompt_attributes import add_meanings, hide_words
from skyloom.world.nouns import NOUNS, article

_TOGETHER = 64


@dataclass(frozen=True)
class SynonymConfig:
    """How many captions get another word, and how long and how fast the reader learns from them."""

    captions: int = 8_000
    steps: int = 600
    batch: int = 64
    lr: float = 5e-4
    hidden_words: float = 0.3
    noise: float = 0.1
    seed: int = 0


def read_synonyms(path: Path) -> dict[str, tuple[str, ...]]:
    """Other words per noun key."""
    return {
        noun: tuple(words)
        for noun, words in tomllib.loads(path.read_text(encoding="utf-8")).items()
    }


def rename(
    caption: str, words: Mapping[str, Sequence[str]], random: np.random.Generator
) -> str | None:
    """The caption with another word for the first of its nouns that has one; nothing if none has."""
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


def rename_captions(
    table: CaptionTable, words: Mapping[str, Sequence[str]], config: SynonymConfig
) -> tuple[list[int], list[str]]:
    """Rows of the table, and their captions with another word each."""
    random = np.random.default_rng(derive_seed(config.seed, "synonyms"))
    captions = sorted(table.index, key=lambda text: table.index[text])
    rows, renamed = [], []
    for row in random.permutation(len(captions)).tolist():
        new = rename(captions[row], words, random)
        if new is not None:
            rows.append(row)
            renamed.append(new)
        if len(rows) == config.captions:
            break
    return rows, renamed


def teach_synonyms(
    encoder: TextEncoder,
    table: CaptionTable,
    words: Mapping[str, Sequence[str]],
    config: SynonymConfig,
) -> tuple[Meaning, dict[str, float]]:
    """A reader that knows the words, and how near it comes to the old one (cosine) on captions kept back."""
    assert encoder.meaning is not None
    torch.manual_seed(config.seed)
    width = encoder.config.context_width
    rows, renamed = rename_captions(table, words, config)
    pieces = [
        encoder.encode_together(renamed[i : i + _TOGETHER])
        for i in range(0, len(renamed), _TOGETHER)
    ]
    reader = copy.deepcopy(encoder.meaning).train()
    optimizer = torch.optim.AdamW(reader.parameters(), lr=config.lr, weight_decay=0.0)
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
        for given, known in ((context, mask), _gather(pieces, picked)):
            hide = torch.rand(config.batch, generator=random) < config.hidden_words
            noisy = hide_words(given, hide)
            noisy = noisy + config.noise * torch.randn(noisy.shape, generator=random)
            loss = loss + F.mse_loss(reader(noisy, known), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return reader.eval(), _nearness(
        reader, encoder.meaning, table, rows[:kept], _gather(pieces, range(kept))
    )


def _gather(pieces: Sequence[TextContext], picked: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Contexts and masks of some renamed captions, padded alike."""
    chosen = [(pieces[i // _TOGETHER], i % _TOGETHER) for i in picked]
    longest = max(piece.context.shape[1] for piece, _ in chosen)
    padded = [
        F.pad(piece.context[i], (0, 0, 0, longest - piece.context.shape[1])) for piece, i in chosen
    ]
    masks = [
        F.pad(piece.context_mask[i], (0, longest - piece.context.shape[1])) for piece, i in chosen
    ]
    return torch.stack(padded), torch.stack(masks)


@torch.no_grad()
def _nearness(
    reader: Meaning,
    old: Meaning,
    table: CaptionTable,
    rows: Sequence[int],
    renamed: tuple[Float[Tensor, "b m k"], Tensor],
) -> dict[str, float]:
    context, mask, _ = table.gather(rows)
    target = old(context, mask)
    readings = {
        "same words": reader(context, mask),
        "other words": reader(*renamed),
        "other words before": old(*renamed),
    }
    return {
        name: F.cosine_similarity(reading, target).mean().item()
        for name, reading in readings.items()
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--captions", type=Path, required=True)
    parser.add_argument("--words", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=SynonymConfig.steps)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    encoder, table = load_text_encoder(given.text), CaptionTable(given.captions)
    config = SynonymConfig(steps=given.steps)
    reader, near = teach_synonyms(encoder, table, read_synonyms(given.words), config)
    encoder.meaning = reader
    metadata = {"source": "all-MiniLM-L6-v2", "licence": "Apache-2.0", "synonyms": json.dumps(near)}
    save_text_encoder(given.out, encoder, metadata)
    add_meanings(given.captions, load_text_encoder(given.out))
    print(json.dumps(near, indent=1))  # noqa: T201 - what the command is for


if __name__ == "__main__":
    main()
