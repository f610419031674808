"""A recipe is a TOML file that says everything about a run; this turns one into a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from skyloom.core.config import dump_config, load_config
from skyloom.core.errors import ConfigError
from skyloom.data.loader import LatentSource
from skyloom.models.dit import DitConfig
from skyloom.models.vae import VaeConfig
from skyloom.train.loop import LoopConfig, Task, train
from skyloom.train.objectives import AutoencoderConfig, DistillConfig, FlowConfig
from skyloom.train.optim import OptimizerConfig


@dataclass(frozen=True)
class AutoencoderRun:
    """The autoencoder, its losses, the rendered clips it learns from and the ones it is measured on."""

    model: VaeConfig = VaeConfig()
    losses: AutoencoderConfig = AutoencoderConfig()
    folders: tuple[str, ...] = ()
    held_out: str = ""
    batch: int = 4
    frames: int = 17
    crop: int = 96
    patches: int = 60_000


@dataclass(frozen=True)
class FlowRun:
    """The transformer, its losses, the encoded clips it learns from and the ones it is measured on.

    `init` names a folder with exported transformer weights to start from. With `distill`, they are also the
    teacher, and a student of few steps is trained into the same weights (`model.span` must be set). With
    `sketch_only`, nothing but the sketch is trained.
    """

    model: DitConfig
    losses: FlowConfig = FlowConfig()
    distill: DistillConfig | None = None
    sketch_only: bool = False
    sources: tuple[LatentSource, ...] = ()
    captions: str = ""
    held_out: str = ""
    init: str | None = None


@dataclass(frozen=True)
class Recipe:
    """One run: exactly one of `autoencoder` and `flow`."""

    loop: LoopConfig
    optimizer: OptimizerConfig
    autoencoder: AutoencoderRun | None = None
    flow: FlowRun | None = None

    @property
    def objective(self) -> Literal["autoencoder", "flow"]:
        """Which of the two this recipe trains."""
        if (self.autoencoder is None) == (self.flow is None):
            raise ConfigError("A recipe needs exactly one of the tables [autoencoder] and [flow].")
        return "flow" if self.autoencoder is None else "autoencoder"


def run_recipe(path: Path, overrides: dict[str, str], folder: Path, *, resume: bool = False) -> int:
    """Run a recipe in a folder; returns the steps done in all. Paths in it are relative to the working folder."""
    recipe = load_config(path, Recipe, overrides)
    task = build_task(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.toml").write_text(dump_config(recipe))
    return train(task, recipe.loop, recipe.optimizer, folder, resume=resume)


def build_task(recipe: Recipe) -> Task:
    """The module, batches and losses that a recipe asks for."""
    from skyloom.train import tasks

    if recipe.objective == "flow":
        assert recipe.flow is not None
        return tasks.flow_task(recipe.flow, recipe.loop)
    assert recipe.autoencoder is not None
    return tasks.autoencoder_task(recipe.autoencoder, recipe.loop)
