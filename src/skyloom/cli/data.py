"""`skyloom data`: encode clips for training."""

from pathlib import Path
from typing import Annotated

import typer

from skyloom.models.registry import DEFAULT_MODEL

app = typer.Typer(help="Prepare training data.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Prepare training data."""


@app.command()
def encode(
    folders: Annotated[list[Path], typer.Argument(help="Folders of clips.")],
    captions: Annotated[Path, typer.Option(help="File for the table of encoded captions.")],
    model: Annotated[str, typer.Option(help="Name of a model, or its folder.")] = DEFAULT_MODEL,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Encode clips to latents, and their captions to one table, with a model's encoders."""
    from skyloom.data.encode import encode_captions, encode_clips
    from skyloom.generate.pipeline import load

    pipeline = load(model, device=device, dtype="float32")
    for folder in folders:
        written = encode_clips(folder, pipeline.autoencoder.encode, pipeline.device)
        typer.echo(f"{written} shards encoded in {folder}")
    count = encode_captions(folders, pipeline.text_encoder.encode, captions)
    typer.echo(f"{count} captions encoded")
