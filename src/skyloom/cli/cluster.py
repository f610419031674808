"""`skyloom cluster`: run workers on the nodes of a Ray cluster; jobs stay in the database."""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from skyloom.serve.queue.leases import Leases, WorkerInfo
    from skyloom.serve.settings import Settings
    from skyloom.serve.workers.ray_backend import RayBackend

app = typer.Typer(
    help="Run workers on the nodes of a Ray cluster: docs/cluster.md.", no_args_is_help=True
)

_Data = Annotated[
    Path | None, typer.Option(help="Data folder on every host (default: each host's own)")
]
_Database = Annotated[
    str | None,
    typer.Option(
        help="Database URL (default: SKYLOOM_DATABASE_URL, which hides a password from `ps`)"
    ),
]
_Storage = Annotated[
    str | None,
    typer.Option(help="Storage URL of results, s3://... (default: SKYLOOM_STORAGE_URL)"),
]
_Address = Annotated[
    str,
    typer.Option(help="host:port of Ray's head; auto: RAY_ADDRESS or the cluster of this host"),
]
_AsJson = Annotated[bool, typer.Option("--json", help="Print one line of JSON.")]

_MAX_WORKERS = 10_000
_POLL_SECONDS = 0.5


@app.command()
def up(
    database: _Database = None,
    storage: _Storage = None,
    address: _Address = "auto",
    workers: Annotated[
        str | None,
        typer.Option(
            help="Number of workers, or per-gpu (default: per-gpu with GPUs, else one per node)"
        ),
    ] = None,
    cpus: Annotated[float, typer.Option(min=0, help="CPUs that Ray reserves per worker.")] = 1.0,
    gpus: Annotated[
        float | None,
        typer.Option(
            min=0, help="GPUs per worker, a fraction or a whole number (default: 1 with GPUs)"
        ),
    ] = None,
    wait: Annotated[
        float, typer.Option(min=1, help="Seconds to wait for all workers to start.")
    ] = 120.0,
    data: _Data = None,
    as_json: _AsJson = False,
) -> None:
    """Scale the cluster's workers to this number: start missing ones, stop surplus and old ones."""
    from skyloom.serve.workers.processes import remote_environment
    from skyloom.serve.workers.ray_backend import WorkerSpec, connect, resolve_target, scale

    settings = _settings(data, database, storage)
    requested = _worker_count(workers, gpus)
    environment = remote_environment(settings, with_data=data is not None)
    with _open_leases(settings) as leases, connect(address) as (backend, head):
        count, gpus = resolve_target(backend.nodes(), requested, cpus, gpus)
        names = scale(backend, settings, WorkerSpec(cpus, gpus, environment), count)
        wait_for_workers(backend, leases, names, timeout=wait)
        _print_status(backend, leases, head, as_json=as_json)


@app.command()
def status(
    database: _Database = None,
    address: _Address = "auto",
    data: _Data = None,
    as_json: _AsJson = False,
) -> None:
    """Show nodes, workers and their current jobs."""
    from skyloom.serve.workers.ray_backend import connect

    settings = _settings(data, database, None)
    with _open_leases(settings) as leases, connect(address) as (backend, head):
        _print_status(backend, leases, head, as_json=as_json)


@app.command()
def down(address: _Address = "auto", data: _Data = None, as_json: _AsJson = False) -> None:
    """Stop all workers; they return their jobs to the queue. Ray itself keeps running."""
    from skyloom.serve.workers.ray_backend import connect

    with connect(address) as (backend, _):
        names = list(backend.actors())
        backend.stop(names)
    if as_json:
        typer.echo(json.dumps({"workers": len(names)}))
    else:
        typer.echo(f"{len(names)} workers stopped", err=True)


def _settings(data: Path | None, database: str | None, storage: str | None) -> "Settings":
    from skyloom.serve.settings import load_settings

    return load_settings(data=data, database_url=database, storage_url=storage)


