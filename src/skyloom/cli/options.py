"""Options shared by the commands that generate a video."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from skyloom.safety.consent import MediaConsent

Prompt = Annotated[str, typer.Argument(help="What to show, in a sentence.")]
Seconds = Annotated[float | None, typer.Option(help="Length (default: one window of the model)")]
Size = Annotated[
    str | None, typer.Option(help="Width x height, like 128x128 (default: the model's own)")
]
Fps = Annotated[float | None, typer.Option(help="Frames per second (default: the model's own)")]
Seed = Annotated[
    int | None, typer.Option(help="The same seed gives the same video (default: random)")
]
Steps = Annotated[int | None, typer.Option(help="Denoising steps (default: the model's own)")]
Guidance = Annotated[
    float | None,
    typer.Option(help="Classifier-free guidance scale; 1 is off (default: the model's own)"),
]
Quality = Annotated[
    str | None,
    typer.Option(
        help="fast (few steps) or best (many, guided) (default: fast, if the model has it)"
    ),
]
Schedule = Annotated[
    str | None,
    typer.Option(
        help="Noise levels of an open checkpoint: wan (the original code, default) or diffusers"
    ),
]
Negative = Annotated[str, typer.Option(help="Negative prompt: what to avoid.")]
Picture = Annotated[Path | None, typer.Option(help="First picture of the video.")]
Model = Annotated[str, typer.Option(help="Name of a model, or its folder.")]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="NAME[:WEIGHT]",
        help="LoRA: a file, or a name in the data folder's loras; weight 1 by default. Repeatable.",
    ),
]
Consent = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=TEXT",
        help="Consent of the people in the pictures and videos: who, scope or expiry. Repeatable.",
    ),
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:N or mps (default: cuda if available)")
]
Play = Annotated[
    str | None,
    typer.Option(
        metavar="-",
        help="Stream the video to standard output during generation: --play - | mpv -",
    ),
]
Receipt = Annotated[bool, typer.Option(help="Store in the file how it was generated.")]
Sidecar = Annotated[bool, typer.Option("--sidecar", help="Also write the receipt to a sidecar.")]
Credentials = Annotated[
    bool,
    typer.Option(help="Sign the file as generated (C2PA). Watermark and registry are always on."),
]
ResumeDir = Annotated[
    Path | None,
    typer.Option(help="Folder of checkpoints; the same command continues an interrupted run."),
]
WindowRetries = Annotated[
    int | None,
    typer.Option(
        "--retake",
        help="Rejection sampling: sample a window that does not match the first one again, "
        "at most this often. Unrelated to `skyloom edit retake`.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Start even if disk or memory may be short.")]
OnlyPlan = Annotated[bool, typer.Option("--plan", help="Print the plan without generating.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one line of JSON.")]


def streams_to_stdout(play: str | None) -> bool:
    """Whether --play is set. Raises RequestError for values other than "-"."""
    from skyloom.core.errors import RequestError

    if play not in (None, "-"):
        raise RequestError(
            f"--play must be -, got {play}.", hint="Pipe it to a player: --play - | mpv -"
        )
    return play is not None


def parse_consent(pairs: list[str] | None) -> "MediaConsent | None":
    """Return the consent that --consent states; None without it. Raises RequestError."""
    from skyloom.core.errors import RequestError
    from skyloom.safety.consent import MediaConsent

    if not pairs:
        return None
    values = [pair.partition("=") for pair in pairs]
    if wrong := next((key for key, equals, _ in values if not equals), None):
        raise RequestError(f"--consent must be KEY=TEXT, got {wrong}.", hint="--consent who=Ada")
    return MediaConsent.from_dict({key: text for key, _, text in values})
