"""Train prompt attributes (models/diorama/prompt_attributes.py) and add them to a text encoder.

The vector must predict every fact of a caption: noun, companion, place, time of day, direction,
colour, motion, camera, weather. In half of the samples the tokens' own word vectors are hidden, so
that unseen words are read by their hidden states. Contexts come from the table of `diorama data
encode`; the attributes are added to that table.
"""

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

from diorama.train.text_encoder import SOURCE
from skyloom.core.files import atomic_path
from skyloom.core.seeds import generator
from skyloom.data.loader import CaptionTable
from skyloom.data.shards import read_shards
from skyloom.models.diorama.prompt_attributes import PromptAttributes
from skyloom.models.diorama.text_encoder import (
    DioramaTextEncoder,
    load_text_encoder,
    save_text_encoder,
)

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
class AttributesConfig:
    """Width of the vector, and settings of its training."""

    width: int = 256
    steps: int = 1500
    batch: int = 256
    lr: float = 2e-3
    hidden_words: float = 0.5
    noise: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class LabelledCaptions:
    """Rows of a caption table, a label index per fact, and the label names per fact."""

    rows: tuple[int, ...]
    indices: Int[Tensor, "n f"]
    labels: tuple[tuple[str, ...], ...]


def read_labels(table: CaptionTable, folders: Sequence[Path]) -> LabelledCaptions:
    """Read the facts of every caption of the folders that is in the table."""
    found: dict[int, list[str]] = {}
    for folder in folders:
        for _, rows in read_shards(folder):
            for row in rows:
                facts = [_label(row["facts"], name) for name in FACTS]
                for text in row["captions"].values():
                    if text in table.index:
                        found[table.index[text]] = facts
    labels = tuple(tuple(sorted({one[i] for one in found.values()})) for i in range(len(FACTS)))
    indices = [[labels[i].index(label) for i, label in enumerate(one)] for one in found.values()]
    return LabelledCaptions(tuple(found), torch.tensor(indices), labels)


def train_attributes(
    table: CaptionTable, captions: LabelledCaptions, config: AttributesConfig
) -> tuple[PromptAttributes, dict[str, float]]:
    """Train; also return the accuracy per fact on a held-out twentieth of the captions."""
    torch.manual_seed(config.seed)
    network = PromptAttributes(table.tokens.shape[1], config.width)
    heads = nn.ModuleList(nn.Linear(config.width, len(labels)) for labels in captions.labels)
    parameters = [*network.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, config.steps)
    order = torch.randperm(len(captions.rows), generator=generator(config.seed, "split"))
    held_out = order[: len(order) // 20]
    seen = order[len(order) // 20 :]
    for step in range(config.steps):
        random = generator(config.seed, "step", step)
        picked = seen[torch.randint(0, len(seen), (config.batch,), generator=random)]
        context, mask, _ = table.gather([captions.rows[i] for i in picked.tolist()])
        hide = torch.rand(config.batch, generator=random) < config.hidden_words
        context = hide_words(context, hide)
        context = context + config.noise * torch.randn(context.shape, generator=random)
        attributes = network(context, mask)
        losses = [
            F.cross_entropy(
                head(attributes), captions.indices[picked, i], label_smoothing=_LABEL_SMOOTHING
            )
            for i, head in enumerate(heads)
        ]
        optimizer.zero_grad(set_to_none=True)
        torch.stack(losses).sum().backward()
        optimizer.step()
        schedule.step()
    return network.eval(), _accuracies(table, captions, network, heads, held_out)


@torch.no_grad()
def _accuracies(
    table: CaptionTable,
    captions: LabelledCaptions,
    network: PromptAttributes,
    heads: nn.ModuleList,
    held_out: Tensor,
) -> dict[str, float]:
    """Return accuracies with and without the tokens' own word vectors."""
    context, mask, _ = table.gather([captions.rows[i] for i in held_out.tolist()])
    shares: dict[str, float] = {}
    for name, hidden in (("", False), (", words hidden", True)):
        attributes = network(hide_words(context, torch.full((len(context),), hidden)), mask)
        for index, (fact, head) in enumerate(zip(FACTS, heads, strict=True)):
            correct = head(attributes).argmax(-1) == captions.indices[held_out, index]
            shares[fact + name] = correct.float().mean().item()
    return shares


@torch.no_grad()
def add_attributes(table_path: Path, encoder: DioramaTextEncoder, batch: int = 512) -> None:
    """Append prompt attributes to the pooled channels of a caption table, in place."""
    table = CaptionTable(table_path)
    assert encoder.meaning is not None
    width = encoder.config.context_width
    parts: list[Tensor] = []
    for start in range(0, len(table.index), batch):
        context, mask, pooled = table.gather(range(start, min(start + batch, len(table.index))))
        attributes = encoder.meaning(context, mask)
        parts.append(torch.cat([pooled[:, :width], attributes], dim=1).bfloat16())
    lengths = torch.tensor(
        [end - start for start, end in zip([0, *table.ends[:-1]], table.ends, strict=True)]
    )
    captions = sorted(table.index, key=lambda text: table.index[text])
    tensors = {"tokens": table.tokens, "lengths": lengths, "pooled": torch.cat(parts)}
    with atomic_path(table_path) as temporary:
        save_file(tensors, temporary, metadata={"captions": json.dumps(captions)})


def hide_words(context: Float[Tensor, "b m k"], hide: Tensor) -> Float[Tensor, "b m k"]:
    """Zero the tokens' own word vectors (second half of the channels) of selected samples."""
    half = context.shape[-1] // 2
    return torch.cat([context[..., :half], context[..., half:] * ~hide[:, None, None]], dim=-1)


def _label(facts: dict[str, Any], name: str) -> str:
    if name == "companion":
        return facts["nouns"][1] if len(facts["nouns"]) > 1 else "none"
    return str(facts[name])


def build_attributes(
    text: Path, captions: Path, clips: Sequence[Path], config: AttributesConfig, out: Path
) -> dict[str, float]:
    """Train on a caption table, write text encoder and table with attributes; return accuracies."""
    table = CaptionTable(captions)
    network, shares = train_attributes(table, read_labels(table, clips), config)
    plain = load_text_encoder(text)
    encoder = DioramaTextEncoder(
        replace(plain.config, meaning=config.width), plain.tokenizer.vocabulary
    )
    added = {f"meaning.{name}": value for name, value in network.state_dict().items()}
    encoder.load_state_dict({**plain.state_dict(), **added})
    save_text_encoder(out, encoder, {**SOURCE, "meaning": json.dumps(shares)})
    add_attributes(captions, load_text_encoder(out))
    return shares
