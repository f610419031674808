"""Write docs/cli.md from the commands; `make docs` runs it and tests/conventions compares.

The page is built from the parsed commands, so it does not depend on the width of the terminal.
"""

from collections.abc import Iterator
from pathlib import Path

import typer.core
import typer.main

from skyloom.cli.commands import app

PAGE = Path(__file__).with_name("cli.md")
OPENING = """# The command line

Every verb and option of `skyloom`, written by `make docs`; do not edit it by hand. `skyloom VERB --help` prints the same.
Options of the first table come before the verb. Exit codes: 0 success, 2 invalid request or setting, 1 failure.
"""


def walk(command, name: str) -> Iterator[tuple[str, object]]:
    """Yield this command and all below it with full names, in the order of `--help`."""
    yield name, command
    if isinstance(command, typer.core.TyperGroup):
        for verb in command.list_commands(None):
            yield from walk(command.get_command(None, verb), f"{name} {verb}")


def row(parameter) -> str:
    """Return a row of a command's table: spelling, default, help."""
    if parameter.opts[0].startswith("-"):
        written = ", ".join(
            f"`{spelling}`" for spelling in [*parameter.opts, *parameter.secondary_opts]
        )
    else:
        written = f"`{parameter.name.upper()}{'...' if parameter.nargs == -1 else ''}`"
    text = (parameter.help or "").replace("\\[", "[").replace("|", "\\|")
    text, _, default = text.removesuffix("]").partition(" [default: ")
    if parameter.required:
        default = "required"
    elif (
        parameter.default is not None and parameter.default is not False and parameter.default != ""
    ):
        default = f"`{parameter.default}`"
    return f"| {written} | {default} | {text} |"


def section(name: str, command) -> str:
    """Return heading, help and option table of one command."""
    lines = [f"## {name}", "", " ".join((command.help or "").split())]
    rows = [row(parameter) for parameter in command.params if not parameter.hidden]
    if rows:
        lines += ["", "| | default | |", "|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def reference() -> str:
    """Return the whole page."""
    root = typer.main.get_command(app)
    return "\n".join(
        [OPENING, *(section(name, command) for name, command in walk(root, "skyloom"))]
    )


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
