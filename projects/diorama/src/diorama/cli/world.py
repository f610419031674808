"""`diorama world`: build the sprite atlas; render contact sheets and clips."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="The diorama: the world that the bundled model learns.", no_args_is_help=True
)

Vocabulary = Annotated[str, typer.Option(help="small or full.")]
AtlasFolder = Annotated[Path, typer.Option(help="Folder made by `diorama world assets`.")]


@app.command()
def assets(
    folder: Annotated[Path, typer.Argument(help="Where the atlas goes.")] = Path(".atlas"),
    packages: Annotated[
        Path | None, typer.Option(help="Where the packages go (default: FOLDER/packages)")
    ] = None,
) -> None:
    """Fetch the npm packages of art, check them, and build the atlas with its licence ledger."""
    from diorama.world.assets import build_atlas, fetch_packages

    where = packages or folder / "packages"
    fetch_packages(where)
    atlas = build_atlas(folder, where)
    typer.echo(f"{len(atlas.nouns)} nouns in {folder}, digest {atlas.digest[:16]}")


@app.command()
def sheet(
    seed: Annotated[int, typer.Option(help="Seed of the first clip.")] = 0,
    count: Annotated[int, typer.Option(help="How many clips.")] = 12,
    vocabulary: Vocabulary = "small",
    out: Annotated[Path, typer.Option("--out", "-o", help="PNG file.")] = Path("world.png"),
    atlas: AtlasFolder = Path(".atlas"),
) -> None:
    """A contact sheet of clips with their captions."""
    from diorama.world.assets import load_atlas
    from diorama.world.make import make_clip
    from diorama.world.vocabulary import find_vocabulary
    from skyloom.media.sheet import write_sheet
    from skyloom.media.write import PICTURE_SUFFIXES, check_target

    check_target(out, PICTURE_SUFFIXES)
    sprites = load_atlas(atlas)
    selected = find_vocabulary(vocabulary)
    clips = [make_clip(seed + index, selected, sprites, split="all") for index in range(count)]
    write_sheet([(clip.captions.medium, clip.frames) for clip in clips], out, columns=2)
    typer.echo(str(out))


@app.command()
def render(
    seed: Annotated[int, typer.Option(help="Seed of the clip.")] = 0,
    frames: Annotated[int, typer.Option(help="How many frames.")] = 33,
    size: Annotated[str, typer.Option(help="Width x height.")] = "128x128",
    vocabulary: Vocabulary = "small",
    out: Annotated[Path, typer.Option("--out", "-o", help="Video file.")] = Path("world.mp4"),
    atlas: AtlasFolder = Path(".atlas"),
) -> None:
    """One clip as a video file; its captions and facts are printed as JSON."""
    from fractions import Fraction

    from diorama.world.assets import load_atlas
    from diorama.world.make import make_clip
    from diorama.world.vocabulary import find_vocabulary
    from skyloom.generate.request import parse_size
    from skyloom.media.write import check_target, write_video

    check_target(out)
    width, height = parse_size(size)
    clip = make_clip(
        seed, find_vocabulary(vocabulary), load_atlas(atlas), frames, height, width, split="all"
    )
    write_video(clip.frames, Fraction(16), out)
    typer.echo(
        json.dumps(
            {"file": str(out), "captions": asdict(clip.captions), "facts": asdict(clip.facts)}
        )
    )
