"""Models on disk: the bundled one and any folder with a manifest. Needs no torch."""

import difflib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from skyloom.core.config import from_table, to_table
from skyloom.core.errors import CheckpointError, ConfigError, RequestError
from skyloom.models.family import ModelFamily, Quality, Rollout, Schedule, SizeRule

BUNDLED = Path(__file__).parent.parent / "bundled"
DEFAULT_MODEL = "diorama"
MANIFEST_FILE = "manifest.json"
MEMORY_PER_FILE_BYTE = 1.5  # weights may be stored in fewer bits; activations take the rest
REPAIR = "Install skyloom again, or pass a complete model folder to --model."
FAMILIES = {"diorama": "skyloom.models.diorama"}
"""Packages of the model families; imported when a model of the family is used."""
_FORMER_NAMES = {"skyloom": "diorama"}  # in manifests of version 0.1


@dataclass(frozen=True)
class ModelInfo:
    """Manifest of a model, completed by the record of its family.

    family: as the manifest names it. size_rule: sizes that it generates. frames: native window in
    frames.
    """

    name: str
    family: str
    licence: str
    description: str
    size_rule: SizeRule
    fps: int
    frames: int
    num_steps: int
    guidance_scale: float
    schedule: Schedule
    parameters: int
    folder: Path
    manifest: dict[str, Any] = field(repr=False, compare=False)

    @property
    def sizes(self) -> tuple[str, ...]:
        """Every size as "WIDTHxHEIGHT", the default first."""
        return self.size_rule.sizes

    @property
    def record(self) -> ModelFamily:
        """Properties of the model's family."""
        return find_family(self.family)

    @property
    def knows(self) -> Mapping[str, tuple[str, ...]]:
        """Words that a prompt may use, by kind; empty for an open vocabulary."""
        words = self.manifest.get("knows")
        if words is None:
            return self.record.knows
        return {kind: tuple(names) for kind, names in words.items()}

    @property
    def edit_verbs(self) -> tuple[str, ...]:
        """Edit verbs that the model can do."""
        return tuple(self.manifest.get("edit_verbs", self.record.edit_verbs))

    @property
    def qualities(self) -> dict[str, Quality]:
        """Qualities by name: "best", and "fast" if the model has a distilled student.

        The manifest has `student_steps`, or `student: true` for the family's number of steps.
        """
        best = {"best": Quality(self.num_steps, self.guidance_scale)}
        few = self.record.few_step
        steps = self.manifest.get("student_steps")
        if steps is None and not self.manifest.get("student", False):
            return best
        return {"fast": few if steps is None else replace(few, num_steps=int(steps)), **best}

    @property
    def quality(self) -> str:
        """Name of the default quality."""
        return next(iter(self.qualities))

    @property
    def noise_correlation(self) -> float:
        """Correlation of the noise of neighbouring latent frames in training; 0 is independent."""
        return float(self.manifest.get("noise_correlation", 0.0))

    @property
    def steadiness(self) -> float:
        """Change between latent frames that decoding smooths as jitter; 0 turns smoothing off."""
        return float(self.manifest.get("steadiness", 0.0))

    @property
    def rollout(self) -> Rollout | None:
        """Settings for videos longer than the native window; None if unsupported."""
        values = self.manifest.get("rollout")
        return None if values is None else Rollout(**values)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a model folder's manifest: model settings and file hashes. Raises CheckpointError."""
    path = folder / MANIFEST_FILE
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}).", hint=REPAIR) from error


def family_module(family: str, name: str) -> ModuleType:
    """Import a module of a family's package. Raises CheckpointError for an unknown family."""
    package = FAMILIES.get(_FORMER_NAMES.get(family, family))
    if package is None:
        raise CheckpointError(
            f"family must be one of {', '.join(FAMILIES)}, got {family!r}.",
            hint="The model needs another version of skyloom.",
        )
    return import_module(f"{package}.{name}")


def find_family(family: str) -> ModelFamily:
    """Return the record of a family. Raises CheckpointError for an unknown one."""
    record: ModelFamily = family_module(family, "config").FAMILY
    return record


