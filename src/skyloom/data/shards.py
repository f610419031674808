"""Shards of clips on disk: uint8 frames in `clips-*.npy`, a JSON row per clip beside them.

A row holds at least `seed` and `captions`, a text per length: short, medium and long. `plan.json`
in the folder says how the clips were made.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

PLAN_FILE = "plan.json"


def read_shards(folder: Path) -> Iterator[tuple[np.ndarray, list[dict[str, Any]]]]:
    """Yield finished shards in order: frames uint8 [n t h w c] (memory-mapped), a row per clip."""
    for path in sorted(folder.glob("clips-*.npy")):
        yield np.load(path, mmap_mode="r"), json.loads(path.with_suffix(".json").read_text())


def clip_frames(rows_file: Path) -> int:
    """Return the frames per clip of a shard: from the plan if there is one, else from the clips."""
    plan = rows_file.parent / PLAN_FILE
    if plan.exists():
        return json.loads(plan.read_text())["frames"]
    return int(np.load(rows_file.with_suffix(".npy"), mmap_mode="r").shape[1])


def used_captions(row: dict[str, Any], frames: int) -> tuple[str, ...]:
    """Select the captions for training: medium and short or long; one for a still."""
    captions = row["captions"]
    seed = row["seed"]
    if frames == 1:
        return (captions[("medium", "short", "medium", "long")[seed // 2 % 4]],)
    return captions["medium"], captions["short" if seed % 2 else "long"]
