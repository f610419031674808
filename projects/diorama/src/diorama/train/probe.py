"""Train the probe (models/diorama/probe.py) on rendered clips, then its multi-label head.

Clips are mirrored and reversed at random and their direction label with them, so that neither the
side that a subject faces nor its position reveals the direction. Blur, noise and brightness changes
make the probe robust to autoencoder artefacts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from diorama.world.vocabulary import VOCABULARIES
from skyloom.core.errors import ConfigError
from skyloom.core.seeds import derive_seed
from skyloom.data.shards import read_shards
from skyloom.models.checkpoint import save_part
from skyloom.models.diorama.probe import (
    CATEGORIES,
    DIRECTIONS,
    NONE,
    Probe,
    ProbeConfig,
    load_probe,
    predict,
)
from skyloom.train.loop import LoopConfig, Task
from skyloom.train.objectives import Losses

_IGNORED = -100
_HEAD_BATCH = 200
_HEAD_RATE = 2e-3
_MIRROR = {"left": "right", "right": "left"}
_OPPOSITE = tuple(DIRECTIONS.index(_MIRROR.get(name, name)) for name in DIRECTIONS)


@dataclass(frozen=True)
class ProbeRun:
    """Vocabulary, folders of clips and stills, and sizes.

    frames: frames of a whole clip that the probe sees in evaluation. shown: frames that it sees at
    once in training, equally far apart. measured: clips per evaluation.
    """

    vocabulary: str = "small"
    stills: tuple[str, ...] = ()
    clips: tuple[str, ...] = ()
    held_out: str = ""
    still_batch: int = 96
    clip_batch: int = 16
    size: int = 64
    widths: tuple[int, int, int, int] = (32, 64, 128, 224)
    frames: int = 5
    shown: int = 3
    smoothing: float = 0.05
    measured: int = 200

    @property
    def config(self) -> ProbeConfig:
        """Configuration of the probe for the vocabulary."""
        world = VOCABULARIES[self.vocabulary]
        return ProbeConfig(
            nouns=world.nouns,
            places=world.places,
            times=world.times,
            colours=world.colours,
            size=self.size,
            frames=self.frames,
            widths=self.widths,
        )


@dataclass(frozen=True)
class ProbeBatch:
    """Stills and clips in [-1, 1], and label indices per category (-100: no label)."""

    stills: Float[Tensor, "n 3 1 h w"]
    clips: Float[Tensor, "b 3 t h w"]
    still_labels: dict[str, Int[Tensor, " n"]]
    clip_labels: dict[str, Int[Tensor, " b"]]


def label_indices(config: ProbeConfig, facts: dict[str, Any]) -> dict[str, int]:
    """Convert facts to indices of the probe's labels; -100 where the fact is unknown."""
    found: dict[str, int] = {}
    for name in CATEGORIES:
        labels = config.labels(name)
        value = facts[name]
        value = NONE if value is None and NONE in labels else value
        found[name] = labels.index(value) if value is not None else _IGNORED
    return found


