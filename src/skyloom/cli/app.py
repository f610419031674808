"""Entry point of the command line: handles --version and --debug, reports errors.

Exit codes: 2 for an invalid or blocked request or setting, 3 for a model whose conditions must be
accepted on its page first, 1 for another failure. --debug shows tracebacks. `typer` is imported
after --version is handled, so that it answers at once.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from skyloom.core.version import __version__

_FAILURE = 1
_USAGE_ERROR = 2
_GATED = 3
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; --debug may be anywhere in `arguments`."""
    run_program("skyloom", _load_app, arguments)


def run_program(
    name: str, load_app: Callable[[], Any], arguments: Sequence[str] | None = None
) -> None:
    """Run the commands of a program; `load_app` imports them after --version is handled."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    words = [word for word in given if word != "--debug"]
    debug = words != given
    if words[:1] == ["--version"]:
        sys.stdout.write(f"{name} {__version__}\n")
        sys.exit(0)
    if sys.platform == "win32":  # the sandbox of media files needs POSIX resource limits
        sys.stderr.write(f"{name}: Windows is not supported. Use WSL 2.\n")
        sys.exit(_FAILURE)
    try:
        load_app()(words, prog_name=name)
    except Exception as error:
        if debug:
            raise
        message, code = explain(error)
        sys.stderr.write(f"{name}: {message}\n")
        sys.exit(code)


def _load_app() -> Any:
    from skyloom.cli.commands import app

    return app


def explain(error: Exception) -> tuple[str, int]:
    """Return a one-sentence message with a hint, and the exit code."""
    from skyloom.core.errors import (
        ConfigError,
        GatedError,
        RequestError,
        SafetyError,
        SkyloomError,
    )

    if isinstance(error, GatedError):
        return str(error), _GATED
    if isinstance(error, SkyloomError):
        usage = isinstance(error, RequestError | ConfigError | SafetyError)
        return str(error), _USAGE_ERROR if usage else _FAILURE
    first_line = (str(error).splitlines() or [""])[0]
    if isinstance(error, MemoryError) or any(sign in first_line for sign in _OUT_OF_MEMORY):
        hint = "Use a smaller size or fewer seconds, or close other programs."
        return f"Out of memory. {hint}", _FAILURE
    if isinstance(error, OSError) and error.strerror:
        path = f"{error.filename}: " if error.filename else ""
        hint = "Check the path, its permissions and the free space."
        return f"{path}{error.strerror}. {hint}", _FAILURE
    return f"{type(error).__name__}: {first_line} (this is a bug; see --debug)", _FAILURE
