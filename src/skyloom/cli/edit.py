"""`skyloom edit VERB`: change existing videos. Frames and pixels that an edit keeps are copied.

The command of each verb is generated from EDIT_VERBS; `animate` is added by hand.
"""

import inspect
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skyloom.cli import options, plan
from skyloom.cli.generate import Delivery, free_name, make
from skyloom.generate.edit_verbs import EDIT_VERBS, EditField, EditVerb
from skyloom.models.registry import DEFAULT_MODEL

if TYPE_CHECKING:
    from skyloom.generate.request import Request

app = typer.Typer(help="Edit videos: docs/editing.md shows every verb.", no_args_is_help=True)

_OPTION_NAMES = {"start": "--from", "stop": "--to"}
_OPTION_DEFAULTS = {("extend", "seconds"): "2", ("blend", "curve"): "transition"}
_PROMPT_HELP = "What the result shows"
_SOURCE_PROMPT = "(default: the prompt of the video at that time, if known)"


@dataclass(frozen=True)
class SharedOptions:
    """Options of every edit command."""

    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Output file (.mp4, .webm, .gif, lossless .mkv) (default: named after the video)",
        ),
    ] = None
    seed: options.Seed = None
    steps: options.Steps = None
    guidance: options.Guidance = None
    quality: options.Quality = None
    negative: options.Negative = ""
    consent: options.Consent = None
    model: options.Model = DEFAULT_MODEL
    lora: options.Loras = None
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse videos that would have to be resampled.")
    ] = False
    only_plan: options.OnlyPlan = False
    play: options.Play = None
    receipt: options.Receipt = True
    sidecar: options.Sidecar = False
    credentials: options.Credentials = True
    resume_dir: options.ResumeDir = None
    force: options.Force = False
    as_json: options.AsJson = False
    device: options.Device = None


_STYLES_FILE = Annotated[Path | None, typer.Option(help="TOML file with your own styles.")]


def _edit_command(verb: EditVerb) -> None:
    """Add the command of a verb: its videos, prompt and fields, then the shared options."""

    def run(**values: Any) -> None:
        shared = _take_shared_options(values)
        prompt = values.pop("prompt", "")
        edit = {"verb": verb.name, "strict": shared.strict, **_edit_values(verb, values)}
        _run(verb.name, prompt, {"edit": edit}, shared)

    run.__doc__ = verb.summary
    own = [*_video_parameters(verb), *_prompt_parameters(verb), *_field_parameters(verb)]
    _add_command(verb.name, run, own)


def _add_command(name: str, run: Any, own: list[inspect.Parameter]) -> None:
    """Add a command with its own parameters and the shared ones."""
    shared = [_parameter(field.name, field.type, field.default) for field in fields(SharedOptions)]
    run.__signature__ = inspect.Signature([*own, *shared])
    run.__annotations__ = {one.name: one.annotation for one in (*own, *shared)}
    app.command(name)(run)


def _take_shared_options(values: dict[str, Any]) -> SharedOptions:
    """Remove the shared options from a command's values."""
    return SharedOptions(**{field.name: values.pop(field.name) for field in fields(SharedOptions)})


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> Any:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default
    )


def _video_parameters(verb: EditVerb) -> list[inspect.Parameter]:
    """One argument per video, or one for all where their number varies."""
    if verb.max_videos > verb.min_videos:
        text = f"{verb.min_videos} to {verb.max_videos} videos, in order."
        return [_parameter("videos", Annotated[list[Path], typer.Argument(help=text)])]
    names = ("video",) if verb.max_videos == 1 else ("first", "second")
    return [_parameter(name, Annotated[Path, typer.Argument(help="Video file.")]) for name in names]


def _prompt_parameters(verb: EditVerb) -> list[inspect.Parameter]:
    """The prompt: required, optional, or an option after several videos; none without a model."""
    if not verb.uses_model:
        return []
    if "prompt" in verb.required:
        return [_parameter("prompt", Annotated[str, typer.Argument(help=f"{_PROMPT_HELP}.")])]
    if verb.max_videos > 1:
        text = f"{_PROMPT_HELP} in generated frames (default: the prompt of the later video)"
        return [_parameter("prompt", Annotated[str, typer.Option(help=text)], "")]
    text = f"{_PROMPT_HELP} {_SOURCE_PROMPT}"
    return [_parameter("prompt", Annotated[str, typer.Argument(help=text)], "")]


def _field_parameters(verb: EditVerb) -> list[inspect.Parameter]:
    """One option per field of a verb."""
    if verb.name == "recut":  # one option for both ends of the range
        text = "Time range to keep in seconds, like 1.0-2.5."
        keep = _parameter("keep", Annotated[str, typer.Option(help=text)])
        rest = [field for field in verb.fields if field.name not in _OPTION_NAMES]
        return [keep, *(_field_parameter(verb, field) for field in rest)]
    parameters = [_field_parameter(verb, field) for field in verb.fields]
    if verb.name == "restyle":
        parameters.append(_parameter("styles", _STYLES_FILE, None))
    return parameters


