"""`skyloom pull`: fetch a model of the catalogue, after saying what that means."""

import re
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from skyloom.hub.catalog import CatalogModel
    from skyloom.hub.pull import PlannedFile, PullPlan

_RATE = re.compile(r"(\d+(?:\.\d+)?)([kKmMgG]?)")
_GIGABYTES_FROM = 100_000_000
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}


def pull(
    name: Annotated[str, typer.Argument(help="Name in `skyloom models list --available`.")],
    variant: Annotated[
        str | None, typer.Option(help="Precision of the weights: bf16, fp16 or fp8.")
    ] = None,
    from_: Annotated[
        str | None,
        typer.Option("--from", help="hf (default), modelscope, an address, or a folder."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    accept_licence: Annotated[
        str | None, typer.Option(help="Id of the licence that you accept, for example Apache-2.0.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would happen; uses no network.")
    ] = False,
    limit: Annotated[
        str | None, typer.Option(help="Bytes per second at most, for example 20M.")
    ] = None,
) -> None:
    """Fetch a model: files that are here are used in place, unfinished downloads go on."""
    from skyloom.hub.catalog import load_catalog
    from skyloom.hub.download import Transfer
    from skyloom.hub.pull import carry_out, make_plan
    from skyloom.hub.sources import find_source, make_client

    model = load_catalog().find(name)
    source = find_source(from_)
    rate = None if limit is None else parse_rate(limit)
    if dry_run:
        plan = make_plan(model, source, variant=variant, notice=_notice)
        _print_plan(plan)
        typer.echo("Nothing was fetched (--dry-run).")
        return
    with make_client() as client, _progress() as progress:
        transfer = Transfer(client, source, rate, notice=_notice, progress=progress)
        plan = make_plan(
            model,
            source,
            variant=variant,
            transfer=None if source.folder else transfer,
            notice=_notice,
        )
        _print_plan(plan)
        plan.check_disk()
        accepted = _accept_licence(model, accept_licence)
        if plan.missing:
            _confirm(yes=yes)
        try:
            folder = carry_out(plan, transfer, accepted)
        except KeyboardInterrupt:
            _notice(f"Stopped. What was fetched is kept: `skyloom pull {name}` goes on from there.")
            raise
    typer.echo(f"{model.name} is ready in {folder}. Try: skyloom generate PROMPT --model {name}")


def parse_rate(text: str) -> float:
    """Read bytes per second with a unit k, M or G. Raises RequestError."""
    from skyloom.core.errors import RequestError

    match = _RATE.fullmatch(text)
    rate = float(match[1]) * _UNITS[match[2].lower()] if match else 0.0
    if not rate:
        raise RequestError(
            f"limit must be bytes per second such as 20M or 500k, got {text!r}.", field="limit"
        )
    return rate


def size_text(size: int, *, verified: bool = True) -> str:
    """Write a size in bytes, with "about" if it is not verified."""
    value = f"{size / 1e9:.1f} GB" if size >= _GIGABYTES_FROM else f"{size / 1e6:.1f} MB"
    return value if verified else f"about {value}"


def licence_lines(model: "CatalogModel") -> list[str]:
    """Write a model's licence and its conditions."""
    licence = model.licence
    asked = " You have to accept it." if licence.acceptance else ""
    return [
        f"licence: {licence.title} ({licence.id}), {licence.url}.{asked}",
        *(f"  {line}" for line in licence.conditions),
    ]


def memory_text(model: "CatalogModel") -> str:
    """Write the GPU memory that a model needs."""
    least, comfortable = model.gpu_memory_gb
    need = (
        f"{least} GB"
        if least == comfortable
        else f"{least} GB with parts moved to the host's memory, {comfortable} GB without"
    )
    return f"GPU memory: {need} (reported by others, not measured by skyloom)"


def _print_plan(plan: "PullPlan") -> None:
    model = plan.model
    typer.echo(f"{model.name}: {model.description}")
    for line in (*licence_lines(model), memory_text(model), f"model page: {model.source}", ""):
        typer.echo(line)
    for one in plan.files:
        part = ", ".join(name.replace("_", " ") for name in one.parts)
        typer.echo(f"  {part}: {one.file.name}")
        typer.echo(f"    {_where(one, plan)}")
    free = size_text(plan.free_disk)
    verified = all(one.file.bytes is not None for one in plan.files)
    total = size_text(plan.missing, verified=verified) if plan.missing else "Nothing"
    typer.echo(f"\n{total} to fetch into {plan.folder} ({free} free).".replace("\na", "\nA"))


def _where(one: "PlannedFile", plan: "PullPlan") -> str:
    """Say whether a file is here, or where it comes from."""
    size = size_text(one.file.size, verified=one.file.bytes is not None)
    if one.local is not None:
        return f"{size}, already at {one.local} (SHA-256 equal); used in place"
    revision = f" @{one.file.revision[:12]}" if one.file.revision else ""
    origin = plan.source.address if plan.source.flat else plan.source.host
    path = origin if plan.source.flat else f"{origin}/{one.file.repository}{revision}"
    started = f", {size_text(one.started)} of it here" if one.started else ""
    known = "" if one.file.sha256 else "; SHA-256 unknown until the server names it"
    return f"{size} from {path}{started}{known}"


def _accept_licence(model: "CatalogModel", accepted: str | None) -> str | None:
    """Return how the licence was accepted; None if that is not needed. Raises RequestError."""
    from skyloom.core.errors import RequestError

    licence = model.licence
    if accepted is not None and accepted != licence.id:
        raise RequestError(
            f"accept-licence must be {licence.id} for {model.name}, got {accepted!r}.",
            field="accept_licence",
        )
    if accepted is not None:
        return "--accept-licence"
    if not licence.acceptance:
        return None
    if not sys.stdin.isatty():
        raise RequestError(
            f"accept-licence must be {licence.id} for {model.name}, got nothing.",
            hint=f"Read {licence.url}, then add: --accept-licence {licence.id}.",
            field="accept_licence",
        )
    typed = typer.prompt(f"Type {licence.id} to accept this licence")
    if typed.strip() != licence.id:
        raise RequestError("The licence was not accepted; nothing was fetched.")
    return "typed"


def _confirm(*, yes: bool) -> None:
    from skyloom.core.errors import RequestError

    if yes:
        return
    if not sys.stdin.isatty():
        raise RequestError(
            "yes must be given where nobody can answer, got nothing.",
            hint="Add --yes to fetch, or --dry-run to see the plan only.",
            field="yes",
        )
    if not typer.confirm("Go on?", default=True):
        raise RequestError("Stopped; nothing was fetched.")


def _notice(text: str) -> None:
    typer.echo(text, err=True)


@contextmanager
def _progress() -> "Generator[Callable[[str, int, int], None]]":
    """Show the progress of each file: a bar on a terminal, else a line per tenth."""
    if not sys.stderr.isatty():
        yield _TenthsPrinter()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    bar = Progress(*columns, console=Console(stderr=True))

    def show(name: str, done: int, size: int) -> None:
        if not tasks:
            bar.start()
        if name not in tasks:
            tasks[name] = bar.add_task(name, total=size)
        bar.update(tasks[name], completed=done, total=size)

    try:
        yield show
    finally:
        bar.stop()


class _TenthsPrinter:
    """Prints a line when another tenth of a file is here."""

    def __init__(self) -> None:
        self._tenths: dict[str, int] = {}

    def __call__(self, name: str, done: int, size: int) -> None:
        """Print progress of a file: bytes done and size."""
        tenth = 10 * done // max(size, 1)
        if tenth != self._tenths.get(name, -1):
            self._tenths[name] = tenth
            _notice(f"{name}: {10 * tenth} % of {size_text(size)}")
