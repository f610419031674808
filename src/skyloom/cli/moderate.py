"""`skyloom moderate`: check pictures and videos by the policy; print rules that block some."""

import json
from pathlib import Path
from typing import Annotated

import typer

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".mp4", ".mov", ".webm", ".mkv"}


def moderate(
    files: Annotated[list[Path], typer.Argument(help="Pictures, videos, or folders of them.")],
    rule: Annotated[
        str | None,
        typer.Option(help="Print a rule with this name that blocks the files, for a policy file."),
    ] = None,
    message: Annotated[
        str, typer.Option(help="With --rule: message for the user.")
    ] = "This picture is not shown.",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON for each file.")
    ] = False,
) -> None:
    """Check pictures and videos, one frame a second, by the policy in SKYLOOM_POLICY.

    Exit code 1 if one is refused. `skyloom moderate logo.png --rule logo >> own.toml` blocks one.
    """
    paths = [path for file in files for path in _inside(file)]
    if rule is not None:
        _print_rule(rule, message, paths)
        return
    from dataclasses import asdict

    from skyloom.safety.frame_moderation import load_frame_moderator, moderate_file
    from skyloom.safety.moderation import ModerationResult

    moderator = load_frame_moderator()
    if moderator is None:
        typer.echo("The policy has no picture or classifier rules: nothing is checked.", err=True)
    refused = False
    for path in paths:
        result = ModerationResult(True) if moderator is None else moderate_file(moderator, path)
        line = f"allowed  {path}"
        if not result.allowed:
            refused = True
            line = f"refused  {path}: {result.rule} at {result.at or 0:g} s"
        typer.echo(json.dumps({"file": str(path), **asdict(result)}) if as_json else line)
    if refused:
        raise typer.Exit(1)


def _print_rule(name: str, message: str, paths: list[Path]) -> None:
    """Print a [[pictures]] table with the perceptual hashes of the files."""
    from skyloom.safety.frame_moderation import perceptual_hashes

    hashes = dict.fromkeys(one for path in paths for one in perceptual_hashes(path))
    lines = [f'    "{one}",' for one in hashes]
    table = ["", "[[pictures]]", f"name = {json.dumps(name)}", f"message = {json.dumps(message)}"]
    typer.echo("\n".join([*table, "looks = [", *lines, "]"]))


def _inside(path: Path) -> list[Path]:
    """Return a file, or the pictures and videos of a folder in order. Raises RequestError."""
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
            f"{path} has no pictures or videos.", hint="Choose another folder or a file."
        )
    return found
