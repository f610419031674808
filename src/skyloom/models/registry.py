"""Models on disk: the bundled one and any folder with a manifest. Needs no torch.

A model family is a package `skyloom.models.NAME` and a row of `FAMILIES`. Nothing else names it.
Its modules with fixed names:

- `config`: `FAMILY`, a `models.family.ModelFamily`, and the sizes of the networks. Without torch.
  `VARIANTS`, if the manifests of its models name a `variant`: a record for each.
- `load`: the functions of `models.base.FamilyLoader`, which read a model's folder.
- `lora`, if it reads LoRA files with other names than its own: `lora_targets`.

Its networks implement the interfaces of `models.base` in `text_encoder`, `autoencoder` and
`transformer`; `state_dict` converts the keys of other projects' weights, if it reads any.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from skyloom.core.config import from_table, to_table
from skyloom.core.errors import CheckpointError, ConfigError, RequestError
from skyloom.core.hash_cache import file_identity
from skyloom.core.paths import model_path, models_folder
from skyloom.models.family import ModelFamily, Quality, Rollout, Schedule, SizeRule

BUNDLED = Path(__file__).parent.parent / "bundled"
DEFAULT_MODEL = "diorama"
MANIFEST_FILE = "manifest.json"
MEMORY_PER_FILE_BYTE = 1.5  # weights may be stored in fewer bits; activations take the rest
REPAIR = "Install skyloom again, or pass a complete model folder to --model."
FAMILIES = {"diorama": "skyloom.models.diorama", "wan": "skyloom.models.wan"}
"""Packages of the model families; imported when a model of the family is used."""
if TYPE_CHECKING:  # the modules `load` must match the protocol
    from skyloom.models.base import FamilyLoader
    from skyloom.models.diorama import load as diorama_load
    from skyloom.models.wan import load as wan_load

    _LOADERS: tuple[FamilyLoader, ...] = (diorama_load, wan_load)
_FORMER_NAMES = {"skyloom": "diorama"}  # in manifests of version 0.1


@dataclass(frozen=True)
class WeightFile:
    """A file of a model. identity: size, mtime in ns and inode when its hash was computed."""

    path: Path
    sha256: str
    identity: tuple[int, ...] | None = None

    def is_unchanged(self) -> bool:
        """Whether the file is still the one that was hashed, without reading it."""
        return self.identity is not None and self.identity == tuple(file_identity(self.path.stat()))


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
    def default_size(self) -> str:
        """Size of a request that names none, as "WIDTHxHEIGHT"."""
        return self.size_rule.names[0]

    @property
    def file_hashes(self) -> dict[str, str]:
        """SHA-256 of the model's files: by name, or by part and number where they lie anywhere."""
        parts: dict[str, list[dict[str, Any]]] = self.manifest.get("parts", {})
        return {
            **self.manifest.get("files", {}),
            **{
                f"{part}/{number}": row["sha256"]
                for part, rows in parts.items()
                for number, row in enumerate(rows)
            },
        }

    @property
    def record(self) -> ModelFamily:
        """Properties of the model's family."""
        return find_family(self.family, self.manifest.get("variant"))

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
        if few is None or (steps is None and not self.manifest.get("student", False)):
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
        """Settings of the cache for longer videos; None for a model that has none."""
        values = self.manifest.get("rollout")
        return self.record.rollout if values is None else Rollout(**values)


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


def find_family(family: str, variant: str | None = None) -> ModelFamily:
    """Return the record of a family, or of a variant of it. Raises CheckpointError if unknown."""
    config = family_module(family, "config")
    record: ModelFamily = config.FAMILY
    variants: Mapping[str, ModelFamily] = getattr(config, "VARIANTS", {})
    if variant is None or not variants:
        return record
    if variant not in variants:
        raise CheckpointError(
            f"variant must be one of {', '.join(variants)} for the family {record.name}, "
            f"got {variant!r}.",
            hint="The model needs another version of skyloom.",
        )
    return variants[variant]


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
    record = find_family(manifest["family"], manifest.get("variant"))
    has_student = manifest.get("student") or manifest.get("student_steps") is not None
    if has_student and record.few_step is None:
        raise CheckpointError(
            f"student and student_steps in {folder / MANIFEST_FILE} must be left out: models of "
            f"the family {record.name} have no student.",
            hint=REPAIR,
        )
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


def model_roots() -> tuple[Path, ...]:
    """Return the folders of models: bundled, SKYLOOM_MODELS, then those of SKYLOOM_MODEL_PATH."""
    return tuple(dict.fromkeys((BUNDLED, models_folder(), *model_path())))


