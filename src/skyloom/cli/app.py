"""The command line's entry: it gathers the verbs and turns errors into one sentence and an exit code.

Exit code 2 means that the request or a setting is wrong or refused, 1 that something failed; a traceback needs --debug.
"""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from skyloom import __version__
from skyloom.cli import (
    backup,
    cluster,
    data,
    doctor,
    edit,
    evaluate,
    generate,
    jobs,
    models,
    moderate,
    plan,
    receipt,
    serve,
    storyboard,
    train,
    verify,
    world,
)
from skyloom.core.errors import ConfigError, RequestError, SafetyError, SkyloomError

app = typer.Typer(
    name="skyloom",
    help="An open Sora: a sentence in, a video out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("generate")(generate.generate)
app.command("storyboard")(storyboard.storyboard)
app.command("plan")(plan.plan)
app.command("styles")(edit.styles)
app.command("show")(receipt.show)
app.command("replay")(receipt.replay)
app.command("verify")(verify.verify)
app.command("moderate")(moderate.moderate)
app.command("train")(train.train)
app.command("serve")(serve.serve)
app.command("worker")(jobs.worker)
app.command("backup")(backup.backup)
app.command("restore")(backup.restore)
app.command("doctor")(doctor.doctor)
app.add_typer(jobs.app, name="jobs")
app.add_typer(serve.app, name="keys")
app.add_typer(cluster.app, name="cluster")
app.add_typer(edit.app, name="edit")
app.add_typer(models.app, name="models")
app.add_typer(world.app, name="world")
app.add_typer(data.app, name="data")
app.add_typer(evaluate.app, name="evaluate")

_FAILED, _MISUSED = 1, 2
_MEMORY_SIGNS = ("out of memory", "can't allocate memory")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"skyloom {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere.")
    ] = False,
) -> None:
    """Options that come before the verb."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; --debug may stand anywhere."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    try:
        app([word for word in words if word != "--debug"], prog_name="skyloom")
    except Exception as error:
        if debug:
            raise
        sentence, code = explain(error)
        typer.echo(f"skyloom: {sentence}", err=True)
        sys.exit(code)


def explain(error: Exception) -> tuple[str, int]:
    """One sentence about what went wrong and what to do, and the exit code."""
    if isinstance(error, SkyloomError):
        return str(error), _MISUSED if isinstance(
            error, (RequestError, ConfigError, SafetyError)
        ) else _FAILED
    lines = str(error).splitlines() or [""]
    if isinstance(error, MemoryError) or any(sign in lines[0] for sign in _MEMORY_SIGNS):
        return (
            "The memory is full. Ask for a smaller size or fewer seconds, or close other programs.",
            _FAILED,
        )
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return (
            f"{where}{error.strerror}. Check the path, its permissions and the free space.",
            _FAILED,
        )
    return f"{type(error).__name__}: {lines[0]} (this is a bug; --debug shows where)", _FAILED
