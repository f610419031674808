"""`skyloom moderate`: what the policy says of pictures and videos, and the looks to block some by."""

import json
from pathlib import Path
from typing import Annotated

import typer

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".mp4", ".mov", ".webm", ".mkv"}


def moderate(
    files: Annotated[list[Path], typer.Argument(help="Pictures, videos, or folders of them.")],
    rule: Annotated[
        str | None,
        typer.Option(
            help="Print a rule of this name that blocks them, to be put into a policy file."
        ),
    ] = None,
    message: Annotated[
        str, typer.Option(help="With --rule: what to say to the user.")
    ] = "This picture is not shown.",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON for each file.")
    ] = False,
) -> None:
    """Check pictures and videos, one frame a second, by the policy that SKYLOOM_POLICY names.

    Exit code 1 if one is refused. `skyloom moderate logo.png --rule logo >> policy.toml` blocks one.
    """
    paths = [path for file in files for path in _inside(file)]
    if rule is not None:
        _print_rule(rule, message, paths)
        return
    from dataclasses import asdict

    from skyloom.safety.frame_moderation import load_frame_moderator, moderate_file
    from skyloom.safety.moderation import ModerationResult

    judge, refused = load_frame_moderator(), False
    if judge is None:
        typer.echo(
            "The policy has no pictures to block and no classifiers: nothing is looked at.",
            err=True,
        )
    for path in paths:
        verdict = ModerationResult(True) if judge is None else moderate_file(judge, path)
        refused |= not verdict.allowed
        told = f"refused  {path}: {verdict.rule} at {verdict.at or 0:g} s"
        line = told if not verdict.allowed else f"allowed  {path}"
        typer.echo(json.dumps({"file": str(path), **asdict(verdict)}) if as_json else line)
    if refused:
        raise typer.Exit(1)


def _print_rule(name: str, message: str, paths: list[Path]) -> None:
    """A [[pictures]] table that knows the files by their looks."""
    from skyloom.safety.frame_moderation import perceptual_hashes

    looks = dict.fromkeys(look for path in paths for look in perceptual_hashes(path))
    lines = [f'    "{look}",' for look in looks]
    table = ["", "[[pictures]]", f"name = {json.dumps(name)}", f"message = {json.dumps(message)}"]
    typer.echo("\n".join([*table, "looks = [", *lines, "]"]))


def _inside(path: Path) -> list[Path]:
    """A file, or the pictures and videos of a folder, in order. Raises RequestError for a folder without any."""
    from skyloom.core.errors import RequestError

    if not path.exists():
        raise RequestError(f"{path} does not exist.", hint="Check the path.")
    if not path.is_dir():
        return [path]
    found = sorted(
        one for one in path.rglob("*") if one.is_file() and one.suffix.lower() in _SUFFIXES
    )
    if not found:
        raise RequestError(
            f"{path} holds no pictures or videos.", hint="Name another folder, or a file."
        )
    return found
