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
    from skyloom.models.checkpoint import verify_manifest
    from skyloom.models.registry import list_models

    device = choose_device()
    free = shutil.disk_usage(Path()).free / 2**30
    rows = {
        "skyloom": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "av": av.__version__,
        "device": f"{device.type}, {choose_dtype(device)}".replace("torch.", ""),
        "threads": str(torch.get_num_threads()),
        "free disk": f"{free:.1f} GiB",
    }
    for name, value in rows.items():
        typer.echo(f"{name:10} {value}")
    for model in list_models():
        verify_manifest(model.folder)
        typer.echo(f"{'model':10} {model.name}: weights are as published")
