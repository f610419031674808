"""`skyloom edit VERB`: videos that exist in, a changed one out. What is not changed stays as it is, bit for bit."""

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skyloom.cli import options, plan
from skyloom.cli.generate import Delivery, free_name, make, with_seed

if TYPE_CHECKING:
    from skyloom.generate.request import Request

app = typer.Typer(
    help="Change videos by words: docs/editing.md shows every verb.", no_args_is_help=True
)

Video = Annotated[Path, typer.Argument(help="A video: ours, or any other.")]
Words = Annotated[
    str, typer.Argument(help="What it is to show (default: what the video was made of, if known)")
]
Strength = Annotated[
    str | None,
    typer.Option(
        help="How far from the source: 0 to 1, subtle, mild or strong (default: the verb's own)"
    ),
]
Overlap = Annotated[
    str | None, typer.Option(help="Seconds of the source that are looked at (default: two)")
]
From = Annotated[
    str | None, typer.Option("--from", help='Where the range begins: 2.5, "1:02.5" (default: 0)')
]
To = Annotated[str | None, typer.Option("--to", help="Where it ends (default: at the end)")]


@dataclass(frozen=True)
class How:
    """The options that every verb takes."""

    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="File (.mp4, .webm, .gif, lossless .mkv) (default: named after the video)",
        ),
    ] = None
    seed: options.Seed = None
    steps: options.Steps = None
    guidance: options.Guidance = None
    quality: options.Quality = None
    negative: options.Negative = ""
    model: options.Model = "diorama"
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse videos of another rate or size.")
    ] = False
    only_plan: Annotated[
        bool, typer.Option("--plan", help="Print what it would take; make nothing.")
    ] = False
    play: options.Play = None
    receipt: options.Receipt = True
    sidecar: options.Sidecar = False
    credentials: options.Credentials = True
    resume_dir: options.ResumeDir = None
    force: options.Force = False
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON about the result.")
    ] = False
    device: options.Device = None


Wish = tuple[str, dict[str, Any]]  # a prompt, and what an Edit or a Request says besides


def verb(function: Callable[..., Wish]) -> Callable[..., Wish]:
    """Make a function that says what is wished a command, with the options that every verb takes after its own."""
    shared = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type
        )
        for field in fields(How)
    ]

    def run(**given: Any) -> None:
        how = How(**{one.name: given.pop(one.name) for one in shared})
        prompt, said = function(**given)
        _make(function.__name__, prompt, said, how)

    signature = inspect.signature(function)
    own = [
        one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in signature.parameters.values()
    ]
    run.__signature__ = signature.replace(parameters=[*own, *shared], return_annotation=None)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in (*own, *shared)}
    run.__doc__ = function.__doc__
    app.command(function.__name__)(run)
    return function


def _make(name: str, prompt: str, said: dict[str, Any], how: How) -> None:
    """Plan or make what a verb wishes."""
    from skyloom.generate.request import Request

    request = Request(
        prompt,
        model=how.model,
        seed=how.seed,
        num_steps=how.steps,
        guidance_scale=how.guidance,
        quality=how.quality,
        negative_prompt=how.negative,
        **_asked(name, said, how),
    )
    if how.only_plan:
        plan.show(request, how.as_json, how.device)
        return
    request, playing = with_seed(request, how.resume_dir), options.plays(how.play)
    announce = f"seed {request.seed}" if how.seed is None and request.seed is not None else None
    target = how.output or (None if playing else _free(request, name))
    delivery = Delivery(
        target, None, playing, how.receipt, how.sidecar, how.credentials, how.resume_dir
    )
    told = make(request, delivery, how.device, force=how.force, announce=announce, name=name)
    typer.echo(json.dumps(told) if how.as_json else told["file"] or "", err=playing)
    if not how.as_json:
        for line in _joins(told.get("notes", {})):
            typer.echo(line, err=True)


def _asked(name: str, said: dict[str, Any], how: How) -> dict[str, Any]:
    """What a request says besides its prompt: an edit, or, where there are cards, a storyboard."""
    if "cards" in said:
        return said
    edit = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in said.items()
        if value is not None
    }
    return {"edit": {"verb": name, "strict": how.strict, **edit}}


def _free(request: "Request", name: str) -> Path:
    source = request.edit.videos[0] if request.edit else str(request.cards[0].image)
    return free_name(f"{Path(source).stem} {name}", Path())


def _joins(notes: dict[str, Any]) -> list[str]:
    """How the joins came out: their change over the ordinary change from frame to frame."""
    seams = notes.get("seams") or {}
    lines = [
        f"join at frame {at}: {ratio:g} times the ordinary change" for at, ratio in seams.items()
    ]
    closure = notes.get("closure")
    return (
        lines
        if closure is None
        else [*lines, f"the loop closes at {closure:g} times the ordinary change"]
    )


@verb
def remix(
    video: Video,
    prompt: Annotated[str, typer.Argument(help="What it is to show.")],
    strength: Strength = None,
) -> Wish:
    """Imagine a whole video anew, by another prompt."""
    return prompt, {"videos": [str(video)], "strength": strength}


@verb
def restyle(
    video: Video,
    style: Annotated[str, typer.Option(help="A style by name: `skyloom styles` lists them.")],
    prompt: Words = "",
    strength: Strength = None,
    styles: Annotated[
        Path | None, typer.Option(help="A TOML file with styles of your own.")
    ] = None,
) -> Wish:
    """Give a whole video another style, light or weather."""
    from skyloom.generate.styles import find_style

    return prompt, {
        "videos": [str(video)],
        "style": find_style(style, styles),
        "strength": strength,
    }


