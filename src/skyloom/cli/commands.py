"""The verbs of the command line; the module of a verb is imported when the verb is used."""

import inspect
from importlib import import_module
from typing import Annotated, Any

import typer
import typer.core
import typer.main

VERBS = {
    "generate": "generate:generate",
    "storyboard": "storyboard:storyboard",
    "plan": "plan:plan",
    "styles": "edit:styles",
    "show": "receipt:show",
    "replay": "receipt:replay",
    "verify": "verify:verify",
    "moderate": "moderate:moderate",
    "train": "train:app",
    "serve": "serve:serve",
    "worker": "jobs:worker",
    "backup": "backup:backup",
    "restore": "backup:restore",
    "doctor": "doctor:doctor",
    "jobs": "jobs:app",
    "keys": "serve:app",
    "cluster": "cluster:app",
    "pull": "pull:pull",
    "edit": "edit:app",
    "models": "models:app",
    "world": "moved:world",
    "data": "data:app",
    "evaluate": "moved:evaluate",
}
"""Module and function, or group, of every verb, in the order of --help."""

_ANY_ARGUMENTS = {"allow_extra_args": True, "ignore_unknown_options": True}


class LazyGroup(typer.core.TyperGroup):
    """A command group that builds a verb when it is looked up."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the verbs."""
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Build the command of a verb; None for an unknown name."""
        if cmd_name not in VERBS:
            return None
        if cmd_name not in self.commands:
            self.commands[cmd_name] = _build(cmd_name)
        return self.commands[cmd_name]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of verbs, without building their options."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, _summary(name)) for name in VERBS])


app = typer.Typer(
    name="skyloom",
    cls=LazyGroup,
    help="Generate and edit videos from text, on your own machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,  # importing rich takes longer than all of --help
)


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version. Must be the first word.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks. Accepted at any position.")
    ] = False,
) -> None:
    """Options before the verb; both are handled by `skyloom.cli.app.main`."""


def _load(name: str) -> Any:
    """Import the function, or typer.Typer group, of a verb."""
    module, attribute = VERBS[name].split(":")
    return getattr(import_module(f"skyloom.cli.{module}"), attribute)


def _build(name: str) -> Any:
    target = _load(name)
    if isinstance(target, typer.Typer):
        target.rich_markup_mode = None
        command = typer.main.get_group(target)
    else:
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        moved = VERBS[name].startswith("moved:")
        single.command(name, context_settings=_ANY_ARGUMENTS if moved else None)(target)
        command = typer.main.get_command(single)
    command.name = name
    return command


def _summary(name: str) -> str:
    """Return the first paragraph of a verb's help."""
    target = _load(name)
    text = target.info.help if isinstance(target, typer.Typer) else inspect.getdoc(target)
    return " ".join(str(text).split("\n\n")[0].split())
