"""A model folder's manifest: what can be asked of the model, and the hash of every file. Reading it needs no torch."""

import json
from pathlib import Path
from typing import Any

from skyloom.core.errors import CheckpointError

MANIFEST_FILE = "manifest.json"
REPAIR = "Install skyloom again, or point --model at a whole model folder."


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a model folder."""
    path = folder / MANIFEST_FILE
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}).", hint=REPAIR) from error
