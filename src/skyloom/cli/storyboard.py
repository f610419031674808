"""`skyloom storyboard`: a file of cards in, a video file out."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from skyloom.cli import options, plan
from skyloom.cli.generate import Delivery, make, with_seed


def storyboard(
    file: Annotated[Path, typer.Argument(help="Cards as TOML or JSON: docs/long.md shows some.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File (.mp4, .webm, .gif) (default: named after FILE)"),
    ] = None,
    only_plan: Annotated[
        bool, typer.Option("--plan", help="Print what it would take; make nothing.")
    ] = False,
    seconds: options.Seconds = None,
    size: options.Size = None,
    fps: options.Fps = None,
    seed: options.Seed = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    quality: options.Quality = None,
    retake: options.Retake = None,
    model: Annotated[
        str | None, typer.Option(help="Name of a model, or its folder (default: FILE's)")
    ] = None,
    play: options.Play = None,
    receipt: options.Receipt = True,
    sidecar: options.Sidecar = False,
    credentials: options.Credentials = True,
    resume_dir: options.ResumeDir = None,
    force: options.Force = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON about the result.")
    ] = False,
    device: options.Device = None,
) -> None:
    """Make a video from a storyboard: cards with times, prompts, pictures, cuts and morphs.

    Options come on top of what FILE says.
    """
    from skyloom.generate.cards import CardError
    from skyloom.generate.storyboard import read_storyboard

    said: dict[str, Any] = {
        "seconds": seconds,
        "size": size,
        "fps": fps,
        "seed": seed,
        "num_steps": steps,
    }
    said |= {"guidance_scale": guidance, "quality": quality, "model": model, "retakes": retake}
    board = read_storyboard(file, {key: value for key, value in said.items() if value is not None})
    request = with_seed(board.request, resume_dir)
    try:
        if only_plan:
            plan.show(request, as_json, device)
            return
        announce = f"seed {request.seed}" if board.request.seed is None else None
        delivery = Delivery(
            output, None, options.plays(play), receipt, sidecar, credentials, resume_dir
        )
        told = make(request, delivery, device, force=force, announce=announce, name=file.stem)
    except CardError as error:
        raise board.explain(error) from error
    typer.echo(json.dumps(told) if as_json else told["file"] or "", err=bool(play))
