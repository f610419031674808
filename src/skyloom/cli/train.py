"""`skyloom train`: run a recipe."""

from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[Path, typer.Argument(help="TOML file, like those in recipes/.")],
    run: Annotated[Path, typer.Option(help="Folder of the run: log, state, weights.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key: loop.steps=200.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run.")] = False,
) -> None:
    """Train the autoencoder or the denoising network."""
    from skyloom.core.errors import ConfigError
    from skyloom.train.recipe import run_recipe

    pairs = [setting.partition("=") for setting in settings or []]
    wrong = [key for key, equals, _ in pairs if not equals]
    if wrong:
        raise ConfigError(
            f"--set must be KEY=VALUE, got {wrong[0]!r}.", hint="Example: --set loop.steps=200."
        )
    done = run_recipe(recipe, {key: value for key, _, value in pairs}, run, resume=resume)
    typer.echo(f"{done} steps done; log and weights are in {run}")
