"""Training batches by step number: the same (seed, step) always gives the same batch."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from skyloom.core.errors import ConfigError
from skyloom.core.seeds import derive_seed
from skyloom.data.clips import PLAN_FILE, is_row_held_out, read_plan, read_shards, used_captions
from skyloom.data.encode import LATENT_SUFFIX, to_pixels

_PAD = 8


class PixelLoader:
    """Random crops in space and time from rendered clips, for the autoencoder."""

    def __init__(
        self, folders: Sequence[Path], batch: int, frames: int, crop: int, seed: int
    ) -> None:
        self.shards = [frames for folder in folders for frames, _ in read_shards(folder)]
        if not self.shards:
            raise ConfigError(
                f"No rendered clips in {', '.join(map(str, folders))}.", hint="Render first."
            )
        self.batch, self.frames, self.crop, self.seed = batch, frames, crop, seed

    def __call__(self, step: int) -> Float[Tensor, "b 3 t h w"]:
        """The batch of one step: pixels in [-1, 1], half of them mirrored."""
        random = np.random.default_rng(derive_seed(self.seed, "pixels", step))
        return to_pixels(torch.from_numpy(np.stack([self._one(random) for _ in range(self.batch)])))

    def _one(self, random: np.random.Generator) -> np.ndarray:
        shard = self.shards[random.integers(len(self.shards))]
        clips, frames, height, width, _ = shard.shape
        start = random.integers(frames - self.frames + 1)
        top, left = random.integers(height - self.crop + 1), random.integers(width - self.crop + 1)
        clip = shard[random.integers(clips), start : start + self.frames]
        clip = clip[:, top : top + self.crop, left : left + self.crop]
        return clip[:, :, ::-1] if random.random() < 0.5 else clip  # noqa: PLR2004


class CaptionTable:
    """Contexts of every caption, looked up by text."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            captions = json.loads(file.metadata()["captions"])
            self.tokens, lengths = file.get_tensor("tokens"), file.get_tensor("lengths")
            self.pooled = file.get_tensor("pooled")
        self.index = {text: row for row, text in enumerate(captions)}
        self.ends = lengths.cumsum(0).tolist()

    def gather(
        self, rows: Sequence[int]
    ) -> tuple[Float[Tensor, "b m d"], Bool[Tensor, "b m"], Float[Tensor, "b p"]]:
        """Padded contexts, their masks and the pooled vectors of some rows."""
        pieces = [self.tokens[self.ends[row - 1] if row else 0 : self.ends[row]] for row in rows]
        longest = -(-max(map(len, pieces)) // _PAD) * _PAD
        context = torch.zeros(len(rows), longest, self.tokens.shape[1])
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for index, piece in enumerate(pieces):
            context[index, : len(piece)] = piece.float()
            mask[index, : len(piece)] = True
        return context, mask, self.pooled[list(rows)].float()


@dataclass(frozen=True)
class LatentBatch:
    """Latents of one shape with the rows of their captions.

    Of a longer video, `numbers` says which of its latent frames these are: the first `past` are what a rollout
    remembers, the others its next window; without a past they are a run from its middle.
    """

    latent: Float[Tensor, "b c t h w"]
    rows: tuple[int, ...]
    table: CaptionTable
    numbers: Int[Tensor, " t"] | None = None
    past: int = 0

    def captions(
        self, dropped: Bool[Tensor, " b"], hidden: Bool[Tensor, " b"] | None = None
    ) -> tuple[Float[Tensor, "b m d"], Bool[Tensor, "b m"], Float[Tensor, "b p"]]:
        """Context, mask and pooled vector of each sample; dropped ones get the empty caption.

        Of the `hidden` ones the words' own vectors are left out: what the encoder's layers make of them must do.
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
    """One folder of encoded clips, its share of the batches, and how many samples a batch takes.

    With a `rollout` of (sink, recent, window) latent frames, what is learned is a window of a longer video, somewhere
    behind its first `sink + recent` frames. With an `excerpt`, it is a run of up to that many latent frames that begins
    after as many, as an edit in the middle of a video sees it.
    """

    folder: str = ""
    share: float = 1.0
    batch: int = 16
    rollout: tuple[int, ...] = ()
    excerpt: int = 0

    def __post_init__(self) -> None:
        if self.rollout and self.excerpt:
            raise ConfigError(
                "A source is a rollout or an excerpt, not both.", hint="Name the folder twice."
            )
        if self.rollout and (
            len(self.rollout) != len(("sink", "recent", "window")) or min(self.rollout) < 1
        ):
            raise ConfigError(
                f"A rollout of {self.rollout} is none.",
                hint="Name sink, recent and window, like 3, 3, 3.",
            )


class _LatentStore:
    """Latents of many shards, read from the files as they are needed, and the rows of each one's captions."""

    def __init__(self) -> None:
        self._shards: list[Tensor] = []
        self._places: list[tuple[int, int]] = []
        self.captions: list[tuple[int, ...]] = []

    def add(
        self, latents: Tensor, captions: Sequence[tuple[int, ...]], keep: Sequence[bool]
    ) -> None:
        """Take a shard; samples that are not kept are left out."""
        for index, keeping in enumerate(keep):
            if keeping:
                self._places.append((len(self._shards), index))
                self.captions.append(captions[index])
        self._shards.append(latents)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, picked: Sequence[int]) -> Float[Tensor, "b c t h w"]:
        return torch.stack(
            [self._shards[shard][index] for shard, index in (self._places[i] for i in picked)]
        )


