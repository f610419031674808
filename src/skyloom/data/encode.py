"""Encode clips to latents and captions to contexts once, before training.

A clip shard becomes a latent shard beside it; the captions of all shards go into one table of
unpadded contexts in bf16. Both steps skip existing results.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from skyloom.core.files import atomic_path
from skyloom.data.shards import read_shards, used_captions
from skyloom.models.base import TextContext

LATENT_SUFFIX = ".latents.safetensors"
Encode = Callable[[Tensor], Tensor]
EncodeText = Callable[[Sequence[str]], TextContext]


def to_pixels(frames: UInt8[Tensor, "n t h w c"]) -> Float[Tensor, "n c t h w"]:
    """Convert frames to floats in [-1, 1]."""
    return rearrange(frames, "n t h w c -> n c t h w").float().div_(127.5).sub_(1)


@torch.no_grad()
def encode_clips(
    folder: Path, encode: Encode, device: torch.device | None = None, batch: int = 10
) -> int:
    """Write `clips-*.latents.safetensors` for each clip shard without one; return their number.

    Encodes in fp32: in bf16 this convolution is wrong on some processors (docs/log.md, 2026-11-25).
    """
    written = 0
    for path in sorted(folder.glob("clips-*.npy")):
        target = folder / f"{path.stem}{LATENT_SUFFIX}"
        if target.exists():
            continue
        frames = torch.from_numpy(np.load(path))
        parts = [
            encode(to_pixels(part.to(device or part.device))).bfloat16().cpu()
            for part in frames.split(batch)
        ]
        with atomic_path(target) as temporary:
            save_file({"latent": torch.cat(parts).contiguous()}, temporary)
        written += 1
    return written


@torch.no_grad()
def encode_captions(
    folders: Iterable[Path], encode: EncodeText, target: Path, batch: int = 128
) -> int:
    """Write one table of contexts for the training captions of all folders; return its length.

    The table holds `tokens` [sum of lengths, d], `lengths` [n] and `pooled` [n d]; the metadata
    holds the captions as a JSON list in the same order. Existing captions are kept; new ones are
    encoded in order of length, and appended in bf16.
    """
    table, known = _read_table(target)
    texts = {""}
    for folder in folders:
        for frames, rows in read_shards(folder):
            texts.update(text for row in rows for text in used_captions(row, frames.shape[1]))
    added = sorted(texts - set(known), key=lambda text: (len(text), text))
    for start in range(0, len(added), batch):
        coded = encode(added[start : start + batch])
        for context, mask in zip(coded.context, coded.context_mask, strict=True):
            table["tokens"].append(context[mask].bfloat16())
            table["lengths"].append(mask.sum()[None])
        assert coded.pooled is not None, "training uses encoders with pooled vectors"
        table["pooled"].append(coded.pooled.bfloat16())
    merged = {name: torch.cat(parts) for name, parts in table.items()}
    with atomic_path(target) as temporary:
        save_file(merged, temporary, metadata={"captions": json.dumps([*known, *added])})
    return len(known) + len(added)


def _read_table(path: Path) -> tuple[dict[str, list[Tensor]], list[str]]:
    """Read an existing table and its captions; empty if there is no file."""
    if not path.exists():
        return {"tokens": [], "lengths": [], "pooled": []}, []
    with safe_open(path, framework="pt") as file:
        parts = {name: [file.get_tensor(name)] for name in ("tokens", "lengths", "pooled")}
        return parts, json.loads(file.metadata()["captions"])