def read_model(folder: Path) -> ModelInfo:
    """Read the model in a folder; its family's record supplies what the manifest leaves out.

    Raises CheckpointError for a missing or damaged manifest.
    """
    manifest = read_manifest(folder)
    missing = [name for name in ("name", "family") if name not in manifest]
    if missing:
        raise CheckpointError(
            f"{folder / MANIFEST_FILE} lacks {', '.join(map(repr, missing))}.",
            hint=REPAIR,
        )
    record = find_family(manifest["family"])
    shared = ("licence", "fps", "frames", "num_steps", "guidance_scale")
    values: dict[str, Any] = {name: manifest.get(name, getattr(record, name)) for name in shared}
    return ModelInfo(
        **values,
        name=manifest["name"],
        family=manifest["family"],
        description=manifest.get("description", ""),
        size_rule=_size_rule(folder, manifest, record),
        schedule=_schedule(folder, manifest, record),
        parameters=manifest.get("parameters", 0),
        folder=folder,
        manifest=manifest,
    )


def _size_rule(folder: Path, manifest: Mapping[str, Any], record: ModelFamily) -> SizeRule:
    """Read `sizes`: a list of "WIDTHxHEIGHT", a table with the fields of SizeRule, or left out."""
    sizes: Any = manifest.get("sizes")
    if sizes is None:
        return record.sizes
    where = str(folder / MANIFEST_FILE)
    try:
        if isinstance(sizes, dict):
            return from_table(cast(Any, sizes), SizeRule, where)
        return SizeRule.of_sizes(tuple(sizes))
    except (ConfigError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"sizes in {where} must be a list of WIDTHxHEIGHT or a table, got {sizes!r:.80}.",
            hint=REPAIR,
        ) from error


def _schedule(folder: Path, manifest: Mapping[str, Any], record: ModelFamily) -> Schedule:
    """Read `schedule`, a table with fields of Schedule, and `shift`; both may be left out."""
    try:
        values = {**to_table(record.schedule), **manifest.get("schedule", {})}
        if "shift" in manifest:
            values["shift"] = manifest["shift"]
        return from_table(values, Schedule, "schedule")
    except (ConfigError, TypeError) as error:
        raise CheckpointError(
            f"The schedule in {folder / MANIFEST_FILE} is not valid: {error}", hint=REPAIR
        ) from error


def list_models(root: Path = BUNDLED) -> list[ModelInfo]:
    """List the models under a folder, sorted by folder name."""
    return [read_model(path.parent) for path in sorted(root.glob(f"*/{MANIFEST_FILE}"))]


def find_model(name: str, root: Path = BUNDLED) -> ModelInfo:
    """Find a model by name or folder. Raises RequestError with the nearest names."""
    if (root / name / MANIFEST_FILE).exists() and "/" not in name:
        return read_model(root / name)
    if (Path(name) / MANIFEST_FILE).exists():
        return read_model(Path(name))
    names = [model.name for model in list_models(root)]
    near = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    available = ", ".join(names) or "no model is installed"
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Available: {available}."
    raise RequestError(f"Model {name!r} is not installed.", hint=hint, field="model")


def find_models(names: Iterable[str], root: Path = BUNDLED) -> dict[str, ModelInfo]:
    """Find the installed models and those of further names or folders, by the manifest's name.

    Models that are missing or damaged on this host are left out.
    """
    found: dict[str, ModelInfo] = {}
    for name in [*(path.parent.name for path in sorted(root.glob(f"*/{MANIFEST_FILE}"))), *names]:
        with suppress(RequestError, CheckpointError):
            info = find_model(name, root)
            found.setdefault(info.name, info)
    return found


def estimate_memory(model: ModelInfo) -> int:
    """Estimate the bytes of memory that a loaded model takes, from the sizes of its files.

    Raises CheckpointError for a missing file.
    """
    files = [model.folder / name for name in model.manifest.get("files", {})]
    try:
        size = sum(file.stat().st_size for file in files)
    except OSError as error:
        raise CheckpointError(f"{model.name} lacks {error.filename}.", hint=REPAIR) from error
    return round(MEMORY_PER_FILE_BYTE * size)
