"""`skyloom doctor`: what this machine has and whether the bundled model is whole."""

import platform
import shutil
from pathlib import Path

import typer


def doctor() -> None:
    """Device, number format, threads, versions, free disk, and the weights checked against their hashes."""
    import av
    import torch

    from skyloom import __version__
    from skyloom.core.device import choose_device, choose_dtype

    device = choose_device()
    free = shutil.disk_usage(Path()).free / 2**30
    rows = {
        "skyloom": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "av": f"{av.__version__} (libavcodec {'.'.join(map(str, av.library_versions['libavcodec']))})",
        "device": f"{device.type}, {choose_dtype(device)}".replace("torch.", ""),
        "threads": str(torch.get_num_threads()),
        "free disk": f"{free:.1f} GiB",
    }
    for name, value in rows.items():
        typer.echo(f"{name:10} {value}")
    _check_models()


def _check_models() -> None:
    """A line for every installed model; the first damaged one is raised after all were looked at."""
    from skyloom.core.errors import CheckpointError
    from skyloom.models.checkpoint import verify_manifest
    from skyloom.models.registry import list_models

    damage: list[CheckpointError] = []
    models = list_models()
    if not models:
        typer.echo(f"{'model':10} none is installed")
    for model in models:
        try:
            verify_manifest(model.folder)
            state = "weights are as published"
        except CheckpointError as error:
            damage.append(error)
            state = "damaged"
        typer.echo(f"{'model':10} {model.name}: {state}")
    if damage:
        raise damage[0]