@verb
def retake(
    video: Video, prompt: Words = "", start: From = None, stop: To = None, strength: Strength = None
) -> Wish:
    """Make a range of time again; what is before and after stays."""
    return prompt, {"videos": [str(video)], "start": start, "stop": stop, "strength": strength}


@verb
def inpaint(
    video: Video,
    prompt: Annotated[str, typer.Argument(help="What the region is to show.")],
    region: Annotated[
        str | None,
        typer.Option(
            help="x,y,w,h in pixels or %; @1-2.5 for a while; or keys: x,y,w,h@0; x,y,w,h@2"
        ),
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="A picture or video: white is made, black is kept.")
    ] = None,
    feather: Annotated[
        int | None, typer.Option(help="Pixels over which the change comes in (default: 4)")
    ] = None,
    strength: Strength = None,
) -> Wish:
    """Make a region again; not a bit outside of it changes."""
    return prompt, {
        "videos": [str(video)],
        "region": region,
        "mask": mask,
        "feather": feather,
        "strength": strength,
    }


@verb
def extend(
    video: Video,
    prompt: Words = "",
    seconds: Annotated[str, typer.Option(help="How much is added.")] = "2",
    backward: Annotated[
        bool, typer.Option("--backward", help="At the beginning, not at the end.")
    ] = False,
    overlap: Overlap = None,
) -> Wish:
    """Let a video go on at its end, or begin earlier."""
    return prompt, {
        "videos": [str(video)],
        "seconds": seconds,
        "backward": backward,
        "overlap": overlap,
    }


@verb
def recut(
    video: Video,
    keep: Annotated[str, typer.Option(help="The part that stays, in seconds, like 1.0-2.5")],
    seconds: Annotated[str, typer.Option(help="How long the whole becomes.")],
    prompt: Words = "",
    overlap: Overlap = None,
) -> Wish:
    """Keep the best part of a video and let it grow on both sides."""
    start, _, stop = keep.partition("-")
    return prompt, {
        "videos": [str(video)],
        "start": start or None,
        "stop": stop or None,
        "seconds": seconds,
        "overlap": overlap,
    }


@verb
def loop(
    video: Video,
    prompt: Words = "",
    start: From = None,
    stop: To = None,
    bridge: Annotated[
        str | None, typer.Option(help="Seconds from the end back to the beginning (default: 1)")
    ] = None,
) -> Wish:
    """Make a loop: the end is led back to the beginning."""
    return prompt, {"videos": [str(video)], "start": start, "stop": stop, "bridge": bridge}


@verb
def blend(
    first: Video,
    second: Video,
    prompt: Annotated[
        str, typer.Option(help="What is seen where both are (default: the second's prompt)")
    ] = "",
    curve: Annotated[
        str,
        typer.Option(
            help='transition, mix, sample, or times and shares of the second: "0:0,1.5:1,3:0"'
        ),
    ] = "transition",
    seconds: Annotated[
        str | None, typer.Option(help="How long a transition lasts (default: 1)")
    ] = None,
    strength: Strength = None,
) -> Wish:
    """Make one video of two: cross over, mix, or borrow for a while."""
    return prompt, {
        "videos": [str(first), str(second)],
        "curve": curve,
        "seconds": seconds,
        "strength": strength,
    }


@verb
def stitch(
    videos: Annotated[list[Path], typer.Argument(help="Two videos or more, in order.")],
    prompt: Annotated[
        str, typer.Option(help="What is seen in between (default: the following video's prompt)")
    ] = "",
    morph: Annotated[
        str | None, typer.Option(help="Seconds made in between; 0 is a cut (default: 0.5)")
    ] = None,
) -> Wish:
    """Put videos one after another, with made transitions or hard cuts."""
    return prompt, {"videos": [str(video) for video in videos], "morph": morph}


@verb
def animate(
    image: Annotated[Path, typer.Argument(help="The picture that the video begins with.")],
    prompt: Annotated[str, typer.Argument(help="What it is to show.")],
    seconds: options.Seconds = None,
    last: Annotated[Path | None, typer.Option(help="A picture that it ends with.")] = None,
    keyframe: Annotated[
        list[str] | None, typer.Option(help="A picture at a time, like 1.5=middle.png")
    ] = None,
) -> Wish:
    """Let a picture move; with a last one, or more on the way, from picture to picture."""
    from skyloom.generate.keyframes import picture_cards

    cards, long = picture_cards(image, prompt, last, keyframe or [], seconds)
    return "", {"cards": cards, "seconds": long}


@verb
def upscale(
    video: Video, size: Annotated[str, typer.Option(help="Width x height, like 512x512")]
) -> Wish:
    """Enlarge by a filter (Lanczos): smooth, no detail is invented."""
    return "", {"videos": [str(video)], "size": size}


@verb
def interpolate(
    video: Video,
    fps: Annotated[str, typer.Option(help="Frames a second, more than it has, like 32")],
) -> Wish:
    """More frames a second, by motion between the frames that are there; those stay as they are."""
    return "", {"videos": [str(video)], "fps": fps}


def styles(
    file: Annotated[Path | None, typer.Option(help="A TOML file with styles of your own.")] = None,
) -> None:
    """List the styles for `skyloom edit restyle`."""
    from skyloom.generate.styles import list_styles

    for name, words in list_styles(file).items():
        typer.echo(f"{name:12} {words}")
