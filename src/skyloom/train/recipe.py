"""Recipes: TOML files with all settings of a training run.

A recipe has the tables [loop] and [optimizer], and one table with the name of a registered setup.
"""

from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Any

from skyloom.core.config import dump_config, load_config
from skyloom.core.errors import ConfigError
from skyloom.train.loop import LoopConfig, Task, train
from skyloom.train.optim import OptimizerConfig
from skyloom.train.setups import Setup, find_setups


@dataclass(frozen=True)
class Recipe:
    """One run; `settings` are those of the setup named `objective`."""

    loop: LoopConfig
    optimizer: OptimizerConfig
    objective: str
    settings: Any


def load_recipe(path: Path, overrides: dict[str, str]) -> Recipe:
    """Load a recipe with overrides of dotted keys. Raises ConfigError."""
    setups = find_setups()
    if not setups:
        raise ConfigError(
            "No training setup is installed.", hint="Install the package of the recipe's model."
        )
    table: Any = load_config(path, _table_type(setups), overrides)
    given = [name for name in setups if getattr(table, name) is not None]
    if len(given) != 1:
        names = ", ".join(f"[{name}]" for name in setups)
        raise ConfigError(
            f"A recipe must have exactly one of the tables {names}, "
            f"got {', '.join(given) or 'no table'}."
        )
    return Recipe(table.loop, table.optimizer, given[0], getattr(table, given[0]))


def dump_recipe(recipe: Recipe) -> str:
    """Return TOML text from which `load_recipe` restores an equal recipe."""
    table: Any = _table_type(find_setups())
    settings = {recipe.objective: recipe.settings}
    return dump_config(table(loop=recipe.loop, optimizer=recipe.optimizer, **settings))


def run_recipe(path: Path, overrides: dict[str, str], folder: Path, *, resume: bool = False) -> int:
    """Run a recipe in a folder; return the total number of steps done.

    Paths in the recipe are relative to the working directory.
    """
    recipe = load_recipe(path, overrides)
    task = build_task(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.toml").write_text(dump_recipe(recipe))
    return train(task, recipe.loop, recipe.optimizer, folder, resume=resume)


def build_task(recipe: Recipe) -> Task:
    """Build the module, batches and losses of a recipe."""
    return find_setups()[recipe.objective].build(recipe.settings, recipe.loop)


def _table_type(setups: dict[str, Setup]) -> type:
    """Return the dataclass of a recipe's tables; those of setups are optional."""
    optional = [(name, setup.settings | None, None) for name, setup in setups.items()]
    return make_dataclass(
        "RecipeTable",
        [("loop", LoopConfig), ("optimizer", OptimizerConfig), *optional],
        frozen=True,
    )
