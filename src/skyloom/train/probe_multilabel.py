"""Train the probe's multi-label head on its frozen features, from rendered stills.

python -m skyloom.train.probe_multilabel --stills FOLDER... --probe FOLDER --out FOLDER

All other outputs of the probe stay bit for bit the same.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from skyloom.core.seeds import derive_seed
from skyloom.data.clips import read_shards
from skyloom.models.checkpoint import save_part
from skyloom.models.diorama.probe import Probe, load_probe
from skyloom.train.probe import augment

_BATCH = 200
_RATE = 2e-3


@torch.no_grad()
def frozen_features(
    probe: Probe, folders: Sequence[Path], seed: int
) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n k"]]:
    """Return the frozen feature maps of augmented stills, and their multi-label targets."""
    random = np.random.default_rng(derive_seed(seed, "things"))
    maps: list[Tensor] = []
    targets: list[Tensor] = []
    for frames, rows in (pair for folder in folders for pair in read_shards(folder)):
        for start in range(0, len(frames), _BATCH):
            part = frames[start : start + _BATCH]
            video = torch.stack(
                [
                    augment(torch.from_numpy(clip[:1].copy()), probe.config.size, random)
                    for clip in part
                ]
            )
            maps.append(probe.far(probe.near(rearrange(video, "b c 1 h w -> b c h w"))).half())
            targets += [noun_targets(probe, row["facts"]) for row in rows[start : start + _BATCH]]
    return torch.cat(maps), torch.stack(targets)


def noun_targets(probe: Probe, facts: dict[str, Any]) -> Float[Tensor, " k"]:
    """Return 1 for each of the probe's nouns that is a subject of the scene, else 0."""
    return torch.tensor([float(noun in facts["nouns"]) for noun in probe.config.nouns])


def train_head(probe: Probe, maps: Tensor, targets: Tensor, epochs: int, seed: int = 0) -> Probe:
    """Return a probe with a multi-label head, trained by binary cross-entropy."""
    torch.manual_seed(seed)
    trained = Probe(replace(probe.config, several=True))
    trained.load_state_dict(probe.state_dict(), strict=False)
    assert trained.things is not None
    optimizer = torch.optim.AdamW(trained.things.parameters(), lr=_RATE, weight_decay=0.05)
    steps = epochs * -(-len(maps) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
    for _ in range(epochs):
        for index in torch.randperm(len(maps)).split(_BATCH):
            scores = trained.things(maps[index].float())
            loss = F.binary_cross_entropy_with_logits(scores, targets[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return trained.eval()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stills", type=Path, nargs="+", required=True)
    parser.add_argument("--probe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=30)
    arguments = parser.parse_args()
    probe = load_probe(arguments.probe)
    maps, targets = frozen_features(probe, arguments.stills, seed=0)
    trained = train_head(probe, maps, targets, arguments.epochs)
    save_part(arguments.out, "probe", trained.config, trained.state_dict(), dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
