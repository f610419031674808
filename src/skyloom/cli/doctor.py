"""`skyloom doctor`: what this machine has, whether it reckons right and whether the bundled model is whole."""

import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from skyloom.models.registry import ModelInfo

_WAY_OUT = "use another device, or skyloom.load(dtype='float32') in Python."


def doctor(
    check_db: Annotated[
        bool, typer.Option("--check-db", help="Look through the server's database for damage.")
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
) -> None:
    """Device, number format, threads, versions, free disk; the weights checked against their hashes, and the decoder
    against itself in fp32."""
    import av
    import torch

    from skyloom.core.device import choose_device, choose_dtype
    from skyloom.core.version import __version__

    device = choose_device()
    codec = ".".join(map(str, av.library_versions["libavcodec"]))
    rows = {
        "skyloom": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "av": f"{av.__version__} (FFmpeg {av.ffmpeg_version_info}, libavcodec {codec})",
        "sqlite": _sqlite(),
        "device": f"{device.type}, {choose_dtype(device)}".replace("torch.", ""),
        "threads": str(torch.get_num_threads()),
        "free disk": f"{shutil.disk_usage(Path()).free / 2**30:.1f} GiB",
    }
    for name, value in rows.items():
        _say(name, value)
    if check_db:
        _check_database(data, database)
    _check_models()


def _say(name: str, value: str) -> None:
    typer.echo(f"{name:10} {value}")


def _sqlite() -> str:
    """The version that the server would use, and whether two processes may write with it."""
    import sqlite3

    from skyloom.core.errors import ConfigError
    from skyloom.serve.queue.database import choose_sqlite

    try:
        module = choose_sqlite()
    except ConfigError as error:
        return f"{sqlite3.sqlite_version}: NOT SAFE for the server. {error}"
    return f"{module.sqlite_version} by {module.__name__}, safe for two writers"


def _check_database(data: Path | None, database: str | None) -> None:
    """A line about the database. Raises ConfigError for one that is damaged."""
    from skyloom.core.errors import ConfigError
    from skyloom.serve.settings import load_settings
    from skyloom.serve.storage.database_backup import examine
    from skyloom.serve.storage.installation import examine_pair, exists

    settings = load_settings(data=data, database_url=database)
    if not exists(settings):
        _say("database", "there is none yet")
        return
    if damage := examine(settings.database):
        raise ConfigError(
            f"The database is damaged ({damage[0]:.80}).",
            hint="skyloom restore puts a backup there.",
        )
    _say("database", "whole")
    examine_pair(settings)
    _say("storage", "belongs to the database")


def _check_models() -> None:
    """Lines for every installed model; the first damaged one is raised after all were looked at."""
    from skyloom.core.errors import CheckpointError
    from skyloom.models.checkpoint import verify_manifest
    from skyloom.models.registry import list_models

    damage: list[CheckpointError] = []
    models = list_models()
    if not models:
        _say("model", "none is installed")
    for model in models:
        try:
            verify_manifest(model.folder)
        except CheckpointError as error:
            damage.append(error)
            _say("model", f"{model.name}: damaged")
            continue
        _say("model", f"{model.name}: weights are as published")
        _say("decoder", _reckoning(model))
    if damage:
        raise damage[0]


def _reckoning(model: "ModelInfo") -> str:
    """How far a model's decoder is from fp32 on this device."""
    from skyloom.core.device import choose_device, choose_dtype
    from skyloom.generate.self_test import TOLERANCE, compare_decoders

    device = choose_device()
    dtype = choose_dtype(device)
    off = compare_decoders(model.folder, device, dtype)
    said = f"{model.name}: {str(dtype).removeprefix('torch.')} on {device.type} is at most {off} of 255 from fp32"
    return said if off <= TOLERANCE else f"{said}. WRONG, as videos made here will be: {_WAY_OUT}"
