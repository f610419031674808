"""Recipes: TOML files with all settings of a training run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from skyloom.core.config import dump_config, load_config
from skyloom.core.errors import ConfigError
from skyloom.data.loader import LatentSource
from skyloom.models.diorama.transformer import UNetConfig
from skyloom.models.diorama.v1.autoencoder import VaeConfig
from skyloom.models.diorama.v1.transformer import DitConfig
from skyloom.train.autoencoders import DecoderRun, decoder_task
from skyloom.train.loop import LoopConfig, Task, train
from skyloom.train.objectives import AutoencoderLossConfig, DistillConfig, FlowConfig
from skyloom.train.optim import OptimizerConfig

Objective = Literal["autoencoder", "decoder", "flow"]


@dataclass(frozen=True)
class AutoencoderRun:
    """The autoencoder, its losses, and folders of rendered clips for training and evaluation."""

    model: VaeConfig = VaeConfig()
    losses: AutoencoderLossConfig = AutoencoderLossConfig()
    folders: tuple[str, ...] = ()
    held_out: str = ""
    batch: int = 4
    frames: int = 17
    crop: int = 96
    patches: int = 60_000


@dataclass(frozen=True)
class FlowRun:
    """The network (exactly one of `unet` and `model`), its losses, and encoded clips.

    init: folder with exported weights to start from.
    distill: train a few-step student; the `init` weights are the teacher (a DiT needs
        `model.span`).
    sketch_only: train only the DiT's mean-latent predictor.
    held_out: folder of clips for evaluation.
    """

    unet: UNetConfig | None = None
    model: DitConfig | None = None
    losses: FlowConfig = FlowConfig()
    distill: DistillConfig | None = None
    sketch_only: bool = False
    sources: tuple[LatentSource, ...] = ()
    captions: str = ""
    held_out: str = ""
    init: str | None = None


@dataclass(frozen=True)
class Recipe:
    """One run: exactly one of `autoencoder`, `decoder` and `flow`."""

    loop: LoopConfig
    optimizer: OptimizerConfig
    autoencoder: AutoencoderRun | None = None
    decoder: DecoderRun | None = None
    flow: FlowRun | None = None

    @property
    def objective(self) -> Objective:
        """The one table that is given. Raises ConfigError."""
        parts: dict[Objective, object] = {
            "autoencoder": self.autoencoder,
            "decoder": self.decoder,
            "flow": self.flow,
        }
        given: list[Objective] = [name for name, part in parts.items() if part is not None]
        if len(given) != 1:
            raise ConfigError(
                "A recipe must have exactly one of the tables [autoencoder], [decoder] and [flow], "
                f"got {', '.join(given) or 'no table'}."
            )
        return given[0]


def run_recipe(path: Path, overrides: dict[str, str], folder: Path, *, resume: bool = False) -> int:
    """Run a recipe in a folder; return the total number of steps done.

    Paths in the recipe are relative to the working directory.
    """
    recipe = load_config(path, Recipe, overrides)
    task = build_task(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.toml").write_text(dump_config(recipe))
    return train(task, recipe.loop, recipe.optimizer, folder, resume=resume)


def build_task(recipe: Recipe) -> Task:
    """Build the module, batches and losses of a recipe."""
    from skyloom.train.setups import autoencoder_task, flow_task

    if recipe.objective == "flow":
        assert recipe.flow is not None
        return flow_task(recipe.flow, recipe.loop)
    if recipe.objective == "decoder":
        assert recipe.decoder is not None
        return decoder_task(recipe.decoder, recipe.loop)
    assert recipe.autoencoder is not None
    return autoencoder_task(recipe.autoencoder, recipe.loop)
