"""`skyloom doctor`: versions, devices, attention kernels, bf16 numerics, hashes of models."""

import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from skyloom.cli import options

if TYPE_CHECKING:
    import torch

    from skyloom.models.registry import ModelInfo


def doctor(
    check_db: Annotated[
        bool, typer.Option("--check-db", help="Check the server's database for damage.")
    ] = False,
    data: Annotated[
        Path | None, typer.Option(help="The server's data folder (default: ~/.local/share/skyloom)")
    ] = None,
    database: Annotated[
        str | None,
        typer.Option(
            help="URL of the database (default: SKYLOOM_DATABASE_URL, or a file in the data folder)"
        ),
    ] = None,
    device: options.Device = None,
    full: Annotated[
        bool,
        typer.Option(
            "--full", help="Read every weight file, also those that have not changed since."
        ),
    ] = False,
) -> None:
    """Show versions, devices and disk space; check model hashes and the decoder's precision."""
    import av
    import torch

    from skyloom.core.device import choose_device, choose_dtype
    from skyloom.core.device_report import device_rows
    from skyloom.core.version import __version__

    where = choose_device(device)
    dtype = choose_dtype(where)
    codec = ".".join(map(str, av.library_versions["libavcodec"]))
    rows = {
        "skyloom": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "av": f"{av.__version__} (FFmpeg {av.ffmpeg_version_info}, libavcodec {codec})",
        "sqlite": _describe_sqlite(),
        "device": f"{where}, {dtype}".replace("torch.", ""),
        "threads": str(torch.get_num_threads()),
        "free disk": f"{shutil.disk_usage(Path()).free / 2**30:.1f} GiB",
    }
    for name, value in rows.items():
        _print_row(name, value)
    for name, value in device_rows(where, dtype):
        _print_row(name, value)
    if check_db:
        _check_database(data, database)
    _check_models(where, dtype, full=full)


def _print_row(name: str, value: str) -> None:
    typer.echo(f"{name:10} {value}")


def _describe_sqlite() -> str:
    """Version of the SQLite that the server uses, and whether two processes may write with it."""
    import sqlite3

    from skyloom.core.errors import ConfigError
    from skyloom.serve.queue.database import choose_sqlite

    try:
        module = choose_sqlite()
    except ConfigError as error:
        return f"{sqlite3.sqlite_version}: NOT SAFE for the server. {error}"
    return f"{module.sqlite_version} by {module.__name__}, safe for two writers"


def _check_database(data: Path | None, database: str | None) -> None:
    """Print the state of database and storage. Raises ConfigError if the database is damaged."""
    from skyloom.core.errors import ConfigError
    from skyloom.serve.settings import load_settings
    from skyloom.serve.storage.installation import database_exists, examine_installation
    from skyloom.serve.storage.sqlite_files import find_damage

    settings = load_settings(data=data, database_url=database)
    if not database_exists(settings):
        _print_row("database", "not created yet")
        return
    if damage := find_damage(settings.database):
        raise ConfigError(
            f"The database is damaged ({damage[0]:.80}).",
            hint="Restore a backup with skyloom restore.",
        )
    _print_row("database", "no damage found")
    examine_installation(settings)
    _print_row("storage", "belongs to the database")


def _check_models(device: "torch.device", dtype: "torch.dtype", *, full: bool) -> None:
    """Print the state of every model, then raise CheckpointError for a damaged one.

    Unless `full`, the remembered hash of a file that has not changed is used.
    """
    from skyloom.core.errors import CheckpointError
    from skyloom.models.checkpoint import verify_manifest
    from skyloom.models.registry import list_models

    damage: list[CheckpointError] = []
    models = list_models()
    if not models:
        _print_row("model", "no model is installed")
    for model in models:
        try:
            verify_manifest(model.folder, trust_cache=not full)
        except CheckpointError as error:
            damage.append(error)
            _print_row("model", f"{model.name}: damaged")
            continue
        _print_row("model", f"{model.name}: weights match their published hashes")
        _print_row("decoder", _compare_decoder(model, device, dtype))
    if damage:
        raise damage[0]


def _compare_decoder(model: "ModelInfo", device: "torch.device", dtype: "torch.dtype") -> str:
    """Describe how far a decoder on this device is from fp32, in levels of 0 to 255."""
    from skyloom.generate.self_test import TOLERANCE, compare_decoders

    difference = compare_decoders(model, device, dtype)
    dtype_name = str(dtype).removeprefix("torch.")
    result = f"{model.name}: {dtype_name} on {device.type} differs from fp32 by {difference} of 255"
    if difference <= TOLERANCE:
        return result
    return (
        f"{result}. WRONG, videos made here will be wrong too: use another device, or"
        " skyloom.load(dtype='float32') in Python."
    )