def scan_models(root: Path) -> tuple[list[ModelInfo], list[CheckpointError]]:
    """Read the models under a folder, by folder name; return errors of those that cannot be."""
    models: list[ModelInfo] = []
    errors: list[CheckpointError] = []
    for path in sorted(root.glob(f"*/{MANIFEST_FILE}")):
        try:
            models.append(read_model(path.parent))
        except CheckpointError as error:
            errors.append(error)
    return models, errors


def list_models(root: Path | None = None) -> list[ModelInfo]:
    """List the models under a folder, by folder name; without one, those of `model_roots`.

    Of models with one name, the first one counts. Raises CheckpointError for a damaged manifest of
    `root` or of the bundled models; other damaged ones are left out.
    """
    models, errors = scan_models(BUNDLED if root is None else root)
    if errors:
        raise errors[0]
    named = {model.name: model for model in models}
    for further in () if root is not None else model_roots()[1:]:
        for model in scan_models(further)[0]:
            named.setdefault(model.name, model)
    return list(named.values())


def find_model(name: str, root: Path | None = None) -> ModelInfo:
    """Find a model by name under a folder, or by its own folder. Raises RequestError.

    Without `root`, the folders of `model_roots` are searched. The error has the nearest names.
    """
    for one in model_roots() if root is None else (root,):
        if (one / name / MANIFEST_FILE).exists() and "/" not in name:
            return read_model(one / name)
    if (Path(name) / MANIFEST_FILE).exists():
        return read_model(Path(name))
    names = [model.name for model in list_models(root)]
    near = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    installed = f"Installed: {', '.join(names) or 'none'}."
    hint = f"Did you mean {' or '.join(near)}?" if near else installed
    hint += " `skyloom models list --available` lists those that `skyloom pull` fetches."
    raise RequestError(f"Model {name!r} is not installed.", hint=hint, field="model")


def find_models(names: Iterable[str], root: Path | None = None) -> dict[str, ModelInfo]:
    """Find the installed models and those of further names or folders, by the manifest's name.

    Models that are missing or damaged on this host are left out.
    """
    found: dict[str, ModelInfo] = {}
    for one in model_roots() if root is None else (root,):
        for model in scan_models(one)[0]:
            found.setdefault(model.name, model)
    for name in names:
        with suppress(RequestError, CheckpointError):
            info = find_model(name, root)
            found.setdefault(info.name, info)
    return found


def weight_files(folder: Path, manifest: Mapping[str, Any]) -> list[WeightFile]:
    """List the files of a model, each once.

    `files` of the manifest has hashes by name; `parts` has, for every part, rows with `path`
    (absolute, or relative to the folder), `sha256` and `identity`.
    """
    own = [WeightFile(folder / name, sha256) for name, sha256 in manifest.get("files", {}).items()]
    rows: list[Any] = [row for part in manifest.get("parts", {}).values() for row in part]
    used = [WeightFile(folder / row["path"], row["sha256"], tuple(row["identity"])) for row in rows]
    return list({file.path: file for file in (*own, *used)}.values())


def part_paths(info: ModelInfo, part: str) -> tuple[Path, ...]:
    """Return the files of a part that the manifest's `parts` name. Raises CheckpointError."""
    rows: list[Any] = info.manifest.get("parts", {}).get(part, [])
    if not rows:
        raise CheckpointError(
            f"{info.folder / MANIFEST_FILE} names no file of the part {part!r}.",
            hint=repair_hint(info.manifest),
        )
    return tuple(info.folder / row["path"] for row in rows)


def repair_hint(manifest: Mapping[str, Any]) -> str:
    """Say how to mend a model with a missing or damaged file."""
    if "parts" not in manifest:
        return REPAIR
    name = manifest["name"]
    if "source" in manifest:
        return f"Run: skyloom pull {name}."
    return f"Run: skyloom models add FOLDER --name {name}."


def estimate_memory(model: ModelInfo) -> int:
    """Estimate the bytes of memory that a loaded model takes whole, from the sizes of its files.

    Models are freed by it, so that the next one has room to be loaded whole; it needs neither
    headers nor a request. What a request needs is planned (models/memory.py).
    Raises CheckpointError for a missing file.
    """
    try:
        size = sum(file.path.stat().st_size for file in weight_files(model.folder, model.manifest))
    except OSError as error:
        raise CheckpointError(
            f"{model.name} lacks {error.filename}.", hint=repair_hint(model.manifest)
        ) from error
    return round(MEMORY_PER_FILE_BYTE * size)
