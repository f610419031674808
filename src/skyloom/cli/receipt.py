"""`skyloom show` and `skyloom replay`: how a video was made, and making it again."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skyloom.cli import options

if TYPE_CHECKING:
    from skyloom.generate.edit_spec import Edit
    from skyloom.generate.receipt import Receipt
    from skyloom.generate.replay import Verdict
    from skyloom.generate.request import Request
    from skyloom.media.video import Video

_SHORT = 12


def show(
    file: Annotated[Path, typer.Argument(help="A video of skyloom's, or its .receipt.json.")],
    tree: Annotated[
        bool, typer.Option("--tree", help="Draw what it was made from, and that from what.")
    ] = False,
    among: Annotated[
        list[Path] | None,
        typer.Option(help="Folders to look for parents in (default: FILE's own alone)"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the receipt as it is.")] = False,
) -> None:
    """How a video was made: its receipt."""
    from skyloom.generate.lineage import draw_lineage
    from skyloom.generate.receipt import read_receipt

    if tree:
        for line in draw_lineage(file, (file.absolute().parent, *(among or []))):
            typer.echo(_harmless(line))
        return
    receipt = read_receipt(file)
    if as_json:
        typer.echo(json.dumps(receipt.to_dict(), indent=1))
        return
    for name, value in describe(receipt):
        typer.echo(f"{name:10} {_harmless(value)}")


def replay(
    file: Annotated[Path, typer.Argument(help="A video of skyloom's, or its .receipt.json.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="File (.mp4, .webm, .gif) (default: FILE's name and -again; none to verify)",
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Compare with FILE: exit code 1 if it differs by more than its codec."
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Go on although the weights are others.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="Name of a model, or its folder (default: the receipt's)")
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="Where the picture is now that the video started from.")
    ] = None,
    credentials: options.Credentials = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON about the result.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda (default: the receipt's, if it is here)")
    ] = None,
) -> None:
    """Make a video again from its receipt."""
    from skyloom.generate.export import check_ready, publish
    from skyloom.generate.receipt import read_receipt
    from skyloom.generate.replay import check_weights, compare_file, is_exact, request_again
    from skyloom.media.write import check_target
    from skyloom.models.registry import find_model

    receipt = read_receipt(file)
    target = output if output is not None or verify else _again(file)
    if target is not None:
        check_target(target)
        check_ready(credentials=credentials)
    request = request_again(receipt, image)
    info = find_model(model or receipt.model)
    if not force:
        check_weights(receipt, info)
    video = _make(info.folder, request, receipt, device)
    if target is not None:
        publish(video.save(target), video.receipt, looks=_looks(video), credentials=credentials)
    told: dict[str, Any] = {
        "file": None if target is None else str(target),
        "exact": is_exact(receipt, video),
    }
    verdict = compare_file(file, receipt, video) if verify else None
    told |= verdict.to_dict() if verdict else {}
    typer.echo(json.dumps(told) if as_json else _sentence(told, verdict))
    if verdict is not None and not verdict.same:
        raise typer.Exit(1)


def _looks(video: "Video") -> list[str]:
    from skyloom.safety.provenance import FrameHasher

    glimpses = FrameHasher(video.fps)
    glimpses.append(video.frames)
    return glimpses.hashes


def describe(receipt: "Receipt") -> list[tuple[str, str]]:
    """A receipt as names and values for people, in the order in which they ask."""
    asked, frames = receipt.request, receipt.frames
    rows: list[tuple[str, object]] = [
        ("prompt", asked.prompt),
        ("negative", asked.negative_prompt),
        ("edit", None if asked.edit is None else _edit_line(asked.edit)),
        ("seed", asked.seed),
        ("size", asked.size),
        ("seconds", asked.seconds),
        ("fps", asked.fps),
        ("steps", asked.num_steps),
        ("guidance", asked.guidance_scale),
        ("quality", asked.quality),
        ("image", asked.image),
        ("retakes", asked.retakes),
        ("model", receipt.model),
        ("weights", receipt.weights),
        ("skyloom", receipt.skyloom),
        ("torch", receipt.torch),
        ("device", " ".join(filter(None, (receipt.device, receipt.dtype)))),
    ]
    if frames is not None:
        rows.append(("frames", f"{frames.shape[0]}, sha256 {frames.sha256}"))
    rows += [
        ("parent", f"{parent.sha256[:_SHORT]} ({parent.role}, {parent.verb})")
        for parent in receipt.parents
    ]
    rows += [("notes", f"{key}: {_note(value)}") for key, value in receipt.notes.items()]
    plain = ((name, f"{value:g}" if isinstance(value, float) else value) for name, value in rows)
    return [(name, str(value)) for name, value in plain if value not in (None, "")]


def _note(value: object) -> str:
    """A note; of windows only how many there are, and which were made again."""
    windows = value.get("windows") if isinstance(value, dict) else None
    if not isinstance(windows, list) or not all(isinstance(one, dict) for one in windows):
        return json.dumps(value)
    takes = {str(one.get("window")): one.get("takes") for one in windows}
    again = [window for window, each in takes.items() if isinstance(each, list) and len(each) > 1]
    return f"{len(windows)} windows, made again: {', '.join(again) or 'none'}"


def _edit_line(edit: "Edit") -> str:
    """Like: retake of cat.mp4, start 1, stop 2."""
    told = {name: value for name, value in edit.to_dict().items() if name not in ("verb", "videos")}
    return ", ".join(
        [f"{edit.verb} of {' and '.join(edit.videos)}", *(f"{name} {told[name]}" for name in told)]
    )


def _make(folder: Path, request: "Request", receipt: "Receipt", device: str | None) -> "Video":
    """The video once more, on the device and in the number format of the receipt as far as they are here."""
    import torch

    from skyloom.cli.generate import critic_for
    from skyloom.generate.pipeline import load

    if device is None and receipt.device:
        device = (
            "cpu" if receipt.device == "cuda" and not torch.cuda.is_available() else receipt.device
        )
    if receipt.device and device != receipt.device:
        typer.echo(f"made on {receipt.device}, again on {device}: other bits are likely", err=True)
    if receipt.torch and receipt.torch != torch.__version__:
        typer.echo(f"made with torch {receipt.torch}, again with {torch.__version__}", err=True)
    noted = receipt.notes.get("critic")
    critic = critic_for(request, noted.get("bounds") if isinstance(noted, dict) else None)
    return load(str(folder), device=device, dtype=receipt.dtype or None).generate(
        request, critic=critic
    )


def _sentence(told: dict[str, Any], verdict: "Verdict | None") -> str:
    """What was found, for people."""
    exact = {
        True: "exact: every frame is as it was made",
        False: "not exact: the frames are not the same bits",
        None: "the receipt has no digest, so exactness cannot be told",
    }[told["exact"]]
    lines = [told["file"] or "", exact]
    if verdict is not None:
        there, codec = verdict.file, verdict.codec
        lines.append(
            f"the file differs by {there.largest} at most, {there.mean:.3f} on average (of 255)"
        )
        lines.append(f"its codec alone by {codec.largest} at most, {codec.mean:.3f} on average")
        lines.append(
            "the file shows this video" if verdict.same else "the file shows something else"
        )
    return "\n".join(filter(None, lines))


def _again(file: Path) -> Path:
    """A free name beside the working folder's files, after the one that is made again."""
    from skyloom.media.write import SIDECAR, SUFFIXES

    name = Path(file.name.removesuffix(SIDECAR))
    suffix = name.suffix if name.suffix.lower() in SUFFIXES else SUFFIXES[0]
    path, number = Path(f"{name.stem}-again{suffix}"), 1
    while path.exists():
        number += 1
        path = Path(f"{name.stem}-again-{number}{suffix}")
    return path


def _harmless(text: str) -> str:
    """Text of a foreign file, with what could steer a terminal spelled out."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