class ProbeLoader:
    """Batches by step number from folders of rendered stills and clips."""

    def __init__(self, run: ProbeRun, config: ProbeConfig, seed: int) -> None:
        self.run = run
        self.config = config
        self.seed = seed
        self.stills = _rows(run.stills)
        self.clips = _rows(run.clips)

    def __call__(self, step: int) -> ProbeBatch:
        """Load the batch of one step."""
        random = np.random.default_rng(derive_seed(self.seed, "probe", step))
        stills = [self._one(random, self.stills, still=True) for _ in range(self.run.still_batch)]
        clips = [self._one(random, self.clips, still=False) for _ in range(self.run.clip_batch)]
        return ProbeBatch(
            torch.stack([video for video, _ in stills]),
            torch.stack([video for video, _ in clips]),
            _collate([found for _, found in stills]),
            _collate([found for _, found in clips]),
        )

    def _one(
        self, random: np.random.Generator, rows: list["_Row"], *, still: bool
    ) -> tuple[Tensor, dict[str, int]]:
        row = rows[random.integers(len(rows))]
        found = label_indices(self.config, row.facts)
        total = len(row.frames)
        shown = [random.integers(total)] if still else self._choose_frames(random, total, found)
        video = row.frames[shown]
        if random.random() < 0.5:  # noqa: PLR2004 - half
            video = video[:, :, ::-1]
            found["direction"] = _OPPOSITE[found["direction"]]
        frames = torch.from_numpy(np.ascontiguousarray(video))
        return augment(frames, self.config.size, random), found

    def _choose_frames(
        self, random: np.random.Generator, total: int, found: dict[str, int]
    ) -> list[int]:
        """Choose frames forward, backward or one repeatedly; updates the direction label."""
        if random.random() < 0.08:  # noqa: PLR2004 - a share
            found["direction"] = 0
            return [int(random.integers(total))] * self.run.shown
        length = (
            (total - 1) * (self.run.shown - 1) / (self.config.frames - 1) * random.uniform(0.8, 1.2)
        )
        start = random.uniform(0, max(0.0, total - 1 - length))
        end = min(total - 1, start + length)
        if random.random() < 0.5:  # noqa: PLR2004 - half
            start, end = end, start
            found["direction"] = _OPPOSITE[found["direction"]]
        return np.linspace(start, end, self.run.shown).round().astype(int).tolist()


@dataclass(frozen=True)
class _Row:
    frames: np.ndarray
    facts: dict[str, Any]


def _rows(folders: Sequence[str]) -> list[_Row]:
    rows = [
        _Row(clip, row["facts"])
        for folder in folders
        for frames, found in read_shards(Path(folder))
        for clip, row in zip(frames, found, strict=True)
    ]
    if not rows:
        raise ConfigError(
            f"No rendered clips found in {', '.join(folders) or 'no folder'}.",
            hint="Run `diorama data render` first.",
        )
    return rows


def _collate(found: list[dict[str, int]]) -> dict[str, Int[Tensor, " n"]]:
    return {name: torch.tensor([one[name] for one in found]) for name in CATEGORIES}


def augment(frames: Tensor, size: int, random: np.random.Generator) -> Float[Tensor, "3 t h w"]:
    """Crop, blur, change brightness and contrast, add noise; only the noise differs by frame."""
    height, width = frames.shape[1:3]
    tall, wide = (round(side * random.uniform(0.9, 1)) for side in (height, width))
    top = random.integers(height - tall + 1)
    left = random.integers(width - wide + 1)
    video = (
        rearrange(frames[:, top : top + tall, left : left + wide], "t h w c -> t c h w").float()
        / 127.5
        - 1
    )
    coarse = size if random.random() < 0.35 else round(size * random.uniform(0.45, 1))  # noqa: PLR2004 - a share
    for side in dict.fromkeys((coarse, size)):
        video = F.interpolate(
            video, size=(side, side), mode="bilinear", antialias=True, align_corners=False
        )
    video = (
        (video - video.mean()) * random.uniform(0.8, 1.2)
        + video.mean()
        + random.uniform(-0.15, 0.15)
    )
    grain = np.float32(random.uniform(0, 0.12)) * random.standard_normal(
        video.shape, dtype=np.float32
    )
    return rearrange((video + torch.from_numpy(grain)).clamp(-1, 1), "t c h w -> c t h w")


def probe_losses(module: nn.Module, batch: object, smoothing: float) -> Losses:
    """Cross-entropy of every category; direction on clips only."""
    assert isinstance(batch, ProbeBatch)
    with torch.autocast("cpu", torch.bfloat16):
        stills = module(batch.stills)
        clips = module(batch.clips)
    parts: dict[str, Tensor] = {}
    for name in CATEGORIES:
        scores = clips.scores[name].float()
        truth = batch.clip_labels[name]
        if name != "direction":
            scores = torch.cat([scores, stills.scores[name].float()])
            truth = torch.cat([truth, batch.still_labels[name]])
        if bool((truth != _IGNORED).any()):
            parts[name] = F.cross_entropy(
                scores, truth, ignore_index=_IGNORED, label_smoothing=smoothing
            )
    return Losses(torch.stack(list(parts.values())).sum(), parts)


