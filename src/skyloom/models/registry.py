"""What models there are: the bundled one, and any folder that holds a manifest."""

import difflib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from skyloom.core.errors import CheckpointError, RequestError
from skyloom.models.manifest import MANIFEST_FILE, read_manifest

BUNDLED = Path(__file__).parent.parent / "bundled"
DEFAULT_MODEL = "diorama"


@dataclass(frozen=True)
class Quality:
    """How a model is sampled. A `student` takes long steps with guidance folded into its weights."""

    num_steps: int
    guidance_scale: float
    student: bool = False


@dataclass(frozen=True)
class Rollout:
    """How a model goes on after its native window, in latent frames: `window` at a time, with the `sink` first ones
    and the `recent` last ones in view, which carry noise up to `context_sigma`."""

    sink: int
    recent: int
    window: int
    context_sigma: float = 0.0


@dataclass(frozen=True)
class ModelInfo:
    """What can be asked of a model, and where it lies. `frames` is its native window; sizes are "width x height"."""

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
        """ "best" always; "fast" where the manifest names a student's steps."""
        best = {"best": Quality(self.num_steps, self.guidance_scale)}
        steps = self.manifest.get("student_steps")
        return best if steps is None else {"fast": Quality(int(steps), 1.0, student=True), **best}

    @property
    def quality(self) -> str:
        """The name of the default quality."""
        return next(iter(self.qualities))

    @property
    def noise_correlation(self) -> float:
        """How alike the noise of neighbouring latent frames was in its training (0: independent)."""
        return float(self.manifest.get("noise_correlation", 0.0))

    @property
    def steadiness(self) -> float:
        """How large a change from one latent frame to the next counts as jitter when it is decoded (0: none)."""
        return float(self.manifest.get("steadiness", 0.0))

    @property
    def rollout(self) -> Rollout | None:
        """How it makes longer videos; None where it was not trained for that."""
        values = self.manifest.get("rollout")
        return None if values is None else Rollout(**values)


def read_model(folder: Path) -> ModelInfo:
    """The model in a folder. Raises CheckpointError when its manifest is missing or damaged."""
    manifest = read_manifest(folder)
    names = [field.name for field in fields(ModelInfo) if field.name not in ("folder", "manifest")]
    missing = [name for name in names if name not in manifest]
    if missing:
        raise CheckpointError(
            f"{folder / MANIFEST_FILE} lacks {', '.join(map(repr, missing))}.",
            hint="It is not a whole model.",
        )
    values = {name: manifest[name] for name in names}
    return ModelInfo(
        **{**values, "sizes": tuple(manifest["sizes"])}, folder=folder, manifest=manifest
    )


def list_models(root: Path = BUNDLED) -> list[ModelInfo]:
    """Every model under a folder, by name."""
    return [read_model(path.parent) for path in sorted(root.glob(f"*/{MANIFEST_FILE}"))]


def find_model(name: str, root: Path = BUNDLED) -> ModelInfo:
    """A model by name, or by the path of its folder. Raises RequestError with the nearest names."""
    if (root / name / MANIFEST_FILE).exists() and "/" not in name:
        return read_model(root / name)
    if (Path(name) / MANIFEST_FILE).exists():
        return read_model(Path(name))
    names = [model.name for model in list_models(root)]
    near = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    hint = (
        f"Did you mean {' or '.join(near)}?" if near else f"There is: {', '.join(names) or 'none'}."
    )
    raise RequestError(f"There is no model {name!r}.", hint=hint, field="model")
