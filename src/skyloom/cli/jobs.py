"""`skyloom jobs` and `skyloom worker`: manage the job queue and run a worker."""

import json
import os
import signal
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skyloom.cli import options

if TYPE_CHECKING:
    from skyloom.serve.queue.jobs import Job, JobStore
    from skyloom.serve.settings import Settings

app = typer.Typer(help="List, inspect and control jobs of the server.", no_args_is_help=True)

_Data = Annotated[
    Path | None, typer.Option(help="The server's data folder (default: ~/.local/share/skyloom)")
]
_Database = Annotated[
    str | None,
    typer.Option(
        help="URL of the database (default: SKYLOOM_DATABASE_URL, or a file in the data folder)"
    ),
]
_Id = Annotated[str, typer.Argument(help="The job's id.")]
_AsJson = Annotated[bool, typer.Option("--json", help="Print one line of JSON for each job.")]


@app.command("list")
def list_(
    status: Annotated[
        str | None,
        typer.Option(
            help="Filter: queued, in_progress, paused, completed, failed, cancelled or expired."
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of jobs.")] = 20,
    data: _Data = None,
    database: _Database = None,
    as_json: _AsJson = False,
) -> None:
    """List jobs, newest first."""
    from itertools import islice
    from typing import cast, get_args

    from skyloom.core.errors import RequestError
    from skyloom.serve.queue.jobs import Status

    if status is not None and status not in get_args(Status):
        raise RequestError(
            f"--status must be one of {', '.join(get_args(Status))}, got {status!r:.40}."
        )
    found = _store(data, database).walk(status=cast("Status | None", status))
    for job in islice(found, limit):
        _print(job, as_json=as_json)
    if next(found, None) is not None:
        typer.echo("More jobs exist; raise --limit to see them.", err=True)


@app.command()
def show(id: _Id, data: _Data = None, database: _Database = None) -> None:
    """Print a job with its attempts as JSON."""
    store = _store(data, database)
    job = store.get(id)
    values = {**_job_values(job), "tried": [vars(attempt) for attempt in store.attempts(job)]}
    typer.echo(json.dumps(values, indent=1, ensure_ascii=False))


@app.command()
def cancel(
    id: _Id, data: _Data = None, database: _Database = None, as_json: _AsJson = False
) -> None:
    """Cancel a job; a running one stops after its current step."""
    _print(_store(data, database).cancel(id), as_json=as_json)


@app.command()
def pause(
    id: _Id, data: _Data = None, database: _Database = None, as_json: _AsJson = False
) -> None:
    """Pause a job; a running one saves a checkpoint after its current step."""
    _print(_store(data, database).pause(id), as_json=as_json)


@app.command()
def resume(
    id: _Id, data: _Data = None, database: _Database = None, as_json: _AsJson = False
) -> None:
    """Resume a paused job."""
    _print(_store(data, database).resume(id), as_json=as_json)


@app.command()
def retry(
    id: _Id, data: _Data = None, database: _Database = None, as_json: _AsJson = False
) -> None:
    """Queue a failed or cancelled job again."""
    _print(_store(data, database).retry(id), as_json=as_json)


@app.command()
def workers(
    data: _Data = None,
    database: _Database = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON for each worker.")
    ] = False,
) -> None:
    """List workers with device, models, memory for models and current job."""
    from dataclasses import asdict

    from skyloom.serve.queue.leases import Leases
    from skyloom.serve.storage.installation import open_database

    settings = _settings(data, database)
    leases = Leases(open_database(settings, create=False), settings)
    for name, info in sorted(leases.list_workers().items()):
        if as_json:
            typer.echo(json.dumps({"name": name, **asdict(info)}))
            continue
        memory = info.capabilities.memory_bytes
        size = "-" if memory is None else f"{memory / 2**30:.1f} GiB"
        models = ", ".join(info.capabilities.usable_models) or "no models"
        typer.echo(f"{name}  {info.device}  {models}  {size}  {info.job or 'idle'}")


@app.command()
def collect(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be done without doing it.")
    ] = False,
    data: _Data = None,
    database: _Database = None,
    storage: Annotated[str | None, typer.Option(help="Folder or URL (s3://...) of results")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """Move unreferenced stored files to the trash and delete old trash; the server does so hourly.

    Ages are set by collect_after_days and trash_days.
    """
    import contextlib
    from dataclasses import asdict

    from skyloom.serve.storage.garbage import collect as sweep
    from skyloom.serve.storage.garbage import preview
    from skyloom.serve.storage.installation import open_installation

    settings = _settings(data, database, storage)
    queue, store = open_installation(settings, create=False)
    with contextlib.closing(queue):
        if dry_run:
            done, unowned = preview(queue, store, settings)
        else:
            done, unowned = sweep(queue, store, settings), None
    if done is None:
        typer.echo("Another collection is running.", err=True)
        return
    counts = asdict(done)
    if unowned is not None:
        counts["unowned"] = unowned.count
        counts["unowned_bytes"] = unowned.bytes
    if as_json:
        typer.echo(json.dumps({"dry_run": dry_run, **counts}))
        return
    for name, value in counts.items():
        typer.echo(f"{name.replace('_', ' '):14} {value}")


def worker(
    data: _Data = None,
    database: _Database = None,
    storage: Annotated[
        str | None,
        typer.Option(help="Folder or URL (s3://...) of results (default: inside the data folder)"),
    ] = None,
    device: options.Device = None,
    name: Annotated[
        str | None, typer.Option(help="Unique worker name (default: host and process id)")
    ] = None,
    attached: Annotated[
        bool, typer.Option("--attached", help="Drain and exit when standard input closes.")
    ] = False,
    log: Annotated[str, typer.Option(help="Log format: human or json.")] = "human",
) -> None:
    """Run a worker on this host; SIGTERM returns its job to the queue and exits."""
    from skyloom.core.device import choose_device
    from skyloom.core.log import set_up_logging
    from skyloom.serve.queue.leases import Leases
    from skyloom.serve.storage.installation import open_installation
    from skyloom.serve.workers.pipelines import (
        PipelineCache,
        find_capabilities,
        worker_models,
    )
    from skyloom.serve.workers.render import PipelineRenderer
    from skyloom.serve.workers.worker import Worker

    settings = _settings(data, database, storage)
    set_up_logging(style="json" if log == "json" else "human", details=settings.log_prompts)
    device_name = str(choose_device(device))
    queue, store = open_installation(settings, create=False)
    settings.runs.mkdir(parents=True, exist_ok=True)
    os.chdir(settings.runs)  # renders name their inputs relative to it, equally on every host
    capabilities = find_capabilities(settings, device_name)
    pipelines = PipelineCache(
        device_name,
        worker_models(settings),
        capabilities.memory_bytes,
        loras=settings.loras,
    )
    runner = Worker(
        Leases(queue, settings),
        store,
        PipelineRenderer(store, device_name, pipelines),
        settings,
        name=name or f"{os.uname().nodename}-{os.getpid()}",
        device=device_name,
        capabilities=capabilities,
        warm_models=lambda: pipelines.names,
        exit_process=os._exit,
    )

    def handle_signal(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once
        runner.drain()

    signal.signal(signal.SIGTERM, handle_signal)
    signal.signal(signal.SIGINT, handle_signal)
    if attached:
        threading.Thread(target=_wait_for_eof, args=(runner.drain,), daemon=True).start()
    runner.run()


def _wait_for_eof(on_eof: Callable[[], None]) -> None:
    """Call `on_eof` when standard input closes.

    Reads without Python's buffer: a thread that holds its lock would break the exit.
    """
    while os.read(0, 1024):
        pass
    on_eof()


def _settings(data: Path | None, database: str | None, storage: str | None = None) -> "Settings":
    from skyloom.serve.settings import load_settings

    return load_settings(data=data, database_url=database, storage_url=storage)


def _store(data: Path | None, database: str | None) -> "JobStore":
    from skyloom.serve.queue.jobs import JobStore
    from skyloom.serve.storage.installation import open_database

    settings = _settings(data, database)
    return JobStore(open_database(settings, create=False), settings)


def _job_values(job: "Job") -> dict[str, Any]:
    """The job's fields that are set, as plain values."""
    from dataclasses import asdict

    return {key: value for key, value in asdict(job).items() if value is not None}


def _print(job: "Job", *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(_job_values(job), ensure_ascii=False))
        return
    created = datetime.fromtimestamp(job.created_at, UTC).strftime("%Y-%m-%d %H:%M")
    prompt = str(job.request.get("prompt", "")).replace("\n", " ")
    typer.echo(f"{job.id}  {job.status:11} {job.progress:3}%  {created}  {prompt:.60}")