@torch.no_grad()
def measure_probe(probe: nn.Module, folder: Path, limit: int) -> dict[str, float]:
    """Return the accuracy per category on whole held-out clips."""
    assert isinstance(probe, Probe)
    correct: dict[str, list[bool]] = {name: [] for name in CATEGORIES}
    for row in _rows((str(folder),))[:limit]:
        truth = label_indices(probe.config, row.facts)
        predicted = predict(probe, torch.from_numpy(np.array(row.frames)))
        for name, index in truth.items():
            if index != _IGNORED:
                correct[name].append(probe.config.labels(name)[index] == getattr(predicted, name))
    return {name: sum(values) / len(values) for name, values in correct.items() if values}


def probe_task(run: ProbeRun, loop: LoopConfig) -> Task:
    """Train the probe on clips and stills; evaluate accuracies on held-out clips."""
    config = run.config
    torch.manual_seed(loop.seed)

    def export(weights: dict[str, Tensor], folder: Path, step: int) -> None:
        save_part(
            folder, "probe", config, weights, dtype=torch.bfloat16, metadata={"step": str(step)}
        )

    return Task(
        module=Probe(config),
        batch=ProbeLoader(run, config, loop.seed),
        losses=lambda module, batch, random: probe_losses(module, batch, run.smoothing),
        evaluate=lambda module, folder, step: measure_probe(
            module, Path(run.held_out), run.measured
        ),
        export=export,
    )


@torch.no_grad()
def frozen_features(
    probe: Probe, folders: Sequence[Path], seed: int
) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n k"]]:
    """Return the frozen feature maps of augmented stills, and their multi-label targets."""
    random = np.random.default_rng(derive_seed(seed, "things"))
    maps: list[Tensor] = []
    targets: list[Tensor] = []
    for frames, rows in (pair for folder in folders for pair in read_shards(folder)):
        for start in range(0, len(frames), _HEAD_BATCH):
            part = frames[start : start + _HEAD_BATCH]
            video = torch.stack(
                [
                    augment(torch.from_numpy(clip[:1].copy()), probe.config.size, random)
                    for clip in part
                ]
            )
            maps.append(probe.far(probe.near(rearrange(video, "b c 1 h w -> b c h w"))).half())
            targets += [
                noun_targets(probe, row["facts"]) for row in rows[start : start + _HEAD_BATCH]
            ]
    return torch.cat(maps), torch.stack(targets)


def noun_targets(probe: Probe, facts: dict[str, Any]) -> Float[Tensor, " k"]:
    """Return 1 for each of the probe's nouns that is a subject of the scene, else 0."""
    return torch.tensor([float(noun in facts["nouns"]) for noun in probe.config.nouns])


def train_head(probe: Probe, maps: Tensor, targets: Tensor, epochs: int, seed: int = 0) -> Probe:
    """Return a probe with a multi-label head, trained by binary cross-entropy.

    All other outputs of the probe stay bit for bit the same.
    """
    torch.manual_seed(seed)
    trained = Probe(replace(probe.config, several=True))
    trained.load_state_dict(probe.state_dict(), strict=False)
    assert trained.things is not None
    optimizer = torch.optim.AdamW(trained.things.parameters(), lr=_HEAD_RATE, weight_decay=0.05)
    steps = epochs * -(-len(maps) // _HEAD_BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _HEAD_RATE, total_steps=steps)
    for _ in range(epochs):
        for index in torch.randperm(len(maps)).split(_HEAD_BATCH):
            scores = trained.things(maps[index].float())
            loss = F.binary_cross_entropy_with_logits(scores, targets[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return trained.eval()


def build_head(stills: Sequence[Path], probe_folder: Path | None, out: Path, epochs: int) -> None:
    """Train the multi-label head of a probe (None: the bundled one) and write both to `out`."""
    probe = load_probe(probe_folder)
    maps, targets = frozen_features(probe, stills, seed=0)
    trained = train_head(probe, maps, targets, epochs)
    save_part(out, "probe", trained.config, trained.state_dict(), dtype=torch.bfloat16)
