"""Entry point of `diorama`; skyloom's command line handles --version, --debug and errors."""

from collections.abc import Sequence

import typer

from skyloom.cli.app import run_program


def load_app() -> typer.Typer:
    """Return the command groups."""
    from diorama.cli import data, evaluate, train, world

    app = typer.Typer(
        help="Render, train and evaluate the world of skyloom's bundled model.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
        rich_markup_mode=None,
    )
    for name, module in (("world", world), ("data", data), ("train", train)):
        app.add_typer(module.app, name=name)
    app.add_typer(evaluate.app, name="evaluate")
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run_program("diorama", load_app, arguments)
