"""The options that ask for a video, the same for every verb that takes them."""

from pathlib import Path
from typing import Annotated

import typer

Prompt = Annotated[str, typer.Argument(help="What to show, in a sentence.")]
Seconds = Annotated[float | None, typer.Option(help="Length (default: the model's window)")]
Size = Annotated[
    str | None, typer.Option(help="Width x height, like 128x128 (default: the model's own)")
]
Fps = Annotated[float | None, typer.Option(help="Frames a second (default: the model's own)")]
Seed = Annotated[
    int | None, typer.Option(help="The same seed gives the same video (default: drawn)")
]
Steps = Annotated[int | None, typer.Option(help="Denoising steps (default: the model's own)")]
Guidance = Annotated[
    float | None,
    typer.Option(help="How strictly to follow the prompt; 1 is off (default: the model's own)"),
]
Quality = Annotated[
    str | None,
    typer.Option(
        help="fast (few steps) or best (many, guided) (default: fast, if the model has it)"
    ),
]
Negative = Annotated[str, typer.Option(help="What to avoid.")]
Picture = Annotated[Path | None, typer.Option(help="A picture to start from.")]
Model = Annotated[str, typer.Option(help="Name of a model, or its folder.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda (default: the best there is)")]
Play = Annotated[
    str | None,
    typer.Option(
        metavar="-", help="Write the video to standard output while it is made: --play - | mpv -"
    ),
]
Receipt = Annotated[bool, typer.Option(help="Write into the file how it was made.")]
Sidecar = Annotated[bool, typer.Option("--sidecar", help="Write that beside the file too.")]
Credentials = Annotated[
    bool,
    typer.Option(
        help="Sign the file as made by a model (C2PA). The watermark and the registry stay on."
    ),
]
ResumeDir = Annotated[
    Path | None,
    typer.Option(
        help="Keep finished windows and steps here; the same command goes on where it was stopped."
    ),
]
Retake = Annotated[
    int | None,
    typer.Option(
        help="Make a window that does not hold together with the first one again, this often at most."
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Start even if disk or memory may not do.")]


def plays(play: str | None) -> bool:
    """Whether to write to standard output. Raises RequestError for a place that is none."""
    from skyloom.core.errors import RequestError

    if play not in (None, "-"):
        raise RequestError(
            f"--play {play} is not known.", hint="Use --play - and a player that reads a pipe."
        )
    return play is not None
