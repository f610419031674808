"""`skyloom models`: what is installed."""

import json
from typing import Annotated

import typer

app = typer.Typer(help="Installed models.", no_args_is_help=True)


@app.command("list")
def list_() -> None:
    """Name, size, window and licence of every installed model."""
    from skyloom.models.registry import list_models

    models = list_models()
    if not models:
        typer.echo("No model is installed.", err=True)
    for model in models:
        window = f"{model.frames} frames at {model.fps} fps"
        millions = f"{model.parameters / 1e6:.1f} M weights"
        typer.echo(f"{model.name:12} {model.sizes[0]:>9}  {window}  {millions}  {model.licence}")


@app.command()
def show(name: Annotated[str, typer.Argument(help="Name of a model, or its folder.")]) -> None:
    """Everything the manifest says."""
    from skyloom.models.registry import find_model

    typer.echo(json.dumps(find_model(name).manifest, indent=1))


@app.command()
def verify(
    name: Annotated[str, typer.Argument(help="Name of a model, or its folder.")] = "diorama",
) -> None:
    """Compare every weights file with its hash."""
    from skyloom.models.checkpoint import verify_manifest
    from skyloom.models.registry import find_model

    manifest = verify_manifest(find_model(name).folder)
    typer.echo(f"{len(manifest['files'])} files are as they were published")
