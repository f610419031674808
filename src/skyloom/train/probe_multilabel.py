"""Teach the bundled probe to name two things at once: a head on its frozen features, from rendered stills alone.

python -m skyloom.train.probe_multilabel --stills FOLDER... --probe FOLDER --out FOLDER [--epochs 30]

Everything else that the probe says stays as it is, bit for bit.
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
from skyloom.evaluate.probe import Probe, load_probe
from skyloom.models.checkpoint import save_part
from skyloom.train.probe import distort

_BATCH = 200
_RATE = 2e-3


@torch.no_grad()
def wide_features(
    probe: Probe, folders: Sequence[Path], seed: int
) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n k"]]:
    """What the frozen probe sees in every still, a little distorted; and which of its nouns are there."""
    random, maps, truth = np.random.default_rng(derive_seed(seed, "things")), [], []
    for frames, rows in (pair for folder in folders for pair in read_shards(folder)):
        for start in range(0, len(frames), _BATCH):
            part = frames[start : start + _BATCH]
            video = torch.stack(
                [
                    distort(torch.from_numpy(clip[:1].copy()), probe.config.size, random)
                    for clip in part
                ]
            )
            maps.append(probe.far(probe.near(rearrange(video, "b c 1 h w -> b c h w"))).half())
            truth += [shown(probe, row["facts"]) for row in rows[start : start + _BATCH]]
    return torch.cat(maps), torch.stack(truth)


def shown(probe: Probe, facts: dict[str, Any]) -> Float[Tensor, " k"]:
    """1 for each of the probe's nouns that a scene shows as a subject."""
    return torch.tensor([float(noun in facts["nouns"]) for noun in probe.config.nouns])


def teach(probe: Probe, maps: Tensor, truth: Tensor, epochs: int, seed: int = 0) -> Probe:
    """A probe with the new head, trained by binary cross-entropy for each noun."""
    torch.manual_seed(seed)
    taught = Probe(replace(probe.config, several=True))
    taught.load_state_dict(probe.state_dict(), strict=False)
    assert taught.things is not None
    optimizer = torch.optim.AdamW(taught.things.parameters(), lr=_RATE, weight_decay=0.05)
    steps = epochs * -(-len(maps) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
    for _ in range(epochs):
        for index in torch.randperm(len(maps)).split(_BATCH):
            loss = F.binary_cross_entropy_with_logits(
                taught.things(maps[index].float()), truth[index]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return taught.eval()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stills", type=Path, nargs="+", required=True)
    parser.add_argument("--probe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=30)
    given = parser.parse_args()
    probe = load_probe(given.probe)
    maps, truth = wide_features(probe, given.stills, seed=0)
    taught = teach(probe, maps, truth, given.epochs)
    save_part(given.out, "probe", taught.config, taught.state_dict(), dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
