"""`skyloom backup` and `skyloom restore`: the server's database as one file, and back."""

from pathlib import Path
from typing import Annotated

import typer

_Data = Annotated[Path | None, typer.Option(help="The server's data folder (default: ~/.local/share/skyloom)")]
_Database = Annotated[
    str | None, typer.Option(help="URL of the database (default: SKYLOOM_DATABASE_URL, or a file in the data folder)")
]


def backup(
    file: Annotated[Path, typer.Argument(help="A new file for the copy.")],
    data: _Data = None,
    database: _Database = None,
) -> None:
    """Copy the database of jobs, keys and names to a file, also while the server runs. Videos lie in the storage."""
    from skyloom.core.errors import ConfigError
    from skyloom.serve.database import Database
    from skyloom.serve.settings import load_settings

    settings = load_settings(data=data, database_url=database)
    if settings.database_url is None and not (settings.data / "skyloom.db").exists():
        raise ConfigError(f"There is no database in {settings.data}.", hint="Name its folder with --data.")
    store = Database(settings.database)
    try:
        store.backup(file)
    finally:
        store.close()
    typer.echo(f"{file} holds the database; videos and pictures lie in {settings.storage}", err=True)


def restore(
    file: Annotated[Path, typer.Argument(help="A file that skyloom backup has written.")],
    data: _Data = None,
    database: _Database = None,
) -> None:
    """Put a backup in the place of the database. It is checked first, and the server must not run."""
    from skyloom.serve.backup import restore as put_back
    from skyloom.serve.settings import load_settings

    settings = load_settings(data=data, database_url=database)
    kept = put_back(settings.database, file)
    typer.echo(f"{file} is restored" + ("" if kept is None else f"; what was there is {kept}"), err=True)
