"""Models on disk: the bundled one and any folder with a manifest. Needs no torch."""

import difflib
import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from skyloom.core.errors import CheckpointError, RequestError

BUNDLED = Path(__file__).parent.parent / "bundled"
DEFAULT_MODEL = "diorama"
MANIFEST_FILE = "manifest.json"
MEMORY_PER_FILE_BYTE = 1.5  # weights may be stored in fewer bits; activations take the rest
REPAIR = "Install skyloom again, or pass a complete model folder to --model."


@dataclass(frozen=True)
class Quality:
    """Sampling settings. A distilled `student` needs no guidance and few steps."""

    num_steps: int
    guidance_scale: float
    student: bool = False


@dataclass(frozen=True)
class Rollout:
    """Autoregressive continuation after the native window, in latent frames.

    Each step generates `window` frames and attends to the `sink` first and `recent` last frames,
    which carry noise up to `context_sigma`.
    """

    sink: int
    recent: int
    window: int
    context_sigma: float = 0.0


@dataclass(frozen=True)
class ModelInfo:
    """Manifest of a model; frames: native window in frames; sizes: "WIDTHxHEIGHT"."""

    name: str
    family: str
    licence: str
    description: str
    sizes: tuple[str, ...]
    fps: int
    frames: int
    num_steps: int
    guidance_scale: float
    shift: float
    parameters: int
    folder: Path
    manifest: dict[str, Any] = field(repr=False, compare=False)

    @property
    def qualities(self) -> dict[str, Quality]:
        """Qualities by name: "best", and "fast" if the model has a distilled student."""
        best = {"best": Quality(self.num_steps, self.guidance_scale)}
        steps = self.manifest.get("student_steps")
        return best if steps is None else {"fast": Quality(int(steps), 1.0, student=True), **best}

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


def read_model(folder: Path) -> ModelInfo:
    """Read the model in a folder. Raises CheckpointError for a missing or damaged manifest."""
    manifest = read_manifest(folder)
    names = [field.name for field in fields(ModelInfo) if field.name not in ("folder", "manifest")]
    missing = [name for name in names if name not in manifest]
    if missing:
        raise CheckpointError(
            f"{folder / MANIFEST_FILE} lacks {', '.join(map(repr, missing))}.",
            hint=REPAIR,
        )
    values: dict[str, Any] = {name: manifest[name] for name in names}
    values["sizes"] = tuple(values["sizes"])
    return ModelInfo(**values, folder=folder, manifest=manifest)


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
