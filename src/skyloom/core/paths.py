"""Folders of this user: data, state and cache. None of them needs to exist."""

import os
from pathlib import Path

CACHE_OFF = "off"


def data_folder() -> Path:
    """Return SKYLOOM_DATA, else XDG_DATA_HOME/skyloom, else ~/.local/share/skyloom."""
    return _folder("SKYLOOM_DATA", "XDG_DATA_HOME", ".local/share")


def models_folder() -> Path:
    """Return SKYLOOM_MODELS, else the folder `models` of the data folder: where models are put."""
    own = os.environ.get("SKYLOOM_MODELS")
    return Path(own).expanduser() if own else data_folder() / "models"


def model_path() -> tuple[Path, ...]:
    """Return the folders of SKYLOOM_MODEL_PATH: further models, which are only read."""
    listed = os.environ.get("SKYLOOM_MODEL_PATH", "").split(os.pathsep)
    return tuple(Path(name).expanduser() for name in listed if name)


def state_folder() -> Path:
    """Return SKYLOOM_STATE, else XDG_STATE_HOME/skyloom, else ~/.local/state/skyloom."""
    return _folder("SKYLOOM_STATE", "XDG_STATE_HOME", ".local/state")


def cache_folder() -> Path | None:
    """Return SKYLOOM_CACHE, else XDG_CACHE_HOME/skyloom, else ~/.cache/skyloom.

    None if SKYLOOM_CACHE is "off".
    """
    if os.environ.get("SKYLOOM_CACHE") == CACHE_OFF:
        return None
    return _folder("SKYLOOM_CACHE", "XDG_CACHE_HOME", ".cache")


def _folder(variable: str, xdg_variable: str, default: str) -> Path:
    if path := os.environ.get(variable):
        return Path(path)
    base = os.environ.get(xdg_variable)
    return (Path(base) if base else Path.home() / default) / "skyloom"
