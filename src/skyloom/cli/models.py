"""`skyloom models`: list, show and verify installed models."""

import json
from typing import Annotated

import typer

from skyloom.models.registry import DEFAULT_MODEL

app = typer.Typer(help="Installed models.", no_args_is_help=True)


@app.command("list")
def list_() -> None:
    """List installed models: name, frame size, window, parameters, licence."""
    from skyloom.models.registry import list_models

    models = list_models()
    if not models:
        typer.echo("No model is installed.", err=True)
    for model in models:
        size = model.default_size
        window = f"{model.frames} frames at {model.fps} fps"
        millions = f"{model.parameters / 1e6:.1f} M parameters"
        typer.echo(f"{model.name:12} {size:>9}  {window}  {millions}  {model.licence}")


@app.command()
def show(name: Annotated[str, typer.Argument(help="Name of a model, or its folder.")]) -> None:
    """Print the manifest of a model."""
    from skyloom.models.registry import find_model

    typer.echo(json.dumps(find_model(name).manifest, indent=1))


@app.command()
def verify(
    name: Annotated[str, typer.Argument(help="Name of a model, or its folder.")] = DEFAULT_MODEL,
) -> None:
    """Compare the weight files of a model with their hashes."""
    from skyloom.models.checkpoint import verify_manifest
    from skyloom.models.registry import find_model

    manifest = verify_manifest(find_model(name).folder)
    typer.echo(f"{len(manifest['files'])} files match their hashes")