def _worker_count(workers: str | None, gpus: float | None) -> int | Literal["per-gpu"] | None:
    """Parse --workers; check it and --gpus. Raises RequestError."""
    from skyloom.core.errors import RequestError

    if gpus is not None and gpus > 1 and not gpus.is_integer():
        raise RequestError(f"--gpus must be at most 1 or a whole number, got {gpus:g}.")
    if workers == "per-gpu" and gpus == 0:
        raise RequestError("--workers per-gpu needs --gpus > 0.", hint="Give a number of workers.")
    if workers is None or workers == "per-gpu":
        return workers
    if not workers.isdigit() or not 0 < int(workers) <= _MAX_WORKERS:
        raise RequestError(
            f"--workers must be 1 to {_MAX_WORKERS} or per-gpu, got {workers:.20}.",
        )
    return int(workers)


@contextlib.contextmanager
def _open_leases(settings: "Settings") -> "Iterator[Leases]":
    """Open the workers' side of the queue."""
    from skyloom.serve.queue.leases import Leases
    from skyloom.serve.storage.installation import open_database

    with contextlib.closing(open_database(settings)) as database:
        yield Leases(database, settings)


def wait_for_workers(
    backend: "RayBackend", leases: "Leases", names: Sequence[str], *, timeout: float
) -> None:
    """Wait until every worker has registered in the database. Raises CapacityError."""
    from skyloom.core.errors import CapacityError

    deadline = time.monotonic() + timeout
    while True:
        actors = backend.actors()
        registered = leases.list_workers()
        waiting = [
            name
            for name in names
            if (actor := actors.get(name)) is None or actor.worker not in registered
        ]
        if not waiting:
            return
        if time.monotonic() > deadline:
            hosts = sorted({actor.host for name in waiting if (actor := actors.get(name))})
            raise CapacityError(
                f"{len(waiting)} of {len(names)} workers did not start within {timeout:.0f} s"
                f"{' (on ' + ', '.join(hosts) + ')' if hosts else ''}.",
                hint="See the logs in Ray's session folder; `skyloom cluster down` stops all.",
            )
        time.sleep(_POLL_SECONDS)


def worker_rows(
    backend: "RayBackend", registered: "Mapping[str, WorkerInfo]"
) -> list[dict[str, Any]]:
    """Workers as plain values: state, host and process, device, models, job, Unix times.

    `registered` are the workers in the database. States: lost (the actor does not reply),
    starting, idle, working.
    """
    rows: list[dict[str, Any]] = []
    for name, actor in sorted(backend.actors().items(), key=lambda item: (len(item[0]), item[0])):
        worker = None if actor is None else registered.get(actor.worker or "")
        if actor is None:
            state = "lost"
        elif worker is None:
            state = "starting"
        else:
            state = "working" if worker.job else "idle"
        rows.append(
            {
                "name": name,
                "state": state,
                "host": actor and actor.host,
                "pid": actor and actor.pid,
                "device": worker and worker.device,
                "models": worker and worker.capabilities.usable_models,
                "since": worker and worker.started_at,
                "job": worker and worker.job,
                "job_begun": worker and worker.job_started_at,
                "restarts": actor and actor.restarts,
            }
        )
    return rows


def _print_status(backend: "RayBackend", leases: "Leases", head: str, *, as_json: bool) -> None:
    nodes = [node._asdict() for node in backend.nodes()]
    workers = worker_rows(backend, leases.list_workers())
    if as_json:
        typer.echo(json.dumps({"address": head, "nodes": nodes, "workers": workers}))
        return
    typer.echo(f"Ray at {head}")
    for node in nodes:
        typer.echo(f"  {node['host']:24} {node['cpus']:g} CPUs, {node['gpus']:g} GPUs")
    for row in workers:
        place = f"{row['host'] or '-':24} {row['device'] or '-':7}"
        job = f"{row['job']} begun {_time(row['job_begun'])}" if row["job"] else ""
        line = f"{row['name']:18} {row['state']:8} {place}  since {_time(row['since'])}  {job}"
        typer.echo(line.rstrip())


def _time(seconds: float | None) -> str:
    """UTC time in ISO format, or "-"."""
    if seconds is None:
        return "-"
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
