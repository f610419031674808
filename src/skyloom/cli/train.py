"""`skyloom train`: run recipes."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Train networks by recipes.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Train networks by recipes."""


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="TOML file with all settings.")],
    folder: Annotated[Path, typer.Option("--run", help="Folder of the run: log, state, weights.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key: loop.steps=200.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run.")] = False,
) -> None:
    """Train a network by a recipe, whose setup an installed package registers."""
    from skyloom.core.errors import ConfigError
    from skyloom.train.recipe import run_recipe

    pairs = [setting.partition("=") for setting in settings or []]
    wrong = [key for key, equals, _ in pairs if not equals]
    if wrong:
        raise ConfigError(
            f"--set must be KEY=VALUE, got {wrong[0]!r}.", hint="Example: --set loop.steps=200."
        )
    done = run_recipe(recipe, {key: value for key, _, value in pairs}, folder, resume=resume)
    typer.echo(f"{done} steps done; log and weights are in {folder}")
