"""`skyloom backup` and `skyloom restore`: database, stored files, keys and settings."""

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
        help="Folder or URL (s3://...) of stored files"
        " (default: SKYLOOM_STORAGE_URL, or in the data folder)"
    ),
]


def backup(
    target: Annotated[
        Path,
        typer.Argument(help="New folder; or new file ending in .db, for the database alone."),
    ],
    data: _Data = None,
    database: _Database = None,
    storage: _Storage = None,
) -> None:
    """Copy database, stored files, signing keys, registry and settings to a folder.

    The server may run meanwhile."""
    from skyloom.serve.settings import load_settings
    from skyloom.serve.storage.backup import create_backup
    from skyloom.serve.storage.installation import open_database

    settings = load_settings(data=data, database_url=database, storage_url=storage)
    if target.suffix == ".db":
        opened = open_database(settings, create=False)
        try:
            opened.backup(target)
        finally:
            opened.close()
        typer.echo(
            f"{target} contains the database alone, without the stored files in {settings.storage}",
            err=True,
        )
        return
    report = create_backup(settings, target)
    typer.echo(f"{target} contains {report.files} files, {report.bytes:,} bytes", err=True)
    for reference in report.missing:
        typer.echo(f"missing in the storage: {reference}", err=True)


def restore(
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder or .db file written by skyloom backup, or the copy from before an update."
        ),
    ],
    data: _Data = None,
    database: _Database = None,
    storage: _Storage = None,
) -> None:
    """Verify a backup, then restore it. Stop the server first.

    Newer files stay; stored files that the restored database does not reference are listed."""
    from skyloom.serve.settings import load_settings
    from skyloom.serve.storage.backup import restore_backup

    settings = load_settings(data=data, database_url=database, storage_url=storage)
    report = restore_backup(settings, source)
    typer.echo(f"restored {source}", err=True)
    if report.replaced is not None:
        typer.echo(f"the previous database is {report.replaced}", err=True)
    if report.put_back:
        typer.echo(f"{report.put_back} files were added to the storage", err=True)
    for name in report.kept:
        typer.echo(f"kept {name} of the data folder, which differs from the backup", err=True)
    if report.unnamed:
        typer.echo(
            f"{len(report.unnamed)} files in the storage are not referenced by this database"
            " and stay:",
            err=True,
        )
        typer.echo("\n".join(report.unnamed))
