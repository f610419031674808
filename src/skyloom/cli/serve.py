"""`skyloom serve` and `skyloom keys`: the server, and who may use it."""

import json
import logging
import os
import re
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from skyloom.serve.queue.api_keys import KeyInfo, KeyStore

app = typer.Typer(help="API keys: who may use the server from where.", no_args_is_help=True)

_Data = Annotated[
    Path | None, typer.Option(help="The server's data folder (default: ~/.local/share/skyloom)")
]
_Database = Annotated[
    str | None,
    typer.Option(
        help="URL of the database (default: SKYLOOM_DATABASE_URL, or a file in the data folder)"
    ),
]
_AsJson = Annotated[bool, typer.Option("--json", help="Print one line of JSON.")]
_STRAGGLER_SECONDS = 0.5
_UNITS = {"m": 60, "h": 3_600, "d": 86_400}


def serve(
    host: Annotated[
        str | None,
        typer.Option(help="Address to listen at (default: 127.0.0.1, this machine only)"),
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65_535, help="Port; 0 takes a free one (default: 8765)")
    ] = None,
    data: _Data = None,
    database: _Database = None,
    storage: Annotated[str | None, typer.Option(help="Folder or URL (s3://...) of results")] = None,
    settings: Annotated[
        Path | None, typer.Option(help="Settings (default: settings.toml in the data folder)")
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(help="A worker's device; may stand several times (default: all there are)"),
    ] = None,
    workers: Annotated[
        bool, typer.Option("--worker/--no-worker", help="Start workers of its own.")
    ] = True,
    adopt_storage: Annotated[
        bool,
        typer.Option(
            "--adopt-storage",
            help="Give database and storage a new installation id that binds them: docs/server.md.",
        ),
    ] = False,
    log: Annotated[str, typer.Option(help="Lines of the log: human or json.")] = "human",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line, {url, token}, when ready.")
    ] = False,
) -> None:
    """The Videos API on this machine; clients of OpenAI's use it unchanged. SIGTERM drains and ends."""
    from skyloom.core.log import set_up_logging
    from skyloom.serve.main import find_devices, listen
    from skyloom.serve.settings import load_settings

    given = {
        "host": host,
        "port": port,
        "data": data,
        "database_url": database,
        "storage_url": storage,
    }
    chosen = load_settings(settings, **given)
    set_up_logging(style="json" if log == "json" else "human", details=chosen.log_prompts)
    wanted = (device or find_devices()) if workers else []

    def announce(url: str, token: str) -> None:
        if as_json:
            typer.echo(json.dumps({"url": url, "token": token}))
            return
        typer.echo(f"skyloom serves at {url}/v1 with the token {token}")
        typer.echo(f"  export OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY={token}", err=True)

    listen(chosen, wanted, announce, adopt=adopt_storage)
    _end_without_stragglers()


@app.command()
def create(
    owner: Annotated[str, typer.Argument(help="Whose jobs and files it sees, like alice.")],
    name: Annotated[str, typer.Option(help="What it is for.")] = "",
    scope: Annotated[
        list[str] | None,
        typer.Option(help="read, write or admin; may stand several times (default: read, write)"),
    ] = None,
    expires: Annotated[
        str | None, typer.Option(help="How long it is good for, like 12h or 90d (default: no end)")
    ] = None,
    data: _Data = None,
    database: _Database = None,
    as_json: _AsJson = False,
) -> None:
    """Make a key and print it. It is not kept: this is the only time that it is shown."""
    info, text = _keys(data, database).create(
        owner,
        name=name,
        scopes=scope or ("read", "write"),
        seconds=None if expires is None else _seconds(expires),
    )
    typer.echo(json.dumps({**_told(info), "key": text}) if as_json else text)


@app.command("list")
def list_(data: _Data = None, database: _Database = None, as_json: _AsJson = False) -> None:
    """Every key: its id, owner, scopes and times."""
    for info in _keys(data, database).list():
        told = _told(info)
        state = (
            "revoked"
            if told["revoked_at"]
            else f"expires {told['expires_at']}"
            if told["expires_at"]
            else "good"
        )
        line = f"{info.id}  {info.owner:16} {','.join(info.scopes):12} {state:28} {info.name}"
        typer.echo(json.dumps(told) if as_json else line.rstrip())


@app.command()
def revoke(
    id: Annotated[str, typer.Argument(help="The key's id, as `skyloom keys list` shows it.")],
    data: _Data = None,
    database: _Database = None,
) -> None:
    """Make a key useless from now on."""
    info = _keys(data, database).revoke(id)
    typer.echo(f"{info.id} of {info.owner} is revoked", err=True)


def _end_without_stragglers() -> None:
    """End now if a thread is left that would keep the process alive: one that still answers a request, and asks
    something that does not answer. Its client is gone by now."""
    own = threading.current_thread()
    for thread in threading.enumerate():
        if thread is not own and not thread.daemon:
            thread.join(_STRAGGLER_SECONDS)
            if thread.is_alive():
                logging.shutdown()
                sys.stdout.flush()
                os._exit(0)


def _keys(data: Path | None, database: str | None) -> "KeyStore":
    from skyloom.serve.queue.api_keys import KeyStore
    from skyloom.serve.settings import load_settings
    from skyloom.serve.storage.installation import open_database

    return KeyStore(open_database(load_settings(data=data, database_url=database)))


def _seconds(text: str) -> float:
    from skyloom.core.errors import RequestError

    found = re.fullmatch(r"(\d{1,5})([mhd])", text)
    if found is None:
        raise RequestError(f"{text!r:.40} is no time.", hint="Write 30m, 12h or 90d.")
    return int(found[1]) * _UNITS[found[2]]


def _told(info: "KeyInfo") -> dict[str, object]:
    """A key as plain values, its times as people read them."""
    times = ("created_at", "expires_at", "last_used_at", "revoked_at")
    told = {name: getattr(info, name) for name in times}
    shown = {
        name: None
        if value is None
        else datetime.fromtimestamp(value, UTC).isoformat(timespec="seconds")
        for name, value in told.items()
    }
    return {
        "id": info.id,
        "owner": info.owner,
        "name": info.name,
        "scopes": list(info.scopes),
        **shown,
    }
