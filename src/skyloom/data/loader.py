"""Training batches as a function of (seed, step)."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from skyloom.core.errors import ConfigError
from skyloom.core.seeds import derive_seed
from skyloom.data.encode import LATENT_SUFFIX, to_pixels
from skyloom.data.shards import clip_frames, read_shards, used_captions

_PAD = 8

SelectRows = Callable[[Path, Sequence[dict[str, Any]]], list[bool]]
"""Which rows of a shard in a folder are used."""


class PixelLoader:
    """Random crops in space and time from rendered clips, for the autoencoder."""

    def __init__(
        self, folders: Sequence[Path], batch: int, frames: int, crop: int, seed: int
    ) -> None:
        self.shards = [frames for folder in folders for frames, _ in read_shards(folder)]
        if not self.shards:
            raise ConfigError(
                f"No rendered clips found in {', '.join(map(str, folders))}.",
                hint="Put shards of clips there first.",
            )
        self.batch = batch
        self.frames = frames
        self.crop = crop
        self.seed = seed

    def __call__(self, step: int) -> Float[Tensor, "b 3 t h w"]:
        """Load the batch of one step: pixels in [-1, 1], half of the samples mirrored."""
        random = np.random.default_rng(derive_seed(self.seed, "pixels", step))
        return to_pixels(torch.from_numpy(np.stack([self._one(random) for _ in range(self.batch)])))

    def _one(self, random: np.random.Generator) -> np.ndarray:
        shard = self.shards[random.integers(len(self.shards))]
        clips, frames, height, width, _ = shard.shape
        start = random.integers(frames - self.frames + 1)
        top = random.integers(height - self.crop + 1)
        left = random.integers(width - self.crop + 1)
        clip = shard[random.integers(clips), start : start + self.frames]
        clip = clip[:, top : top + self.crop, left : left + self.crop]
        return clip[:, :, ::-1] if random.random() < 0.5 else clip  # noqa: PLR2004


class CaptionTable:
    """Encoded captions, indexed by text."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            captions = json.loads(file.metadata()["captions"])
            self.tokens = file.get_tensor("tokens")
            lengths = file.get_tensor("lengths")
            self.pooled = file.get_tensor("pooled")
        self.index = {text: row for row, text in enumerate(captions)}
        self.ends = lengths.cumsum(0).tolist()

    def gather(
        self, rows: Sequence[int]
    ) -> tuple[Float[Tensor, "b m d"], Bool[Tensor, "b m"], Float[Tensor, "b p"]]:
        """Return padded contexts, their masks and the pooled vectors of rows."""
        pieces = [self.tokens[self.ends[row - 1] if row else 0 : self.ends[row]] for row in rows]
        length = -(-max(map(len, pieces)) // _PAD) * _PAD
        context = torch.zeros(len(rows), length, self.tokens.shape[1])
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        for index, piece in enumerate(pieces):
            context[index, : len(piece)] = piece.float()
            mask[index, : len(piece)] = True
        return context, mask, self.pooled[list(rows)].float()


@dataclass(frozen=True)
class LatentBatch:
    """Latents of one shape with the rows of their captions.

    frame_indices: for part of a longer video, the indices of the latent frames in it. The first
    `past` frames are those that a rollout has cached and the others are its next window; with
    past = 0 all are a run from within the video.
    """

    latent: Float[Tensor, "b c t h w"]
    rows: tuple[int, ...]
    table: CaptionTable
    frame_indices: Int[Tensor, " t"] | None = None
    past: int = 0

    def captions(
        self, dropped: Bool[Tensor, " b"], hidden: Bool[Tensor, " b"] | None = None
    ) -> tuple[Float[Tensor, "b m d"], Bool[Tensor, "b m"], Float[Tensor, "b p"]]:
        """Return context, mask and pooled vector per sample.

        dropped: samples that get the empty caption. hidden: samples without the tokens' own word
        vectors.
        """
        empty = self.table.index[""]
        rows = [
            empty if drop else row for row, drop in zip(self.rows, dropped.tolist(), strict=True)
        ]
        device = self.latent.device
        context, mask, pooled = self.table.gather(rows)
        if hidden is not None:
            half = context.shape[-1] // 2
            context[hidden.cpu(), :, half:] = 0
            pooled[hidden.cpu(), half : 2 * half] = 0
        return context.to(device), mask.to(device), pooled.to(device)


@dataclass(frozen=True)
class LatentSource:
    """A folder of encoded clips, its relative share of the batches, and its batch size.

    rollout: (sink, recent, window) latent frames; samples are windows of a longer video after its
        first `sink + recent` frames.
    excerpt: largest length of a sample in latent frames; a sample starts after at least as many
        frames, like a span generated in the middle of a video.
    """

    folder: str = ""
    share: float = 1.0
    batch: int = 16
    rollout: tuple[int, ...] = ()
    excerpt: int = 0

    def __post_init__(self) -> None:
        if self.rollout and self.excerpt:
            raise ConfigError(
                "A source must have only one of rollout and excerpt.",
                hint="Add the folder twice.",
            )
        valid = len(self.rollout) == len(("sink", "recent", "window")) and min(self.rollout) >= 1
        if self.rollout and not valid:
            raise ConfigError(
                f"rollout must be sink, recent and window, each >= 1, got {self.rollout}.",
                hint="Example: [3, 3, 3].",
            )


class _LatentStore:
    """Memory-mapped latents of many shards, with the caption rows of each sample."""

    def __init__(self) -> None:
        self._shards: list[Tensor] = []
        self._positions: list[tuple[int, int]] = []
        self.captions: list[tuple[int, ...]] = []

    def add(
        self, latents: Tensor, captions: Sequence[tuple[int, ...]], keep: Sequence[bool]
    ) -> None:
        """Add the samples of a shard that are to be kept."""
        for index, keeping in enumerate(keep):
            if keeping:
                self._positions.append((len(self._shards), index))
                self.captions.append(captions[index])
        self._shards.append(latents)

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, picked: Sequence[int]) -> Float[Tensor, "b c t h w"]:
        return torch.stack(
            [self._shards[shard][index] for shard, index in (self._positions[i] for i in picked)]
        )


