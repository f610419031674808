"""Writes docs/cli.md from the command line itself; `make docs` runs it and tests/conventions compares.

The page is built from the parsed commands, not from --help, so that it does not depend on the terminal's width.
"""

from collections.abc import Iterator
from pathlib import Path

import typer.main

from skyloom.cli.app import app

PAGE = Path(__file__).with_name("cli.md")
OPENING = """# The command line

Every verb and option of `skyloom`, written by `make docs`; do not edit it by hand. `skyloom VERB --help` says the same.
Options of the first table stand before the verb. Exit code 0 is success, 2 a wrong request or setting, 1 a failure.
"""


def walk(command, name: str) -> Iterator[tuple[str, object]]:
    """Every command below this one with its full name, in the order of `--help`."""
    yield name, command
    for verb, child in getattr(command, "commands", {}).items():
        yield from walk(child, f"{name} {verb}")


def row(parameter) -> str:
    """One line of a command's table: how it is written, its default, what it does."""
    if parameter.opts[0].startswith("-"):
        written = ", ".join(
            f"`{spelling}`" for spelling in [*parameter.opts, *parameter.secondary_opts]
        )
    else:
        written = f"`{parameter.name.upper()}{'...' if parameter.nargs == -1 else ''}`"
    text = (parameter.help or "").replace("\\[", "[").replace("|", "\\|")
    text, _, told = text.removesuffix("]").partition(" [default: ")
    if parameter.required:
        told = "required"
    elif (
        parameter.default is not None and parameter.default is not False and parameter.default != ""
    ):
        told = f"`{parameter.default}`"
    return f"| {written} | {told} | {text} |"


def section(name: str, command) -> str:
    """The heading, the sentence and the table of one command."""
    lines = [f"## {name}", "", " ".join((command.help or "").split())]
    rows = [row(parameter) for parameter in command.params if not parameter.hidden]
    if rows:
        lines += ["", "| | default | |", "|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def reference() -> str:
    """The whole page."""
    root = typer.main.get_command(app)
    return "\n".join(
        [OPENING, *(section(name, command) for name, command in walk(root, "skyloom"))]
    )


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
