"""Finished windows of a rollout on disk, so that a crash costs one window at most.

A folder holds what was asked and the clean latent of every finished window. Everything else follows from these, bit
for bit: noise comes from the seed, memory and decoder are fed with the latents again, which is quick.
"""

import contextlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from skyloom.core.errors import MediaError, RequestError

_ASKED = "asked.json"


class WindowStore:
    """A folder for one request and the weights that answer it. Raises RequestError if it holds another's windows,
    MediaError if it cannot be written."""

    def __init__(self, folder: Path, asked: Mapping[str, Any]) -> None:
        self.folder = folder
        found = read_asked(folder)
        if found is not None and found != _plain(asked):
            names = sorted(name for name in {*found, *_plain(asked)} if found.get(name) != _plain(asked).get(name))
            raise RequestError(
                f"{folder} holds another video ({', '.join(names)}).", hint="Ask for that one, or name another folder."
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if found is None:
                with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".part", delete=False) as file:
                    json.dump(_plain(asked), file)
                Path(file.name).replace(folder / _ASKED)
        except OSError as error:
            raise MediaError(f"{folder} cannot be written.", hint="Choose another folder.") from error

    def load(self, index: int) -> Float[Tensor, "1 c t h w"] | None:
        """The clean latent of a window, if it was finished; one that is damaged was not."""
        try:
            return load_file(self._path(index))["latent"]
        except (FileNotFoundError, SafetensorError, KeyError):
            return None

    def save(self, index: int, latent: Float[Tensor, "1 c t h w"]) -> None:
        """Keep a finished window: whole or not at all. Raises MediaError."""
        partial = self._path(index).with_suffix(".part")
        try:
            save_file({"latent": latent.contiguous()}, partial)
            partial.replace(self._path(index))
        except (OSError, SafetensorError) as error:
            raise MediaError(f"{partial} cannot be written ({error}).", hint="Free some space and go on.") from error

    def _path(self, index: int) -> Path:
        return self.folder / f"window-{index:06}.safetensors"


def clear(folder: Path) -> None:
    """Remove the windows of a video that is done, and their folder if nothing else lies in it."""
    for path in [*folder.glob("window-*.safetensors"), *folder.glob("*.part"), folder / _ASKED]:
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def read_asked(folder: Path) -> dict[str, Any] | None:
    """What the windows in a folder belong to; None for a folder without any. Raises RequestError for other files."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    try:
        return dict(json.loads((folder / _ASKED).read_text()))
    except (OSError, ValueError) as error:
        if all(path.suffix == ".part" for path in folder.iterdir()):
            return None  # it was stopped before the first word
        raise RequestError(f"{folder} holds other files.", hint="Name an empty folder, or a new one.") from error


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return dict(json.loads(json.dumps(values)))
