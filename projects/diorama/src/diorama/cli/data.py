"""`diorama data`: render clips and encode them for training."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Prepare training data: render clips, encode them.", no_args_is_help=True)


@app.command()
def render(
    out: Annotated[
        Path, typer.Argument(help="Folder for the shards; only missing ones are rendered.")
    ],
    count: Annotated[int, typer.Option(help="Number of clips.")] = 1000,
    vocabulary: Annotated[str, typer.Option(help="small or full.")] = "small",
    frames: Annotated[int, typer.Option(help="Frames per clip; 1 renders stills.")] = 33,
    size: Annotated[str, typer.Option(help="Width x height in pixels.")] = "128x128",
    first_seed: Annotated[int, typer.Option(help="Seed of the first clip.")] = 0,
    split: Annotated[str, typer.Option(help="train, heldout or all.")] = "train",
    atlas: Annotated[Path, typer.Option(help="Folder made by `diorama world assets`.")] = Path(
        ".atlas"
    ),
    processes: Annotated[int, typer.Option(help="Number of processes.")] = 2,
    per_shard: Annotated[int, typer.Option(help="Clips per file.")] = 100,
) -> None:
    """Render clips with their captions and facts."""
    from diorama.clips import ClipPlan, parse_split, render_clips
    from skyloom.generate.request import parse_size

    width, height = parse_size(size)
    plan = ClipPlan(
        vocabulary,
        count=count,
        frames=frames,
        height=height,
        width=width,
        first_seed=first_seed,
        split=parse_split(split),
        per_shard=per_shard,
    )
    rendered = render_clips(plan, atlas, out, processes)
    typer.echo(f"{rendered} of {plan.shards} shards rendered into {out}")


@app.command()
def encode(
    folders: Annotated[list[Path], typer.Argument(help="Folders of rendered clips.")],
    autoencoder: Annotated[Path, typer.Option(help="Folder with the autoencoder's weights.")],
    captions: Annotated[Path, typer.Option(help="File for the table of encoded captions.")],
    text: Annotated[Path, typer.Option(help="Folder with the text encoder's weights.")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Encode rendered clips to latents, and their captions to one table."""
    from diorama.train.autoencoders import load_encoder
    from diorama.train.text_encoder import batched_encode
    from skyloom.data.encode import encode_captions, encode_clips
    from skyloom.models.diorama.text_encoder import load_text_encoder

    encode, where = load_encoder(autoencoder, device)
    for folder in folders:
        typer.echo(f"{encode_clips(folder, encode, where)} shards encoded in {folder}")
    encoder = batched_encode(load_text_encoder(text))
    typer.echo(f"{encode_captions(folders, encoder, captions)} captions encoded")
