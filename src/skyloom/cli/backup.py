"""`skyloom backup` and `skyloom restore`: database, files and credentials together, and back."""

from pathlib import Path
from typing import Annotated

import typer

_Data = Annotated[
    Path | None, typer.Option(help="The server's data folder (default: ~/.local/share/skyloom)")
]
_Database = Annotated[
    str | None,
    typer.Option(
        help="URL of the database (default: SKYLOOM_DATABASE_URL, or a file in the data folder)"
    ),
]
_Storage = Annotated[
    str | None,
    typer.Option(
        help="Folder or URL (s3://...) of results (default: SKYLOOM_STORAGE_URL, or in the data folder)"
    ),
]


def backup(
    target: Annotated[
        Path,
        typer.Argument(
            help="A new folder; or a new file that ends in .db, for the database alone."
        ),
    ],
    data: _Data = None,
    database: _Database = None,
    storage: _Storage = None,
) -> None:
    """Copy database, stored files, signing keys, registry and settings into a folder, also while the server runs."""
    from skyloom.serve.settings import load_settings
    from skyloom.serve.storage.backup import back_up
    from skyloom.serve.storage.installation import open_database

    settings = load_settings(data=data, database_url=database, storage_url=storage)
    if target.suffix == ".db":
        store = open_database(settings, create=False)
        try:
            store.backup(target)
        finally:
            store.close()
        typer.echo(
            f"{target} holds the database; videos and pictures lie in {settings.storage}", err=True
        )
        return
    made = back_up(settings, target)
    typer.echo(f"{target} holds {made.files} files, {made.bytes:,} bytes", err=True)
    for reference in made.missing:
        typer.echo(f"the storage does not have {reference}, which the database names", err=True)


def restore(
    source: Annotated[
        Path, typer.Argument(help="A folder, or a file, that skyloom backup has written.")
    ],
    data: _Data = None,
    database: _Database = None,
    storage: _Storage = None,
) -> None:
    """Put a backup back. It is checked first, and the server must not run. Newer files stay; those that the database
    does not name are printed."""
    from skyloom.serve.settings import load_settings
    from skyloom.serve.storage.backup import restore as put_back

    done = put_back(load_settings(data=data, database_url=database, storage_url=storage), source)
    told = f"{source} is restored" + (
        "" if done.replaced is None else f"; what was there is {done.replaced}"
    )
    typer.echo(told, err=True)
    if done.put_back:
        typer.echo(f"{done.put_back} files were put back into the storage", err=True)
    for name in done.kept:
        typer.echo(f"{name} in the data folder differs from the backup's and stays", err=True)
    if done.unnamed:
        typer.echo(
            f"{len(done.unnamed)} files in the storage are not named by this database and stay:",
            err=True,
        )
        typer.echo("\n".join(done.unnamed))
