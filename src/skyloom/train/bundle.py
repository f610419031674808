r"""Put trained parts together into one model folder with a manifest: what `skyloom generate` loads.

python -m skyloom.train.bundle --autoencoder A --text T --transformer D --data CLIPS... --ledger FILE \
    --info recipes/diorama.json [--from MODEL] --out FOLDER
"""

import argparse
import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import safe_open

from skyloom.core.version import __version__
from skyloom.data.clips import digest, read_plan, read_shards
from skyloom.models.checkpoint import read_manifest, write_manifest
from skyloom.train.run_log import Record


def bundle(
    parts: dict[str, Path],
    data: list[Path],
    ledger: Path,
    out: Path,
    info: dict[str, Any],
    earlier: dict[str, Any] | None = None,
) -> None:
    """Copy `PART*.safetensors` of every part into `out` and write the manifest.

    `info` holds what the pipeline needs (sizes, fps, frames, defaults); digests of data and licence
    ledger and a summary of each run's log are added. Where training went on from a model, what it was trained on and
    how, in its `earlier` manifest, is kept.
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
    training = {name: summary for name, folder in parts.items() if (summary := summarise(folder))}
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
    """How many numbers a part holds."""
    total = 0
    for path in folder.glob(f"{part}*.safetensors"):
        with safe_open(path, framework="np") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
        total += sum(math.prod(shape) for shape in shapes)
    return total


def describe(folder: Path) -> dict[str, Any]:
    """The plan of a folder of clips, how many there are, and their digest."""
    return {
        **asdict(read_plan(folder)),
        "count": sum(len(rows) for _, rows in read_shards(folder)),
        "digest": digest(folder),
    }


def summarise(folder: Path) -> dict[str, Any]:
    """Steps, minutes and the last measurement of a run, from its log."""
    record = Record(folder) if (folder / "log.jsonl").exists() else None
    if record is None:
        return {}
    steps, measured = record.lines("step"), record.lines("evaluate")
    seconds = 0.0
    for before, after in zip([{"seconds": 0.0}, *steps], steps, strict=False):
        seconds += after["seconds"] - (
            before["seconds"] if after["seconds"] > before["seconds"] else 0.0
        )
    return {
        "steps": steps[-1]["step"],
        "minutes": round(seconds / 60, 1),
        "recipe": (folder / "recipe.toml").read_text(),
        "measured": measured[-1] if measured else {},
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("autoencoder", "text", "transformer", "ledger", "info", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument(
        "--from", dest="earlier", type=Path, help="the model that training went on from"
    )
    given = parser.parse_args()
    parts = {"vae": given.autoencoder, "text": given.text, "dit": given.transformer}
    earlier = None if given.earlier is None else read_manifest(given.earlier)
    bundle(parts, given.data, given.ledger, given.out, json.loads(given.info.read_text()), earlier)


if __name__ == "__main__":
    main()
