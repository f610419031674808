"""`skyloom jobs` and `skyloom worker`: the queue, and who does what is in it."""

import json
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skyloom.cli import options

if TYPE_CHECKING:
    from skyloom.serve.queue.jobs import Job, JobStore
    from skyloom.serve.settings import Settings

app = typer.Typer(help="Jobs of the server: what waits, runs and is done.", no_args_is_help=True)

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
            help="Only queued, in_progress, paused, completed, failed, cancelled or expired ones."
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many, the newest first.")] = 20,
    data: _Data = None,
    database: _Database = None,
    as_json: _AsJson = False,
) -> None:
    """What waits, runs and is done, the newest first."""
    from itertools import islice
    from typing import cast, get_args

    from skyloom.core.errors import RequestError
    from skyloom.serve.queue.jobs import Status

    if status is not None and status not in get_args(Status):
        raise RequestError(
            f"{status!r} is no state of a job.", hint=f"Use one of {', '.join(get_args(Status))}."
        )
    found = _store(data, database).walk(status=cast("Status | None", status))
    for job in islice(found, limit):
        _print(job, as_json=as_json)
    if next(found, None) is not None:
        typer.echo("There are more: --limit shows them.", err=True)


@app.command()
def show(id: _Id, data: _Data = None, database: _Database = None) -> None:
    """Everything about a job, as JSON."""
    store = _store(data, database)
    job = store.get(id)
    told = {**_told(job), "tried": [asdict(attempt) for attempt in store.attempts(job)]}
    typer.echo(json.dumps(told, indent=1, ensure_ascii=False))


@app.command()
def cancel(
    id: _Id, data: _Data = None, database: _Database = None, as_json: _AsJson = False
) -> None:
    """Stop a job for good; one that runs stops after its step."""
    _print(_store(data, database).cancel(id), as_json=as_json)


@app.command()
def pause(
    id: _Id, data: _Data = None, database: _Database = None, as_json: _AsJson = False
) -> None:
    """Hold a job; one that runs stops after its step and loses nothing."""
    _print(_store(data, database).pause(id), as_json=as_json)


@app.command()
def resume(
    id: _Id, data: _Data = None, database: _Database = None, as_json: _AsJson = False
) -> None:
    """Let a paused job go on."""
    _print(_store(data, database).resume(id), as_json=as_json)


@app.command()
def retry(
    id: _Id, data: _Data = None, database: _Database = None, as_json: _AsJson = False
) -> None:
    """Put a job that failed or was cancelled back in the queue."""
    _print(_store(data, database).retry(id), as_json=as_json)


@app.command()
def collect(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")
    ] = False,
    data: _Data = None,
    database: _Database = None,
    storage: Annotated[str | None, typer.Option(help="Folder or URL (s3://...) of results")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """Move stored files that nothing names any more to the trash, and delete what was there for long enough.

    The server does this every hour."""
    import contextlib
    from dataclasses import asdict

    from skyloom.serve.storage.garbage import collect as sweep
    from skyloom.serve.storage.garbage import preview
    from skyloom.serve.storage.installation import open_installation

    settings = _settings(data, database, storage)
    queue, store = open_installation(settings, create=False)
    with contextlib.closing(queue):
        told = preview(queue, store, settings) if dry_run else (sweep(queue, store, settings), None)
    done, rest = told
    if done is None:
        typer.echo("Another sweep has just begun.", err=True)
        return
    counts = {
        **asdict(done),
        **({} if rest is None else {"unowned": rest.count, "unowned_bytes": rest.bytes}),
    }
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
        typer.Option(
            help="Folder or URL (s3://...) of results (default: SKYLOOM_STORAGE_URL, or in the data folder)"
        ),
    ] = None,
    device: options.Device = None,
    name: Annotated[
        str | None, typer.Option(help="What to call it (default: host and process)")
    ] = None,
    attached: Annotated[
        bool, typer.Option("--attached", help="End when standard input ends.")
    ] = False,
    log: Annotated[str, typer.Option(help="Lines of the log: human or json.")] = "human",
) -> None:
    """Do the jobs of a queue, here or from another host; SIGTERM gives back what is in hand and ends."""
    from skyloom.core.device import choose_device
    from skyloom.core.log import set_up_logging
    from skyloom.serve.queue.leases import Leases
    from skyloom.serve.storage.installation import open_installation
    from skyloom.serve.workers.render import PipelineRenderer
    from skyloom.serve.workers.worker import Worker

    settings = _settings(data, database, storage)
    set_up_logging(style="json" if log == "json" else "human", details=settings.log_prompts)
    where = str(choose_device(device))
    queue, store = open_installation(settings, create=False)
    leases = Leases(queue, settings)
    settings.runs.mkdir(parents=True, exist_ok=True)
    os.chdir(settings.runs)  # a render names its inputs from here, the same on every host
    hand = Worker(
        leases,
        store,
        PipelineRenderer(store, where),
        settings,
        name=name or f"{os.uname().nodename}-{os.getpid()}",
        device=where,
        end=os._exit,
    )

    def leave(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)  # the second time means now
        hand.drain()

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)
    if attached:
        threading.Thread(target=_until_the_end, args=(hand.drain,), daemon=True).start()
    hand.run()


def _until_the_end(leave: Callable[[], None]) -> None:
    """Wait for the end of standard input, without Python's own buffer: a thread that holds it breaks the exit."""
    while os.read(0, 1024):
        pass
    leave()


def _settings(data: Path | None, database: str | None, storage: str | None = None) -> "Settings":
    from skyloom.serve.settings import load_settings

    return load_settings(data=data, database_url=database, storage_url=storage)


def _store(data: Path | None, database: str | None) -> "JobStore":
    from skyloom.serve.queue.jobs import JobStore
    from skyloom.serve.storage.installation import open_database

    settings = _settings(data, database)
    return JobStore(open_database(settings, create=False), settings)


def _told(job: "Job") -> dict[str, Any]:
    from dataclasses import asdict

    return {key: value for key, value in asdict(job).items() if value is not None}


def _print(job: "Job", *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(_told(job), ensure_ascii=False))
        return
    made = datetime.fromtimestamp(job.created_at, UTC).strftime("%Y-%m-%d %H:%M")
    prompt = str(job.request.get("prompt", "")).replace("\n", " ")
    typer.echo(f"{job.id}  {job.status:11} {job.progress:3}%  {made}  {prompt:.60}")
