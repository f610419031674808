"""Render clips into shards (skyloom.data.shards); rows hold captions and facts.

Shard i holds the clips of seeds `first_seed + i * per_shard ...`, so rendering resumes, can be
split over processes and machines, and is reproducible byte by byte.
"""

import json
import multiprocessing
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from diorama.world.assets import load_atlas
from diorama.world.make import make_clip
from diorama.world.scene import STILL_SECONDS, Split
from diorama.world.subject import is_held_out
from diorama.world.vocabulary import find_vocabulary
from skyloom.core.errors import ConfigError
from skyloom.core.files import atomic_path
from skyloom.core.seeds import derive_seed
from skyloom.data.shards import PLAN_FILE


@dataclass(frozen=True)
class ClipPlan:
    """Plan of a rendered dataset: `count` clips of one shape, with seeds from `first_seed` on."""

    vocabulary: str = "small"
    count: int = 1000
    frames: int = 33
    height: int = 128
    width: int = 128
    fps: int = 16
    first_seed: int = 0
    split: Split = "train"
    per_shard: int = 100

    @property
    def shards(self) -> int:
        """Number of files."""
        return -(-self.count // self.per_shard)


def parse_split(text: str) -> Split:
    """Parse the name of a split. Raises ConfigError."""
    for split in get_args(Split):
        if split == text:
            return split
    raise ConfigError(f"split must be one of {', '.join(get_args(Split))}, got {text!r}.")


def render_clips(plan: ClipPlan, atlas_folder: Path, folder: Path, processes: int = 1) -> int:
    """Render the missing shards; return their number."""
    folder.mkdir(parents=True, exist_ok=True)
    _check_plan(plan, folder / PLAN_FILE)
    missing = [index for index in range(plan.shards) if not _shard(folder, index).exists()]
    jobs = [(plan, atlas_folder, folder, index) for index in missing]
    if processes > 1:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            pool.starmap(_render_shard, jobs, chunksize=1)
    else:
        for job in jobs:
            _render_shard(*job)
    return len(missing)


def read_plan(folder: Path) -> ClipPlan:
    """Read the plan of a folder."""
    return ClipPlan(**json.loads((folder / PLAN_FILE).read_text()))


def is_row_held_out(row: dict[str, Any]) -> bool:
    """Whether a clip shows a held-out pair of noun and place, or of noun and motion."""
    facts = row["facts"]
    return is_held_out(facts["noun"], facts["place"]) or is_held_out(facts["noun"], facts["motion"])


def select_rows(folder: Path, rows: Sequence[dict[str, Any]]) -> list[bool]:
    """Return which rows may be trained on: in folders of the training split, no held-out pair."""
    training = (folder / PLAN_FILE).exists() and read_plan(folder).split == "train"
    return [not (training and is_row_held_out(row)) for row in rows]


def digest(folder: Path) -> str:
    """Return the sha256 over all rows, which identifies the training data in a manifest."""
    total = sha256()
    for path in sorted(folder.glob("clips-*.json")):
        total.update(path.read_bytes())
    return total.hexdigest()


def _shard(folder: Path, index: int) -> Path:
    return folder / f"clips-{index:05d}.npy"


def _check_plan(plan: ClipPlan, path: Path) -> None:
    expected = asdict(plan)
    if not path.exists():
        path.write_text(json.dumps(expected, indent=1))
        return
    found = json.loads(path.read_text())
    if {**found, "count": 0} != {**expected, "count": 0}:
        raise ConfigError(
            f"{path.parent} contains clips of another plan.", hint="Use another folder."
        )


def moment(plan: ClipPlan, seed: int) -> np.ndarray | None:
    """Time of a still in seconds: the start of the scene for even seeds, random for odd ones."""
    if plan.frames > 1:
        return None
    share = (derive_seed(seed, "moment") % 1000) / 1000
    return np.array([STILL_SECONDS * share if seed % 2 else 0.0])


def _render_shard(plan: ClipPlan, atlas_folder: Path, folder: Path, index: int) -> None:
    torch.set_num_threads(1)
    atlas = load_atlas(atlas_folder)
    vocabulary = find_vocabulary(plan.vocabulary)
    first = index * plan.per_shard
    frames: list[np.ndarray] = []
    rows: list[dict[str, Any]] = []
    for number in range(first, min(first + plan.per_shard, plan.count)):
        seed = plan.first_seed + number
        clip = make_clip(
            seed,
            vocabulary,
            atlas,
            frames=plan.frames,
            height=plan.height,
            width=plan.width,
            fps=plan.fps,
            split=plan.split,
            times=moment(plan, seed),
        )
        frames.append(clip.frames.numpy())
        digest_of_clip = sha256(clip.frames.numpy().tobytes()).hexdigest()
        captions = asdict(clip.captions)
        rows.append(
            {
                "seed": seed,
                "captions": captions,
                "facts": asdict(clip.facts),
                "sha256": digest_of_clip,
            }
        )
    path = _shard(folder, index)
    path.with_suffix(".json").write_text(json.dumps(rows))
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, np.stack(frames))
