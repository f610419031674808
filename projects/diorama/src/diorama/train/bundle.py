"""Assemble trained parts into one model folder with a manifest, as `skyloom generate` loads it."""

import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import safe_open

from diorama.clips import digest, read_plan
from skyloom.core.version import __version__
from skyloom.data.shards import read_shards
from skyloom.models.checkpoint import write_manifest
from skyloom.train.run_log import RunLog


def bundle(
    parts: dict[str, Path],
    data: list[Path],
    ledger: Path,
    out: Path,
    info: dict[str, Any],
    earlier: dict[str, Any] | None = None,
) -> None:
    """Copy `PART*.safetensors` of every part into `out` and write the manifest.

    info: settings of the pipeline (sizes, fps, frames, defaults). Digests of data and licence
    ledger and a summary of each run's log are added. earlier: manifest of the model that training
    continued from; its data and training entries are kept.
    """
    before = earlier or {}
    out.mkdir(parents=True, exist_ok=True)
    for name, folder in parts.items():
        for old in out.glob(f"{name}*.safetensors"):
            if old.parent != folder:
                old.unlink()
        for path in sorted(folder.glob(f"{name}*.safetensors")):
            if path.parent != out:
                shutil.copy2(path, out / path.name)
    training = {name: summary for name, folder in parts.items() if (summary := summarize(folder))}
    write_manifest(
        out,
        {
            **info,
            "parameters": count_parameters(out, "dit"),
            "version": __version__,
            "data": {
                **before.get("data", {}),
                **{folder.name: describe(folder) for folder in data},
            },
            "ledger": ledger.read_text().strip(),
            "training": {**before.get("training", {}), **training},
        },
    )


def count_parameters(folder: Path, part: str) -> int:
    """Count the parameters of a part."""
    total = 0
    for path in folder.glob(f"{part}*.safetensors"):
        with safe_open(path, framework="np") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
        total += sum(math.prod(shape) for shape in shapes)
    return total


def describe(folder: Path) -> dict[str, Any]:
    """Return the plan, count and digest of a folder of clips."""
    return {
        **asdict(read_plan(folder)),
        "count": sum(len(rows) for _, rows in read_shards(folder)),
        "digest": digest(folder),
    }


def summarize(folder: Path) -> dict[str, Any]:
    """Return steps, minutes and the last evaluation of a run, from its log."""
    if not (folder / "log.jsonl").exists():
        return {}
    log = RunLog(folder)
    steps = log.lines("step")
    measured = log.lines("evaluate")
    seconds = 0.0
    for before, after in zip([{"seconds": 0.0}, *steps], steps, strict=False):
        resumed = after["seconds"] <= before["seconds"]  # a new process counts from 0
        seconds += after["seconds"] - (0.0 if resumed else before["seconds"])
    return {
        "steps": steps[-1]["step"],
        "minutes": round(seconds / 60, 1),
        "recipe": (folder / "recipe.toml").read_text(),
        "measured": measured[-1] if measured else {},
    }
