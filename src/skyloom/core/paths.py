"""Where this machine keeps what it signs with and what it has made."""

import os
from pathlib import Path


def data_folder() -> Path:
    """SKYLOOM_DATA, else XDG_DATA_HOME/skyloom, else ~/.local/share/skyloom. It need not exist."""
    own, shared = os.environ.get("SKYLOOM_DATA"), os.environ.get("XDG_DATA_HOME")
    return (
        Path(own) if own else (Path(shared) if shared else Path.home() / ".local/share") / "skyloom"
    )
