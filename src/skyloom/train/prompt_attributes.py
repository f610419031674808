"""Train the reader of prompts (models/prompt_attributes.py) on captions and their facts, and put it into a text encoder.

python -m skyloom.train.prompt_attributes --text FOLDER --captions TABLE --clips CLIPS... --out FOLDER

Its vector must tell every fact that a caption may say: noun, companion, place, hour, direction, colour, motion,
camera, weather. In half of the samples the words' own vectors are hidden, so that words it never saw are read
by what the encoder makes of them. The captions' contexts come from the table of `skyloom data encode`; the
meanings are added to it, so nothing is encoded twice.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn

from skyloom.core.files import atomic_path
from skyloom.core.seeds import generator
from skyloom.data.clips import read_shards
from skyloom.data.loader import CaptionTable
from skyloom.models.prompt_attributes import Meaning
from skyloom.models.text import TextEncoder, load_text_encoder, save_text_encoder

FACTS = (
    "noun",
    "companion",
    "place",
    "time_of_day",
    "direction",
    "colour",
    "motion",
    "camera",
    "weather",
)
_LABEL_SMOOTHING = 0.02


@dataclass(frozen=True)
class MeaningConfig:
    """Width of the vector, and how long and how fast it is trained."""

    width: int = 256
    steps: int = 1500
    batch: int = 256
    lr: float = 2e-3
    hidden_words: float = 0.5
    noise: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class LabelledCaptions:
    """Rows of a caption table, the answers to each fact, and what the answers mean."""

    rows: tuple[int, ...]
    answers: Int[Tensor, "n f"]
    labels: tuple[tuple[str, ...], ...]


def read_labels(table: CaptionTable, folders: Sequence[Path]) -> LabelledCaptions:
    """Every caption of the folders that the table knows, with the facts of its scene."""
    found: dict[int, list[str]] = {}
    for folder in folders:
        for _, rows in read_shards(folder):
            for row in rows:
                said = [_answer(row["facts"], name) for name in FACTS]
                found |= {
                    table.index[text]: said
                    for text in row["captions"].values()
                    if text in table.index
                }
    labels = tuple(tuple(sorted({said[i] for said in found.values()})) for i in range(len(FACTS)))
    answers = [
        [labels[i].index(answer) for i, answer in enumerate(said)] for said in found.values()
    ]
    return LabelledCaptions(tuple(found), torch.tensor(answers), labels)


def train_meaning(
    table: CaptionTable, captions: LabelledCaptions, config: MeaningConfig
) -> tuple[Meaning, dict[str, float]]:
    """The trained reader, and the share of right answers per fact on one caption in twenty that it never saw."""
    torch.manual_seed(config.seed)
    reader = Meaning(table.tokens.shape[1], config.width)
    heads = nn.ModuleList(nn.Linear(config.width, len(labels)) for labels in captions.labels)
    parameters = [*reader.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, config.steps)
    order = torch.randperm(len(captions.rows), generator=generator(config.seed, "split"))
    kept, seen = order[: len(order) // 20], order[len(order) // 20 :]
    for step in range(config.steps):
        random = generator(config.seed, "step", step)
        picked = seen[torch.randint(0, len(seen), (config.batch,), generator=random)]
        context, mask, _ = table.gather([captions.rows[i] for i in picked.tolist()])
        hide = torch.rand(config.batch, generator=random) < config.hidden_words
        context = hide_words(context, hide)
        context = context + config.noise * torch.randn(context.shape, generator=random)
        meaning = reader(context, mask)
        losses = [
            F.cross_entropy(
                head(meaning), captions.answers[picked, i], label_smoothing=_LABEL_SMOOTHING
            )
            for i, head in enumerate(heads)
        ]
        optimizer.zero_grad(set_to_none=True)
        torch.stack(losses).sum().backward()
        optimizer.step()
        schedule.step()
    return reader.eval(), _accuracies(table, captions, reader, heads, kept)


@torch.no_grad()
def _accuracies(
    table: CaptionTable,
    captions: LabelledCaptions,
    reader: Meaning,
    heads: nn.ModuleList,
    kept: Tensor,
) -> dict[str, float]:
    """Shares of right answers, with the words' own vectors and without them."""
    context, mask, _ = table.gather([captions.rows[i] for i in kept.tolist()])
    shares = {}
    for name, hidden in (("", False), (", words hidden", True)):
        meaning = reader(hide_words(context, torch.full((len(context),), hidden)), mask)
        for index, (fact, head) in enumerate(zip(FACTS, heads, strict=True)):
            right = head(meaning).argmax(-1) == captions.answers[kept, index]
            shares[fact + name] = right.float().mean().item()
    return shares


@torch.no_grad()
def add_meanings(table_path: Path, encoder: TextEncoder, batch: int = 512) -> None:
    """Write each caption's meaning behind the other pooled channels of a table, in place."""
    table = CaptionTable(table_path)
    assert encoder.meaning is not None
    width = encoder.config.context_width
    parts = []
    for start in range(0, len(table.index), batch):
        context, mask, pooled = table.gather(range(start, min(start + batch, len(table.index))))
        parts.append(
            torch.cat([pooled[:, :width], encoder.meaning(context, mask)], dim=1).bfloat16()
        )
    lengths = torch.tensor(
        [end - start for start, end in zip([0, *table.ends[:-1]], table.ends, strict=True)]
    )
    captions = sorted(table.index, key=lambda text: table.index[text])
    tensors = {"tokens": table.tokens, "lengths": lengths, "pooled": torch.cat(parts)}
    with atomic_path(table_path) as temporary:
        save_file(tensors, temporary, metadata={"captions": json.dumps(captions)})


def hide_words(context: Float[Tensor, "b m k"], hide: Tensor) -> Float[Tensor, "b m k"]:
    """Without the second half of the channels, the words' own vectors, where asked."""
    half = context.shape[-1] // 2
    return torch.cat([context[..., :half], context[..., half:] * ~hide[:, None, None]], dim=-1)


def _answer(facts: dict[str, Any], name: str) -> str:
    if name == "companion":
        return facts["nouns"][1] if len(facts["nouns"]) > 1 else "none"
    return str(facts[name])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--captions", type=Path, required=True)
    parser.add_argument("--clips", type=Path, nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=MeaningConfig.steps)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    config, table = MeaningConfig(steps=given.steps), CaptionTable(given.captions)
    reader, shares = train_meaning(table, read_labels(table, given.clips), config)
    plain = load_text_encoder(given.text)
    encoder = TextEncoder(replace(plain.config, meaning=config.width), plain.tokenizer.vocabulary)
    state = plain.state_dict() | {
        f"meaning.{name}": value for name, value in reader.state_dict().items()
    }
    encoder.load_state_dict(state)
    metadata = {
        "source": "all-MiniLM-L6-v2",
        "licence": "Apache-2.0",
        "meaning": json.dumps(shares),
    }
    save_text_encoder(given.out, encoder, metadata)
    add_meanings(given.captions, load_text_encoder(given.out))
    print(json.dumps(shares, indent=1))  # noqa: T201 - what the command is for


if __name__ == "__main__":
    main()