def _field_parameter(verb: EditVerb, field: EditField) -> inspect.Parameter:
    """The option of a field: required, or None by default, which leaves it to the verb."""
    name = _OPTION_NAMES.get(field.name, f"--{field.name}")
    kind = {"integer": int, "file": Path, "flag": bool}.get(field.kind, str)
    default = _OPTION_DEFAULTS.get((verb.name, field.name))
    text = field.description
    if kind is bool:
        return _parameter(field.name, Annotated[bool, typer.Option(name, help=text)], False)
    if default is not None:
        return _parameter(field.name, Annotated[kind, typer.Option(name, help=text)], default)
    if field.name in verb.required:
        return _parameter(field.name, Annotated[kind, typer.Option(name, help=text)])
    if field.default is not None:
        text = f"{text.removesuffix('.')} (default: {field.default})"
    return _parameter(field.name, Annotated[kind | None, typer.Option(name, help=text)], None)


def _edit_values(verb: EditVerb, values: dict[str, Any]) -> dict[str, Any]:
    """The fields of an Edit from the values of a command."""
    own_styles = values.pop("styles", None)
    keep = values.pop("keep", None)
    videos = [values.pop(name) for name in ("video", "first", "second") if name in values]
    found = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in values.items()
        if value is not None and name != "videos"
    }
    found["videos"] = [str(path) for path in values.get("videos", videos)]
    if verb.name == "restyle":
        from skyloom.generate.styles import find_style

        found["style"] = find_style(found["style"], own_styles)
    if keep is not None:
        start, _, stop = keep.partition("-")
        found.update({name: text for name, text in (("start", start), ("stop", stop)) if text})
    return found


def _run(name: str, prompt: str, fields_of_request: dict[str, Any], shared: SharedOptions) -> None:
    """Plan a request, or generate and write its video."""
    from skyloom.generate.loras import Lora
    from skyloom.generate.request import Request

    request = Request(
        prompt,
        model=shared.model,
        seed=shared.seed,
        num_steps=shared.steps,
        guidance_scale=shared.guidance,
        quality=shared.quality,
        negative_prompt=shared.negative,
        loras=tuple(map(Lora.parse, shared.lora or ())),
        consent=options.parse_consent(shared.consent),
        **fields_of_request,
    )
    if shared.only_plan:
        plan.show(request, shared.as_json, shared.device)
        return
    playing = options.streams_to_stdout(shared.play)
    delivery = Delivery(
        output=shared.output or (None if playing else _default_output(request, name)),
        preview=None,
        play=playing,
        receipt=shared.receipt,
        sidecar=shared.sidecar,
        credentials=shared.credentials,
        resume=shared.resume_dir,
    )
    result = make(
        request,
        delivery,
        shared.device,
        force=shared.force,
        as_json=shared.as_json,
        name=name,
    )
    if not shared.as_json:
        for line in _describe_seams(result.get("notes", {})):
            typer.echo(line, err=True)


def _default_output(request: "Request", name: str) -> Path:
    """A free file name from the source's name and the verb."""
    source = request.edit.videos[0] if request.edit else str(request.cards[0].image)
    return free_name(f"{Path(source).stem} {name}", Path())


def _describe_seams(notes: dict[str, Any]) -> list[str]:
    """One line per seam: its change divided by the change between ordinary frames."""
    seams = notes.get("seams") or {}
    lines = [
        f"seam at frame {frame}: {ratio:g} times the ordinary change"
        for frame, ratio in seams.items()
    ]
    if (closure := notes.get("closure")) is not None:
        lines.append(f"seam of the loop: {closure:g} times the ordinary change")
    return lines


def animate(
    image: Annotated[Path, typer.Argument(help="First picture of the video.")],
    prompt: Annotated[str, typer.Argument(help=f"{_PROMPT_HELP}.")],
    seconds: options.Seconds = None,
    last: Annotated[Path | None, typer.Option(help="Last picture of the video.")] = None,
    keyframe: Annotated[
        list[str] | None, typer.Option(help="Picture at a time, like 1.5=middle.png.")
    ] = None,
) -> dict[str, Any]:
    """The fields of a storyboard request that moves from picture to picture."""
    from skyloom.generate.keyframes import picture_cards

    cards, length = picture_cards(image, prompt, last, keyframe or [], seconds)
    return {"cards": cards, "seconds": length}


def _animate_command() -> None:
    """Add `animate`: a storyboard of pictures with the shared options of edits."""

    def run(**values: Any) -> None:
        shared = _take_shared_options(values)
        _run("animate", "", animate(**values), shared)

    run.__doc__ = "Animate a picture; with --last or --keyframe, move from picture to picture."
    own = [
        one.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for one in inspect.signature(animate).parameters.values()
    ]
    _add_command("animate", run, own)


def _add_commands() -> None:
    for verb in EDIT_VERBS.values():
        if verb.name == "upscale":
            _animate_command()
        _edit_command(verb)


_add_commands()


def styles(
    file: Annotated[Path | None, typer.Option(help="TOML file with your own styles.")] = None,
) -> None:
    """List the styles for `skyloom edit restyle`."""
    from skyloom.generate.styles import list_styles

    for name, words in list_styles(file).items():
        typer.echo(f"{name:12} {words}")
