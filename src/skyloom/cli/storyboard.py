"""`skyloom storyboard`: generate a video file from a file of cards."""

from pathlib import Path
from typing import Annotated

import typer

from skyloom.cli import options, plan
from skyloom.cli.generate import Delivery, make

_Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="Output file (.mp4, .webm, .gif) (default: named after FILE)"
    ),
]


def storyboard(
    file: Annotated[Path, typer.Argument(help="Cards as TOML or JSON; docs/long.md has examples.")],
    output: _Output = None,
    only_plan: options.OnlyPlan = False,
    seconds: options.Seconds = None,
    size: options.Size = None,
    fps: options.Fps = None,
    seed: options.Seed = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    quality: options.Quality = None,
    window_retries: options.WindowRetries = None,
    lora: options.Loras = None,
    consent: options.Consent = None,
    model: Annotated[
        str | None, typer.Option(help="Name of a model, or its folder (default: FILE's)")
    ] = None,
    play: options.Play = None,
    receipt: options.Receipt = True,
    sidecar: options.Sidecar = False,
    credentials: options.Credentials = True,
    resume_dir: options.ResumeDir = None,
    force: options.Force = False,
    as_json: options.AsJson = False,
    device: options.Device = None,
) -> None:
    """Generate a video from a storyboard: cards with times, prompts, media, cuts and crossfades.

    Options override the settings in FILE.
    """
    from skyloom.generate.cards import CardError
    from skyloom.generate.storyboard import read_storyboard

    overrides = {
        "seconds": seconds,
        "size": size,
        "fps": fps,
        "seed": seed,
        "num_steps": steps,
        "guidance_scale": guidance,
        "quality": quality,
        "model": model,
        "retakes": window_retries,
        "loras": lora or None,
        "consent": options.parse_consent(consent),
    }
    given = {key: value for key, value in overrides.items() if value is not None}
    board = read_storyboard(file, given)
    delivery = Delivery(
        output=output,
        preview=None,
        play=options.streams_to_stdout(play),
        receipt=receipt,
        sidecar=sidecar,
        credentials=credentials,
        resume=resume_dir,
    )
    try:
        if only_plan:
            plan.show(board.request, as_json, device)
        else:
            make(board.request, delivery, device, force=force, as_json=as_json, name=file.stem)
    except CardError as error:
        raise board.explain(error) from error
