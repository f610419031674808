"""`skyloom generate`: a sentence in, a video file out."""

import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.progress import TaskID

    from skyloom.generate.pipeline import Step
    from skyloom.media.video import Video

_SLUG_LENGTH = 60


def generate(
    prompt: Annotated[str, typer.Argument(help="What to show, in a sentence.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File (.mp4, .webm, .gif) (default: named after the prompt)"),
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Length (default: the model's window)")] = None,
    size: Annotated[str | None, typer.Option(help="Width x height, like 128x128 (default: the model's own)")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second (default: the model's own)")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same video (default: drawn)")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps (default: the model's own)")] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="How strictly to follow the prompt; 1 is off (default: the model's own)"),
    ] = None,
    negative: Annotated[str, typer.Option(help="What to avoid.")] = "",
    image: Annotated[Path | None, typer.Option(help="A picture to start from.")] = None,
    model: Annotated[str, typer.Option(help="Name of a model, or its folder.")] = "diorama",
    preview: Annotated[Path | None, typer.Option(help="Keep a PNG of the video in the making here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON about the result.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda (default: the best there is)")] = None,
) -> None:
    """Make a video from a sentence."""
    from skyloom.generate.pipeline import load
    from skyloom.generate.request import Request
    from skyloom.media.write import PICTURE_SUFFIXES, check_target

    request = Request(
        prompt,
        model=model,
        seconds=seconds,
        size=size,
        fps=fps,
        seed=seed,
        num_steps=steps,
        guidance_scale=guidance,
        negative_prompt=negative,
        image=None if image is None else str(image),
    ).with_seed()
    check_target(output or free_name(prompt, Path()))
    if preview is not None:
        check_target(preview, PICTURE_SUFFIXES)
    stream = load(model, device=device).stream(request)
    if seed is None:
        typer.echo(f"seed {request.seed}", err=True)
    video = show_progress(stream, preview)
    file = video.save(output or free_name(prompt, Path()))
    summary = {"file": str(file), "seconds": video.seconds, **video.receipt}
    typer.echo(json.dumps(summary) if as_json else str(file))


def show_progress(steps: "Iterator[Step]", preview: Path | None) -> "Video":
    """Make the video behind a progress bar with phase, step and time left; the latest preview goes to a file."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from skyloom.media.write import write_picture

    console = Console(stderr=True)
    columns = (TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, TaskID] = {}
        for step in steps:
            if step.phase not in tasks:
                tasks[step.phase] = bar.add_task(step.phase, total=step.total)
            bar.update(tasks[step.phase], completed=step.index)
            if step.notice:
                console.print(step.notice, markup=False, highlight=False)
            if preview is not None and (picture := step.preview()) is not None:
                write_picture(picture, preview)
            if step.video is not None:
                return step.video
    raise AssertionError("a stream ends with a video")


def free_name(prompt: str, folder: Path) -> Path:
    """A file name made of the prompt's words that is not taken yet."""
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode()
    words = re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")[:_SLUG_LENGTH].strip("-") or "video"
    path, number = folder / f"{words}.mp4", 1
    while path.exists():
        number += 1
        path = folder / f"{words}-{number}.mp4"
    return path
