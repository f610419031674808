"""`skyloom show` and `skyloom replay`: print a receipt, and generate its video again."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skyloom.cli import options

if TYPE_CHECKING:
    from fractions import Fraction

    from skyloom.generate.edit_spec import Edit
    from skyloom.generate.export import ExportOptions
    from skyloom.generate.receipt import Receipt
    from skyloom.generate.replay import ReplayComparison
    from skyloom.generate.request import Request
    from skyloom.media.video import Video
    from skyloom.models.registry import ModelInfo
    from skyloom.safety.consent import MediaConsent

_DIGEST_CHARACTERS = 12


def show(
    file: Annotated[Path, typer.Argument(help="A video of skyloom, or its .receipt.json.")],
    tree: Annotated[
        bool, typer.Option("--tree", help="Draw the files it was made from, recursively.")
    ] = False,
    among: Annotated[
        list[Path] | None,
        typer.Option(help="Folders to search for parents (default: the folder of FILE)"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the receipt as JSON.")] = False,
) -> None:
    """Print the receipt of a video: how it was generated."""
    from skyloom.generate.lineage import draw_lineage
    from skyloom.generate.receipt import read_receipt

    if tree:
        for line in draw_lineage(file, (file.absolute().parent, *(among or []))):
            typer.echo(_escape(line))
        return
    receipt = read_receipt(file)
    if as_json:
        typer.echo(json.dumps(receipt.to_dict(), indent=1))
        return
    for name, value in receipt_rows(receipt):
        typer.echo(f"{name:10} {_escape(value)}")


def replay(
    file: Annotated[Path, typer.Argument(help="A video of skyloom, or its .receipt.json.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Output file (.mp4, .webm, .gif) "
            "(default: FILE's name and -again; no file with --verify)",
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Compare with FILE: exit code 1 if it differs by more than its codec."
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Continue although weights or LoRAs differ.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="Name of a model, or its folder (default: the receipt's)")
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="New path of the picture that the video started from.")
    ] = None,
    credentials: options.Credentials = True,
    as_json: options.AsJson = False,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda (default: the receipt's, if available)")
    ] = None,
) -> None:
    """Generate a video again from its receipt."""
    from skyloom.generate.export import ExportOptions, check_ready
    from skyloom.generate.receipt import read_receipt
    from skyloom.generate.replay import (
        check_loras,
        check_weights,
        compare_file,
        is_exact,
        request_from_receipt,
    )
    from skyloom.media.write import check_target

    receipt = read_receipt(file)
    target = output if output is not None or verify else _free_name(file)
    if target is not None:
        check_target(target)
        check_ready(credentials=credentials)
    request = request_from_receipt(receipt, image)
    info = _find_model(model, receipt)
    if not force:
        check_weights(receipt, info)
        check_loras(receipt)
    options = ExportOptions(credentials=credentials)
    video = _generate(info.folder, request, receipt, device, target=target, options=options)
    comparison = compare_file(file, receipt, video) if verify else None
    result: dict[str, Any] = {
        "file": None if target is None else str(target),
        "exact": is_exact(receipt, video),
        **(comparison.to_dict() if comparison else {}),
    }
    typer.echo(json.dumps(result) if as_json else _summary(result, comparison))
    if comparison is not None and not comparison.same:
        raise typer.Exit(1)


def receipt_rows(receipt: "Receipt") -> list[tuple[str, str]]:
    """The names and values of a receipt, most important first."""
    request = receipt.request
    frames = receipt.frames
    rows: list[tuple[str, object]] = [
        ("style" if request.cards else "prompt", request.prompt),
        *(("card", card) for card in _card_lines(request)),
        ("negative", request.negative_prompt),
        ("edit", None if request.edit is None else _edit_line(request.edit)),
        ("seed", request.seed),
        ("size", request.size),
        ("seconds", request.seconds),
        ("fps", request.fps),
        ("steps", request.num_steps),
        ("guidance", request.guidance_scale),
        ("quality", request.quality),
        ("image", request.image),
        ("consent", None if request.consent is None else _consent_line(request.consent)),
        ("retakes", request.retakes),
        *(("lora", _lora_line(lora)) for lora in receipt.loras),
        ("model", receipt.model),
        ("weights", receipt.weights),
        ("skyloom", receipt.skyloom),
        ("torch", receipt.torch),
        ("device", " ".join(filter(None, (receipt.device, receipt.dtype)))),
    ]
    if frames is not None:
        rows.append(("frames", f"{frames.shape[0]}, sha256 {frames.sha256}"))
    for parent in receipt.parents:
        digest = parent.sha256[:_DIGEST_CHARACTERS]
        rows.append(("parent", f"{digest} ({parent.role}, {parent.verb})"))
    spans = _span_lines(receipt)
    rows.extend(("span", line) for line in spans)
    for key, value in receipt.notes.items():
        if not (spans and key in ("spans", "prompts")):
            rows.append(("notes", f"{key}: {_note_text(value)}"))
    return [
        (name, f"{value:g}" if isinstance(value, float) else str(value))
        for name, value in rows
        if value not in (None, "")
    ]


def _lora_line(lora: Mapping[str, Any]) -> str:
    """Format a LoRA like: felt, weight 0.8, sha256 0123456789ab."""
    digest = str(lora.get("sha256"))[:_DIGEST_CHARACTERS]
    return f"{lora.get('name')}, weight {lora.get('weight')}, sha256 {digest}"


def _consent_line(consent: "MediaConsent") -> str:
    """Format a consent like: who Ada, expiry 2027-12-31."""
    return ", ".join(f"{name} {value}" for name, value in consent.to_dict().items())


def _card_lines(request: "Request") -> Iterator[str]:
    """Yield a line per card like: 1.5 s, cut, image cat.png: a red cat."""
    from skyloom.generate.parsing import parse_clock
    from skyloom.generate.timeline import DEFAULT_FADE

    for number, card in enumerate(request.cards):
        parts = [f"{float(parse_clock(card.at) or 0):g} s"]
        if card.cut:
            parts.append("cut")
        elif number:
            fade = DEFAULT_FADE if card.morph is None else parse_clock(card.morph)
            parts.append(f"fade {float(fade or 0):g} s")
        for kind, path in (("image", card.image), ("video", card.video)):
            if path:
                parts.append(f"{kind} {path}")
        if card.strength:
            parts.append(f"strength {card.strength:g}")
        yield f"{', '.join(parts)}: {card.prompt}"


def _span_lines(receipt: "Receipt") -> list[str]:
    """A line per span of an edit and prompt in it, like: 0 to 0.5 s, frames 0 to 7, kept: a cat.

    Receipts of older edits have spans without prompts. Empty for anything else.
    """
    fps = None if receipt.frames is None else receipt.frames.fps
    lines: list[str] = []
    made = "generated" if receipt.request.needs_model else "filtered"  # "made" in older receipts
    try:
        for first, end, written in receipt.notes["spans"]:
            kind = made if written == "made" else written
            prompts = receipt.notes.get("prompts") or [[first, end, ""]]
            for start, stop, prompt in prompts:
                begin = max(first, start)
                last = min(end, stop)
                if begin < last:
                    seconds = "" if fps is None else f"{_times(begin / fps, last / fps)}, "
                    text = f"{seconds}frames {begin} to {last - 1}, {kind}"
                    lines.append(f"{text}: {prompt}" if prompt else text)
    except (ArithmeticError, LookupError, TypeError, ValueError):  # no edit, or damaged notes
        return []
    return lines


def _times(start: "Fraction", stop: "Fraction") -> str:
    return f"{float(start):g} to {float(stop):g} s"


def _note_text(value: object) -> str:
    """A note as text; of windows, their number and which were sampled again."""
    windows = value.get("windows") if isinstance(value, dict) else None
    if not isinstance(windows, list) or not all(isinstance(one, dict) for one in windows):
        return json.dumps(value)
    takes = {str(one.get("window")): one.get("takes") for one in windows}
    again = [window for window, each in takes.items() if isinstance(each, list) and len(each) > 1]
    return f"{len(windows)} windows, sampled again: {', '.join(again) or 'none'}"


def _edit_line(edit: "Edit") -> str:
    """Format an edit like: retake of cat.mp4, start 1, stop 2."""
    parts = [f"{edit.verb} of {' and '.join(edit.videos)}"]
    for name, value in edit.to_dict().items():
        if name not in ("verb", "videos"):
            parts.append(f"{name} {value}")
    return ", ".join(parts)


def _find_model(model: str | None, receipt: "Receipt") -> "ModelInfo":
    """Find the given model, or that of the receipt by its name. Raises RequestError."""
    from skyloom.core.errors import RequestError
    from skyloom.models.registry import find_model

    if model is not None:
        return find_model(model)
    try:
        return find_model(receipt.model)
    except RequestError as error:
        raise RequestError(
            f"The receipt's model {receipt.model!r} is not installed.",
            hint="If it is in a folder of its own, pass that: --model FOLDER.",
            field="model",
        ) from error


def _generate(
    folder: Path,
    request: "Request",
    receipt: "Receipt",
    device: str | None,
    *,
    target: Path | None,
    options: "ExportOptions",
) -> "Video":
    """Generate the video on the receipt's device and dtype, as far as they are available.

    It is also written to `target`, if there is one.
    """
    import torch

    from skyloom.cli.generate import critic_for
    from skyloom.generate.export import export_steps
    from skyloom.generate.pipeline import load

    if device is None and receipt.device:
        missing = receipt.device == "cuda" and not torch.cuda.is_available()
        device = "cpu" if missing else receipt.device
    if receipt.device and device != receipt.device:
        typer.echo(
            f"The receipt's device is {receipt.device}, this run's is {device}: "
            "the frames will probably differ in some bits.",
            err=True,
        )
    if receipt.torch and receipt.torch != torch.__version__:
        typer.echo(
            f"The receipt's torch is {receipt.torch}, this run's is {torch.__version__}.", err=True
        )
    note = receipt.notes.get("critic")
    pipeline = load(str(folder), device=device, dtype=receipt.dtype or None)
    bounds = note.get("bounds") if isinstance(note, dict) else None
    critic = critic_for(request, pipeline.info, bounds)
    plan = pipeline.plan(request)
    steps = export_steps(pipeline.stream(plan, critic=critic), plan, target, options)
    return [step.video for step in steps if step.video is not None][-1]


def _summary(result: dict[str, Any], comparison: "ReplayComparison | None") -> str:
    """The result as text."""
    exact = {
        True: "exact: all frames are bit-identical to the receipt's",
        False: "not exact: the frames differ from the receipt's digest",
        None: "unknown: the receipt has no digest of the frames",
    }[result["exact"]]
    lines = [result["file"] or "", exact]
    if comparison is not None:
        file = comparison.file
        codec = comparison.codec
        lines += [
            f"the file differs by {file.largest} at most, {file.mean:.3f} on average (of 255)",
            f"its codec alone by {codec.largest} at most, {codec.mean:.3f} on average",
            "the file shows this video" if comparison.same else "the file shows something else",
        ]
    return "\n".join(filter(None, lines))


def _free_name(file: Path) -> Path:
    """An unused file name in the working folder: the file's name and -again."""
    from skyloom.media.write import SIDECAR, SUFFIXES

    name = Path(file.name.removesuffix(SIDECAR))
    suffix = name.suffix if name.suffix.lower() in SUFFIXES else SUFFIXES[0]
    path = Path(f"{name.stem}-again{suffix}")
    number = 1
    while path.exists():
        number += 1
        path = Path(f"{name.stem}-again-{number}{suffix}")
    return path


def _escape(text: str) -> str:
    """Escape characters of a foreign file that could control a terminal."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
