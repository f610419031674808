"""`skyloom models`: list, describe, add, check, verify and remove models."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from skyloom.cli.pull import licence_lines, memory_text, pull, size_text
from skyloom.models.registry import DEFAULT_MODEL

if TYPE_CHECKING:
    from skyloom.generate.pipeline import Pipeline
    from skyloom.hub.catalog import CatalogModel
    from skyloom.hub.library import Removal
    from skyloom.models.registry import ModelInfo

app = typer.Typer(
    help="Models: installed ones and those that can be fetched.", no_args_is_help=True
)
app.command()(pull)

_BILLION = 1e9
Name = Annotated[str, typer.Argument(help="Name of a model, or its folder.")]


@app.command("list")
def list_(
    available: Annotated[
        bool, typer.Option("--available", help="List what `skyloom pull` can fetch.")
    ] = False,
) -> None:
    """List installed models: name, frame size, window, parameters, licence, size, folder."""
    from skyloom.models.registry import list_models, model_roots, scan_models

    if available:
        _list_available()
        return
    models = list_models()
    if not models:
        typer.echo("No model is installed.", err=True)
    for model in models:
        typer.echo(_describe(model))
    for root in model_roots()[1:]:
        for error in scan_models(root)[1]:
            typer.echo(f"Not usable: {error}", err=True)


@app.command()
def info(
    name: Name,
    urls: Annotated[
        bool, typer.Option("--urls", help="Print the addresses of the files only.")
    ] = False,
) -> None:
    """Print what the catalogue knows of a model, or the manifest of another installed one."""
    from skyloom.core.errors import RequestError
    from skyloom.hub.catalog import load_catalog
    from skyloom.models.registry import find_model

    model = load_catalog().models.get(name)
    memory = None if urls else _memory_lines(name)
    if urls:
        if model is None:
            raise RequestError(f"model must be of the catalogue for --urls, got {name!r}.")
        _print_urls(model)
    elif model is None:
        typer.echo(json.dumps(find_model(name).manifest, indent=1))
    else:
        _print_entry(model)
    for line in memory or ():
        typer.echo(f"memory here: {line}", err=model is None)


@app.command(hidden=True)
def show(name: Name) -> None:
    """Print what `skyloom models info` prints."""
    info(name, urls=False)


@app.command()
def add(
    paths: Annotated[
        list[Path], typer.Argument(help="Folder of a model, or its files; used in place.")
    ],
    name: Annotated[str | None, typer.Option(help="Name to use it by.")] = None,
) -> None:
    """Add a model from files on this machine. Nothing is copied; do not move the files."""
    from skyloom.hub.add import add_model
    from skyloom.hub.catalog import load_catalog

    name, found = add_model(
        paths, load_catalog(), name=name, notice=lambda text: typer.echo(text, err=True)
    )
    typer.echo(f"Added {name}: family {found.family}, variant {found.variant}.")
    for part, files in found.parts.items():
        for path in files:
            entry = found.known.get(path)
            proof = "its hash is the catalogue's" if entry else "its hash is not in the catalogue"
            typer.echo(f"  {part.replace('_', ' ')}: {path} ({proof})")


@app.command()
def check(
    name: Name = DEFAULT_MODEL,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or mps.")] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            "--lora",
            metavar="NAME[:WEIGHT]",
            help="Print how much this LoRA moves the transformer's output. Repeatable.",
        ),
    ] = None,
) -> None:
    """Run a model on fixed inputs and print twelve numbers to compare with another machine's.

    With --lora, print the effects of LoRAs instead; one without effect is an error.
    """
    import skyloom
    from skyloom.generate.model_check import check_model

    pipeline = skyloom.load(name, device=device)
    if lora:
        _print_effects(pipeline, lora)
        return
    dtype = str(pipeline.dtype).removeprefix("torch.")
    typer.echo(f"{pipeline.info.name} on {pipeline.device.type} in {dtype}")
    typer.echo(f"{'':10} {'mean':>10} {'deviation':>10} {'least':>10} {'largest':>10}")
    for part, values in check_model(pipeline).items():
        typer.echo(f"{part:10} " + " ".join(f"{value:10.4f}" for value in values))


@app.command()
def verify(name: Name = DEFAULT_MODEL) -> None:
    """Compare the weight files of a model with their hashes."""
    from skyloom.models.checkpoint import verify_manifest
    from skyloom.models.registry import find_model, weight_files

    info = find_model(name)
    manifest = verify_manifest(info.folder)
    typer.echo(f"{len(weight_files(info.folder, manifest))} files match their hashes")


@app.command()
def remove(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a model: only files that pull wrote and no other model uses."""
    from skyloom.core.errors import RequestError
    from skyloom.hub.catalog import load_catalog
    from skyloom.hub.library import lock_library, plan_removal

    with lock_library(f"models remove {name}", lambda text: typer.echo(text, err=True)):
        removal = plan_removal(name, load_catalog())
        _print_removal(removal)
        if not yes:
            if not sys.stdin.isatty():
                raise RequestError(
                    "yes must be given where nobody can answer, got nothing.",
                    hint="Add --yes to delete these files.",
                    field="yes",
                )
            if not typer.confirm("Delete?", default=False):
                raise RequestError("Stopped; nothing was deleted.")
        freed = size_text(removal.size)
        removal.carry_out()
    typer.echo(f"Removed {name}; {freed} are free again.")