class LatentLoader:
    """Batches of latents; each batch comes from one source, drawn by share.

    A source's folder may be a pattern like `data/stills*`; new folders are found at the next start.
    The batch of a step depends on (seed, step) and on the folders alone. select_rows: which rows of
    a shard are used; None uses all.
    """

    def __init__(
        self,
        sources: Sequence[LatentSource],
        table: CaptionTable,
        seed: int,
        device: str = "cpu",
        *,
        select_rows: SelectRows | None = None,
    ) -> None:
        self.sources = sources
        self.table = table
        self.seed = seed
        self.device = device
        self.select_rows = select_rows
        self.loaded = [self._load(source.folder) for source in sources]
        shares = np.array([source.share for source in sources], dtype=float)
        self.shares = shares / shares.sum()

    def _load(self, pattern: str) -> _LatentStore:
        """Read the selected rows of the folders of a pattern."""
        store = _LatentStore()
        parts = Path(pattern)
        for folder in sorted(parts.parent.glob(parts.name)):
            for rows_file in sorted(folder.glob("clips-*.json")):
                latents = rows_file.parent / f"{rows_file.stem}{LATENT_SUFFIX}"
                if not latents.exists():
                    raise ConfigError(f"{folder} is not encoded.", hint="Encode its clips first.")
                rows = json.loads(rows_file.read_text())
                count = clip_frames(rows_file)
                captions = [
                    tuple(self.table.index[text] for text in used_captions(row, count))
                    for row in rows
                ]
                keep = self.select_rows(folder, rows) if self.select_rows else [True] * len(rows)
                store.add(load_file(latents)["latent"], captions, keep)
        if not len(store):
            raise ConfigError(f"{pattern} is not encoded.", hint="Encode its clips first.")
        return store

    def __call__(self, step: int) -> LatentBatch:
        """Load the batch of one step."""
        random = np.random.default_rng(derive_seed(self.seed, "latents", step))
        which = int(random.choice(len(self.sources), p=self.shares))
        source = self.sources[which]
        loaded = self.loaded[which]
        picked = random.integers(len(loaded), size=source.batch)
        rows = tuple(loaded.captions[i][random.integers(len(loaded.captions[i]))] for i in picked)
        latent = loaded[picked.tolist()]
        if source.rollout:
            indices = rollout_frame_indices(latent.shape[2], source.rollout, random)
        elif source.excerpt:
            indices = excerpt_frame_indices(latent.shape[2], source.excerpt, random)
        else:
            return LatentBatch(latent.float().to(self.device), rows, self.table)
        latent = latent[:, :, indices].float().to(self.device)
        past = sum(source.rollout[:2])
        return LatentBatch(latent, rows, self.table, indices.to(self.device), past)


def rollout_frame_indices(
    frames: int, rollout: Sequence[int], random: np.random.Generator
) -> Int[Tensor, " t"]:
    """Return the latent frames visible to a random window: sink, recent, and its own."""
    sink, recent, window = rollout
    starts = range(sink + recent, frames - window + 1, window)
    if not starts:
        minimum = sink + recent + window
        raise ConfigError(
            f"Videos for a rollout must have >= {minimum} latent frames, got {frames}."
        )
    start = starts[random.integers(len(starts))]
    return torch.tensor([*range(sink), *range(start - recent, start + window)])


def excerpt_frame_indices(
    frames: int, max_length: int, random: np.random.Generator
) -> Int[Tensor, " t"]:
    """Return a random run of (max_length / 2, max_length] frames after the first `max_length`."""
    if frames < 2 * max_length:
        raise ConfigError(
            f"Videos for an excerpt must have >= {2 * max_length} latent frames, got {frames}."
        )
    length = int(random.integers(max_length // 2 + 1, max_length + 1))
    start = int(random.integers(max_length, frames - length + 1))
    return torch.arange(start, start + length)
