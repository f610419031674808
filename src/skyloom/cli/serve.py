"""`skyloom serve` and `skyloom keys`: run the API server and manage its API keys."""

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

app = typer.Typer(help="Create, list and revoke API keys.", no_args_is_help=True)

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
_THREAD_EXIT_SECONDS = 0.5
_UNITS = {"m": 60, "h": 3_600, "d": 86_400}


def serve(
    host: Annotated[
        str | None,
        typer.Option(help="Address to listen on (default: 127.0.0.1, this host only)"),
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65_535, help="Port; 0 for a free one (default: 8765)")
    ] = None,
    data: _Data = None,
    database: _Database = None,
    storage: Annotated[str | None, typer.Option(help="Folder or URL (s3://...) of results")] = None,
    settings: Annotated[
        Path | None, typer.Option(help="Settings file (default: settings.toml in the data folder)")
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(help="Device of a worker; repeatable (default: every GPU, else cpu)"),
    ] = None,
    workers: Annotated[
        bool, typer.Option("--worker/--no-worker", help="Start one worker process per device.")
    ] = True,
    adopt_storage: Annotated[
        bool,
        typer.Option(
            "--adopt-storage",
            help="Bind database and storage by a new installation id: docs/server.md.",
        ),
    ] = False,
    log: Annotated[str, typer.Option(help="Log format: human or json.")] = "human",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON line with url and token when ready.")
    ] = False,
) -> None:
    """Serve the Videos API, compatible with OpenAI's clients; SIGTERM drains and exits."""
    from skyloom.core.log import set_up_logging
    from skyloom.serve.main import find_devices, listen
    from skyloom.serve.settings import load_settings

    loaded = load_settings(
        settings, host=host, port=port, data=data, database_url=database, storage_url=storage
    )
    set_up_logging(style="json" if log == "json" else "human", details=loaded.log_prompts)
    devices = (device or find_devices()) if workers else []

    def announce(url: str, token: str) -> None:
        if as_json:
            typer.echo(json.dumps({"url": url, "token": token}))
            return
        typer.echo(f"skyloom serves at {url}/v1 with the token {token}")
        typer.echo(f"  export OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY={token}", err=True)

    listen(loaded, devices, announce, adopt=adopt_storage)
    _exit_despite_threads()


@app.command()
def create(
    owner: Annotated[str, typer.Argument(help="Owner whose jobs and files the key can access.")],
    name: Annotated[str, typer.Option(help="Label of the key.")] = "",
    scope: Annotated[
        list[str] | None,
        typer.Option(help="read, write or admin; repeatable (default: read, write)"),
    ] = None,
    expires: Annotated[
        str | None, typer.Option(help="Lifetime like 30m, 12h or 90d (default: unlimited)")
    ] = None,
    data: _Data = None,
    database: _Database = None,
    as_json: _AsJson = False,
) -> None:
    """Create a key and print it. Only its hash is stored; it cannot be shown again."""
    info, text = _keys(data, database).create(
        owner,
        name=name,
        scopes=scope or ("read", "write"),
        seconds=None if expires is None else _seconds(expires),
    )
    typer.echo(json.dumps({**_key_values(info), "key": text}) if as_json else text)


@app.command("list")
def list_(data: _Data = None, database: _Database = None, as_json: _AsJson = False) -> None:
    """List all keys with owner, scopes and state."""
    for info in _keys(data, database).list():
        values = _key_values(info)
        if as_json:
            typer.echo(json.dumps(values))
            continue
        if values["revoked_at"]:
            state = "revoked"
        else:
            state = f"expires {values['expires_at']}" if values["expires_at"] else "active"
        scopes = ",".join(info.scopes)
        line = f"{info.id}  {info.owner:16} {scopes:12} {state:28} {info.name}"
        typer.echo(line.rstrip())


@app.command()
def revoke(
    id: Annotated[str, typer.Argument(help="Key id from `skyloom keys list`.")],
    data: _Data = None,
    database: _Database = None,
) -> None:
    """Revoke a key at once."""
    info = _keys(data, database).revoke(id)
    typer.echo(f"{info.id} of {info.owner} is revoked", err=True)


def _exit_despite_threads() -> None:
    """Exit now if a request thread is still waiting for something; its client is gone by now."""
    current = threading.current_thread()
    for thread in threading.enumerate():
        if thread is not current and not thread.daemon:
            thread.join(_THREAD_EXIT_SECONDS)
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
    """Parse a duration like 12h."""
    from skyloom.core.errors import RequestError

    match = re.fullmatch(r"(\d{1,5})([mhd])", text)
    if match is None:
        raise RequestError(f"--expires must be like 30m, 12h or 90d, got {text!r:.40}.")
    return int(match[1]) * _UNITS[match[2]]


def _key_values(info: "KeyInfo") -> dict[str, object]:
    """A key as plain values with ISO times."""
    values: dict[str, object] = {
        "id": info.id,
        "owner": info.owner,
        "name": info.name,
        "scopes": list(info.scopes),
    }
    for name in ("created_at", "expires_at", "last_used_at", "revoked_at"):
        seconds = getattr(info, name)
        values[name] = None if seconds is None else _iso_time(seconds)
    return values


def _iso_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
