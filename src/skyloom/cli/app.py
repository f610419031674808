"""The command line's entry: it gathers the verbs and turns errors into one sentence and an exit code.

Exit code 2 means that the request or a setting is wrong, 1 that something failed; a traceback needs --debug.
"""

import sys
from typing import Annotated

import typer

from skyloom import __version__
from skyloom.cli import data, doctor, evaluate, generate, models, train, world
from skyloom.core.errors import ConfigError, RequestError, SkyloomError

app = typer.Typer(
    name="skyloom",
    help="An open Sora: a sentence in, a video out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("generate")(generate.generate)
app.command("train")(train.train)
app.command("doctor")(doctor.doctor)
app.add_typer(models.app, name="models")
app.add_typer(world.app, name="world")
app.add_typer(data.app, name="data")
app.add_typer(evaluate.app, name="evaluate")

_INTERRUPTED = 130


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"skyloom {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Options that come before the verb."""


def main() -> None:
    """Run the command line."""
    try:
        app()
    except SkyloomError as error:
        if "--debug" in sys.argv:
            raise
        typer.echo(f"skyloom: {error}", err=True)
        sys.exit(2 if isinstance(error, (RequestError, ConfigError)) else 1)
    except KeyboardInterrupt:
        typer.echo("skyloom: stopped.", err=True)
        sys.exit(_INTERRUPTED)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        typer.echo(f"skyloom: {type(error).__name__}: {error} (this is a bug; --debug shows where)", err=True)
        sys.exit(1)
