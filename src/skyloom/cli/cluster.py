"""`skyloom cluster`: workers on the hosts of a Ray cluster; the jobs stay in the database."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from skyloom.serve.queue.leases import Leases, WorkerInfo
    from skyloom.serve.settings import Settings
    from skyloom.serve.workers.cluster import Plane, Wish
    from skyloom.serve.workers.local_ray import Head

app = typer.Typer(
    help="Workers on many hosts, placed by Ray: docs/cluster.md.", no_args_is_help=True
)

_Data = Annotated[
    Path | None, typer.Option(help="The data folder, on every host (default: each host's own)")
]
_Database = Annotated[
    str | None,
    typer.Option(
        help="URL of the database (default: SKYLOOM_DATABASE_URL, where a password is safer)"
    ),
]
_Storage = Annotated[
    str | None, typer.Option(help="URL (s3://...) of results (default: SKYLOOM_STORAGE_URL)")
]
_Address = Annotated[
    str,
    typer.Option(
        help="host:port of Ray's head; local: our own on this machine; auto: the one that is there"
    ),
]
_AsJson = Annotated[bool, typer.Option("--json", help="Print one line of JSON.")]

_MOST = 10_000


@app.command()
def up(
    database: _Database = None,
    storage: _Storage = None,
    address: _Address = "auto",
    workers: Annotated[
        str | None,
        typer.Option(
            help="How many, or per-gpu (default: that where there are GPUs, else one a node)"
        ),
    ] = None,
    cpus: Annotated[float, typer.Option(min=0, help="CPUs that Ray counts for a worker.")] = 1.0,
    gpus: Annotated[
        float | None,
        typer.Option(
            min=0, help="GPUs of a worker, a part or several (default: 1 where there are any)"
        ),
    ] = None,
    wait: Annotated[
        float, typer.Option(min=1, help="Seconds in which all must have come up.")
    ] = 120.0,
    data: _Data = None,
    as_json: _AsJson = False,
) -> None:
    """Keep so many workers on the cluster, and start a Ray on this machine where there is none. Again changes it."""
    from skyloom.serve.workers.cluster import bring_up
    from skyloom.serve.workers.local_ray import Head
    from skyloom.serve.workers.ray_backend import connected

    settings, wish = _settings(data, database, storage), _wish(workers, cpus, gpus)
    head = Head(settings.data)
    with _leases(settings) as leases, connected(head, address, start=True) as (plane, where):
        bring_up(plane, settings, wish, leases.list_workers, data=data is not None, wait=wait)
        _print(plane, leases.list_workers(), where, head, as_json=as_json)


@app.command()
def status(
    database: _Database = None,
    address: _Address = "auto",
    data: _Data = None,
    as_json: _AsJson = False,
) -> None:
    """Nodes, and workers with what each has in hand."""
    from skyloom.serve.workers.local_ray import Head
    from skyloom.serve.workers.ray_backend import connected

    settings = _settings(data, database, None)
    head = Head(settings.data)
    with _leases(settings) as leases, connected(head, address, start=False) as (plane, where):
        _print(plane, leases.list_workers(), where, head, as_json=as_json)


@app.command()
def down(address: _Address = "auto", data: _Data = None, as_json: _AsJson = False) -> None:
    """Let the workers give back their jobs and end; Ray too, if `up` has started it. What waits goes on later."""
    from skyloom.serve.workers.cluster import take_down
    from skyloom.serve.workers.local_ray import Head
    from skyloom.serve.workers.ray_backend import connected

    head = Head(_settings(data, None, None).data)
    with connected(head, address, start=False) as (plane, where):
        count = take_down(plane)
    stopped = where == head.address() and head.stop()
    if as_json:
        typer.echo(json.dumps({"workers": count, "ray_stopped": stopped}))
    else:
        typer.echo(
            f"{count} workers have gone{', and the Ray that was started for them' if stopped else ''}",
            err=True,
        )


def _settings(data: Path | None, database: str | None, storage: str | None) -> "Settings":
    from skyloom.serve.settings import load_settings

    return load_settings(data=data, database_url=database, storage_url=storage)


def _wish(workers: str | None, cpus: float, gpus: float | None) -> "Wish":
    from skyloom.core.errors import RequestError
    from skyloom.serve.workers.cluster import Wish

    if workers is None or workers == "per-gpu":
        return Wish(workers, cpus, gpus)
    if not workers.isdigit() or not 0 < int(workers) <= _MOST:
        raise RequestError(
            f"--workers {workers:.20} is no number of workers.",
            hint=f"Use 1 to {_MOST}, or per-gpu.",
        )
    return Wish(int(workers), cpus, gpus)


@contextlib.contextmanager
def _leases(settings: "Settings") -> "Iterator[Leases]":
    """The workers' side of the queue, while the block runs."""
    from skyloom.serve.queue.leases import Leases
    from skyloom.serve.storage.installation import open_database

    with contextlib.closing(open_database(settings)) as database:
        yield Leases(database, settings)


def _print(
    plane: "Plane", hands: "Mapping[str, WorkerInfo]", where: str, head: "Head", *, as_json: bool
) -> None:
    from skyloom.serve.workers.cluster import report

    told = report(plane, hands)
    if as_json:
        typer.echo(json.dumps({"address": where, "ours": where == head.address(), **told}))
        return
    typer.echo(f"Ray at {where}{', started by skyloom' if where == head.address() else ''}")
    for node in told["nodes"]:
        typer.echo(f"  {node['host']:24} {node['cpus']:g} CPUs, {node['gpus']:g} GPUs")
    for worker in told["workers"]:
        job = f"{worker['job']} begun {_time(worker['job_begun'])}" if worker["job"] else ""
        line = f"{worker['name']:18} {worker['state']:8} {worker['host'] or '-':24} {worker['device'] or '-':7} "
        typer.echo(f"{line} since {_time(worker['since'])}  {job}".rstrip())


def _time(seconds: float | None) -> str:
    return (
        "-"
        if seconds is None
        else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
    )