class LatentLoader:
    """Batches of latents; each batch comes from one source, drawn by share.

    A source's folder may be a pattern like `data/stills*`: rendered folders that were added are used from the next
    start on. The batch of a step depends on (seed, step) and on the folders alone.
    """

    def __init__(
        self, sources: Sequence[LatentSource], table: CaptionTable, seed: int, device: str = "cpu"
    ) -> None:
        self.sources, self.table, self.seed, self.device = sources, table, seed, device
        self.loaded = [self._load(source.folder) for source in sources]
        shares = np.array([source.share for source in sources], dtype=float)
        self.shares = shares / shares.sum()

    def _load(self, pattern: str) -> _LatentStore:
        """Read every folder of a pattern; held-out pairs are left out of training, whenever they were rendered."""
        store = _LatentStore()
        parts = Path(pattern)
        for folder in sorted(parts.parent.glob(parts.name)):
            frames = read_plan(folder).frames if (folder / PLAN_FILE).exists() else None
            training = frames is not None and read_plan(folder).split == "train"
            for rows_file in sorted(folder.glob("clips-*.json")):
                latents = rows_file.parent / f"{rows_file.stem}{LATENT_SUFFIX}"
                if not latents.exists():
                    raise ConfigError(
                        f"{folder} is not encoded.", hint="Run `skyloom data encode` on it first."
                    )
                rows = json.loads(rows_file.read_text())
                count = frames or int(
                    np.load(rows_file.with_suffix(".npy"), mmap_mode="r").shape[1]
                )
                captions = [
                    tuple(self.table.index[text] for text in used_captions(row, count))
                    for row in rows
                ]
                store.add(
                    load_file(latents)["latent"],
                    captions,
                    [not (training and is_row_held_out(row)) for row in rows],
                )
        if not len(store):
            raise ConfigError(
                f"{pattern} is not encoded.", hint="Run `skyloom data encode` on it first."
            )
        return store

    def __call__(self, step: int) -> LatentBatch:
        """The batch of one step."""
        random = np.random.default_rng(derive_seed(self.seed, "latents", step))
        which = int(random.choice(len(self.sources), p=self.shares))
        source, loaded = self.sources[which], self.loaded[which]
        picked = random.integers(len(loaded), size=source.batch)
        rows = tuple(loaded.captions[i][random.integers(len(loaded.captions[i]))] for i in picked)
        latent = loaded[picked.tolist()]
        if source.rollout:
            numbers = rollout_numbers(latent.shape[2], source.rollout, random)
        elif source.excerpt:
            numbers = excerpt_numbers(latent.shape[2], source.excerpt, random)
        else:
            return LatentBatch(latent.float().to(self.device), rows, self.table)
        latent, where = latent[:, :, numbers].float().to(self.device), numbers.to(self.device)
        return LatentBatch(latent, rows, self.table, where, sum(source.rollout[:2]))


def rollout_numbers(
    frames: int, rollout: Sequence[int], random: np.random.Generator
) -> Int[Tensor, " t"]:
    """The latent frames that a window of a rollout sees: first ones, those right before, and its own."""
    sink, recent, window = rollout
    starts = range(sink + recent, frames - window + 1, window)
    if not starts:
        raise ConfigError(f"A video of {frames} latent frames has no window after {sink + recent}.")
    start = starts[random.integers(len(starts))]
    return torch.tensor([*range(sink), *range(start - recent, start + window)])


def excerpt_numbers(frames: int, most: int, random: np.random.Generator) -> Int[Tensor, " t"]:
    """A run of more than half of `most` latent frames, up to all, that begins after the first `most`."""
    if frames < 2 * most:
        raise ConfigError(
            f"A video of {frames} latent frames has no {most} after its first {most}."
        )
    length = int(random.integers(most // 2 + 1, most + 1))
    start = int(random.integers(most, frames - length + 1))
    return torch.arange(start, start + length)
