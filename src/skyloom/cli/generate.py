"""`skyloom generate`: a sentence in, a video file out."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from skyloom.generate.pipeline import Pipeline
    from skyloom.generate.request import Request
    from skyloom.media.video import Video

_SLUG_LENGTH = 60


def generate(
    prompt: Annotated[str, typer.Argument(help="What to show, in a sentence.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File (.mp4, .webm, .gif) [default: named after the prompt]"),
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Length [default: the model's window]")] = None,
    size: Annotated[str | None, typer.Option(help="Width x height, like 128x128 [default: the model's own]")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second [default: the model's own]")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same video [default: drawn]")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps [default: the model's own]")] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="How strictly to follow the prompt; 1 is off [default: the model's own]"),
    ] = None,
    negative: Annotated[str, typer.Option(help="What to avoid.")] = "",
    image: Annotated[Path | None, typer.Option(help="A picture to start from.")] = None,
    model: Annotated[str, typer.Option(help="Name of a model, or its folder.")] = "diorama",
    preview: Annotated[Path | None, typer.Option(help="Keep a PNG of the video in the making here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON about the result.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda [default: the best there is]")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Make a video from a sentence."""
    from skyloom.generate.pipeline import load
    from skyloom.generate.request import Request
    from skyloom.media.write import check_target

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
    target = output or free_name(prompt, Path())
    check_target(target)
    pipeline = load(model, device=device)
    if seed is None:
        typer.echo(f"seed {request.seed}", err=True)
    video = show_progress(pipeline, request, preview)
    video.save(target)
    summary = {"file": str(target), "seconds": video.seconds, **video.receipt}
    typer.echo(json.dumps(summary, ensure_ascii=False) if as_json else str(target))


def show_progress(pipeline: "Pipeline", request: "Request", preview: Path | None) -> "Video":
    """Make the video behind a progress bar with phase, step and time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    steps = pipeline.stream(request)
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, int] = {}
        for step in steps:
            if step.phase not in tasks:
                tasks[step.phase] = bar.add_task(step.phase, total=step.total)
            bar.update(tasks[step.phase], completed=step.index)  # type: ignore[arg-type]
            if step.notice:
                console.print(step.notice)
            picture = step.preview() if preview is not None else None
            if picture is not None and preview is not None:
                _write_picture(picture.numpy(), preview)
            if step.video is not None:
                return step.video
    raise AssertionError("a stream ends with a video")


def _write_picture(pixels: object, path: Path) -> None:
    from PIL import Image

    partial = path.with_name(f".{path.name}.png")
    Image.fromarray(pixels).save(partial)  # type: ignore[arg-type]
    partial.replace(path)


def free_name(prompt: str, folder: Path) -> Path:
    """A file name made of the prompt's words that is not taken yet."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:_SLUG_LENGTH].strip("-") or "video"
    path, number = folder / f"{words}.mp4", 1
    while path.exists():
        number += 1
        path = folder / f"{words}-{number}.mp4"
    return path