def _print_effects(pipeline: "Pipeline", names: list[str]) -> None:
    """Print what every LoRA changes. Raises RequestError if one changes nothing."""
    from skyloom.core.errors import RequestError
    from skyloom.generate.loras import find_loras, parse_loras
    from skyloom.generate.model_check import lora_effects

    effects, notices = lora_effects(pipeline, find_loras(parse_loras(names), pipeline.loras))
    for notice in notices:
        typer.echo(notice, err=True)
    for name, effect in effects.items():
        typer.echo(f"{name}: the output of {pipeline.info.name} moves by {100 * effect:.4g} %")
    idle = [name for name, effect in effects.items() if not effect]
    if idle:
        raise RequestError(
            f"LoRA {', '.join(idle)} changes nothing: its matrices or its weight are zero.",
            hint="The file is of an untrained LoRA, or damaged.",
            field="loras",
        )


def _describe(model: "ModelInfo") -> str:
    from skyloom.models.registry import BUNDLED, weight_files

    window = f"{model.frames} frames at {model.fps} fps"
    count = (
        f"{model.parameters / _BILLION:.1f} B"
        if model.parameters >= _BILLION
        else f"{model.parameters / 1e6:.1f} M"
    )
    paths = [file.path for file in weight_files(model.folder, model.manifest)]
    size = size_text(sum(path.stat().st_size for path in paths if path.exists()))
    where = "bundled" if model.folder.parent == BUNDLED else str(model.folder)
    missing = sum(not path.exists() for path in paths)
    state = f"  {missing} FILES ARE MISSING" if missing else ""
    return (
        f"{model.name:12} {model.default_size:>9}  {window}  {count} parameters  {model.licence}  "
        f"{size}  {where}{state}"
    )


def _memory_lines(name: str) -> list[str]:
    """Describe how an installed large model would lie in this machine's memory."""
    from skyloom.core.errors import SkyloomError
    from skyloom.generate.plan_summary import plan_and_estimate
    from skyloom.generate.request import Request

    try:
        plan = plan_and_estimate(Request("a video", model=name))[2]
    except SkyloomError:  # not installed, or damaged: other commands say so
        return []
    if plan is None:
        return []
    return [*plan.describe(), "it fits" if plan.fits else "it does not fit"]


def _list_available() -> None:
    from skyloom.core.paths import models_folder
    from skyloom.hub.catalog import load_catalog
    from skyloom.models.registry import MANIFEST_FILE

    typer.echo(f"  {'name':12} {'download':>15}  {'GPU memory':>10}  {'licence':10}  description")
    for model in load_catalog().models.values():
        files = set(model.choose_files().values())
        size = size_text(
            sum(file.size for file in files),
            verified=all(file.bytes is not None for file in files),
        )
        memory = "-".join(dict.fromkeys(str(one) for one in model.gpu_memory_gb)) + " GB"
        mark = "*" if (models_folder() / model.name / MANIFEST_FILE).exists() else " "
        typer.echo(
            f"{mark} {model.name:12} {size:>15}  {memory:>10}  {model.licence.id:10}  "
            f"{model.description}"
        )
    typer.echo("Fetch one with: skyloom pull NAME. * is installed.")


def _print_entry(model: "CatalogModel") -> None:
    """Print a model of the catalogue: parts, files, licence, memory."""
    from skyloom.core.paths import models_folder
    from skyloom.models.registry import MANIFEST_FILE

    folder = models_folder() / model.name
    here = (folder / MANIFEST_FILE).exists()
    state = f"installed in {folder}" if here else f"not installed: skyloom pull {model.name}"
    typer.echo(f"{model.name}: {model.description}")
    typer.echo(f"{state}\nfamily {model.family}, variant {model.variant}")
    for line in (*licence_lines(model), memory_text(model), f"model page: {model.source}", ""):
        typer.echo(line)
    for part, files in model.parts.items():
        typer.echo(f"  {part.replace('_', ' ')}")
        for file in files:
            size = "size unverified" if file.bytes is None else f"{file.bytes:,} bytes"
            typer.echo(f"    {file.name}")
            typer.echo(f"      {file.dtype or 'precision unverified'}, {size}")
            typer.echo(f"      sha256 {file.sha256 or 'unverified: taken from the hub by pull'}")
            typer.echo(f"      {file.repository}")


def _print_urls(model: "CatalogModel") -> None:
    from skyloom.hub.sources import find_source

    source = find_source("hf")
    for file in dict.fromkeys(model.choose_files().values()):
        typer.echo(source.url(file))


def _print_removal(removal: "Removal") -> None:
    for path in removal.deleted:
        typer.echo(f"delete {path} ({size_text(path.stat().st_size)})")
    for path, reason in removal.kept.items():
        typer.echo(f"keep   {path}: {reason}")
