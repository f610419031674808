"""`skyloom verify`: whether a file was made by a model, as its manifest, its watermark and the registry tell."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from skyloom.safety.credentials import Credentials
    from skyloom.safety.verify import Findings

_STATES = {
    "trusted": "whole, signed by this machine",
    "untrusted": "whole, but its signer is not known here",
    "invalid": "broken: the file or its manifest was changed",
}


def verify(
    file: Annotated[Path, typer.Argument(help="A video or a picture.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON about what was found.")
    ] = False,
) -> None:
    """Look for a C2PA manifest, the watermark, and the file in this machine's registry.

    Exit code 1 if the manifest is broken.
    """
    from skyloom.safety.verify import check

    findings = check(file)
    typer.echo(json.dumps(findings.to_dict()) if as_json else "\n".join(_lines(findings)))
    if findings.credentials is not None and findings.credentials.state == "invalid":
        raise typer.Exit(1)


def _lines(findings: "Findings") -> list[str]:
    """What was found, for people; text of a foreign file is spelled out where it could steer a terminal."""
    lines = _manifest(findings.credentials)
    lines += [
        f"watermark  {_span(mark.start, mark.stop)}id {mark.identity}" for mark in findings.marks
    ]
    lines += [] if findings.marks else ["watermark  none found"]
    for match in findings.matches:
        lines.append(f"registry   by {match.by}: {match.record.name}, made {match.record.made_at}")
    lines += [] if findings.matches else ["registry   not known here"]
    lines.append("made by a model" if findings.generated else "nothing says that a model made it")
    return [
        "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line)
        for line in lines
    ]


def _manifest(credentials: "Credentials | None") -> list[str]:
    if credentials is None:
        return ["manifest   none"]
    where = " (in the sidecar)" if credentials.sidecar else ""
    lines = [f"manifest   {_STATES[credentials.state]}{where}"]
    if credentials.signer:
        lines.append(f"           signed by {credentials.signer}, {credentials.issuer}")
    lines += (
        [f"           {', '.join(credentials.actions)}: {credentials.source_type}"]
        if credentials.actions
        else []
    )
    lines += [f"           from {parent}" for parent in credentials.parents]
    lines += [f"           {key} {value}" for key, value in (credentials.generation or {}).items()]
    return lines + [f"           {problem}" for problem in credentials.problems]


def _span(start: int, stop: int | None) -> str:
    return (
        ""
        if start == 0 and stop is None
        else f"frames {start} to {'the end' if stop is None else stop}: "
    )
