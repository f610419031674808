"""`diorama train`: run recipes, and build the parts that have none."""

import json
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from skyloom.cli import train

app = typer.Typer(help="Train and assemble the diorama's networks.", no_args_is_help=True)

TextFolder = Annotated[Path, typer.Option(help="Folder with the text encoder's weights.")]
Captions = Annotated[Path, typer.Option(help="Table of encoded captions; it is updated.")]
Out = Annotated[Path, typer.Option(help="Folder for the weights.")]


@app.command("run")
@wraps(train.run)
def run(**options: Any) -> None:
    """Run a recipe of this package, installed or not."""
    from diorama.train.setups import register

    register()
    train.run(**options)


@app.command()
def components(
    clips: Annotated[list[Path], typer.Argument(help="Folders of rendered clips.")],
    out: Out,
    channels: Annotated[int, typer.Option(help="Channels of the latent.")] = 48,
    patches: Annotated[int, typer.Option(help="Patches drawn from the clips.")] = 120_000,
) -> None:
    """Write an autoencoder with the principal components of clips and an untrained decoder."""
    from diorama.train.autoencoders import save_components
    from skyloom.models.diorama.config import AutoencoderConfig

    explained = save_components(out, AutoencoderConfig(channels=channels), clips, patches)
    typer.echo(f"{channels} components explain {explained:.4f} of the variance")


@app.command()
def text_encoder(
    clips: Annotated[list[Path], typer.Argument(help="Folders of clips with their captions.")],
    out: Out,
    words: Annotated[
        Path | None, typer.Option(help="File with further words to keep, one per line.")
    ] = None,
    package: Annotated[
        Path | None, typer.Option(help="Folder of MiniLM (default: the installed package).")
    ] = None,
) -> None:
    """Build the text encoder: MiniLM with a pruned vocabulary, in int8."""
    from diorama.train.text_encoder import build_text_encoder, find_package, known_texts

    build_text_encoder(package or find_package(), known_texts(clips, words), out)


@app.command()
def prompt_attributes(
    clips: Annotated[list[Path], typer.Argument(help="Folders of clips with their facts.")],
    text: TextFolder,
    captions: Captions,
    out: Out,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 1500,
) -> None:
    """Train prompt attributes and add them to a text encoder."""
    from diorama.train.prompt_attributes import AttributesConfig, build_attributes

    config = AttributesConfig(steps=steps)
    typer.echo(json.dumps(build_attributes(text, captions, clips, config, out), indent=1))


@app.command()
def synonyms(
    words: Annotated[Path, typer.Argument(help="TOML file: synonyms of every noun.")],
    text: TextFolder,
    captions: Captions,
    out: Out,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 600,
) -> None:
    """Teach prompt attributes other words for the nouns."""
    from diorama.train.text_synonyms import SynonymConfig, build_synonyms

    config = SynonymConfig(steps=steps)
    typer.echo(json.dumps(build_synonyms(text, captions, words, config, out), indent=1))


@app.command()
def probe_head(
    stills: Annotated[list[Path], typer.Argument(help="Folders of rendered stills.")],
    out: Out,
    probe: Annotated[
        Path | None, typer.Option(help="Folder of the probe (default: the bundled one).")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the stills.")] = 30,
) -> None:
    """Train the multi-label head of a trained probe on its frozen features."""
    from diorama.train.probe import build_head

    build_head(stills, probe, out, epochs)


@app.command()
def bundle(
    data: Annotated[list[Path], typer.Argument(help="Folders of clips that were trained on.")],
    autoencoder: Annotated[Path, typer.Option(help="Folder with the autoencoder's weights.")],
    text: TextFolder,
    transformer: Annotated[Path, typer.Option(help="Folder with the transformer's weights.")],
    ledger: Annotated[Path, typer.Option(help="Digest of the atlas's licence ledger.")],
    info: Annotated[Path, typer.Option(help="JSON file with the settings of the pipeline.")],
    out: Out,
    earlier: Annotated[
        Path | None, typer.Option("--from", help="Model that training continued from.")
    ] = None,
) -> None:
    """Assemble trained parts into one model folder with a manifest."""
    from diorama.train.bundle import bundle as assemble
    from skyloom.models.checkpoint import read_manifest

    assemble(
        {"vae": autoencoder, "text": text, "dit": transformer},
        data=data,
        ledger=ledger,
        out=out,
        info=json.loads(info.read_text()),
        earlier=None if earlier is None else read_manifest(earlier),
    )
