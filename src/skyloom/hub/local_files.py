"""Find files of the catalogue that are on this machine already; they are used where they lie.

Searched, in this order: the folder of `skyloom pull`, the cache of the Hugging Face hub, ComfyUI
($COMFYUI_PATH, ~/ComfyUI and the folders of their extra_model_paths.yaml), WanGP ($WANGP_PATH,
~/Wan2GP). A file is the same if its size and then its SHA-256 are equal; the hub's cache names
files by their SHA-256.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from skyloom.core.hash_cache import HashCache
from skyloom.core.paths import models_folder
from skyloom.hub.catalog import CatalogFile

SUFFIXES = (".safetensors", ".gguf")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LARGE = 500_000_000
_YAML_LINE = re.compile(r"(?P<indent>\s*)(?:(?P<key>[\w.-]+):)?\s*(?P<value>[^#]*)")


def files_folder() -> Path:
    """Return the folder where pull puts weights; models share them."""
    return models_folder() / "files"


@dataclass(frozen=True)
class LocalFile:
    """A file on this machine that is the catalogue's."""

    path: Path
    file: CatalogFile


class LocalFiles:
    """Files on this machine. notice: called before a large file is read."""

    def __init__(self, hashes: HashCache, notice: Callable[[str], None]) -> None:
        self._hashes = hashes
        self._notice = notice

    @cached_property
    def _by_size(self) -> dict[int, list[Path]]:
        """Weights files of all folders by size."""
        found: dict[int, list[Path]] = {}
        for path in dict.fromkeys(p for root in search_folders() for p in weights_under(root)):
            try:
                found.setdefault(path.stat().st_size, []).append(path)
            except OSError:  # a broken link
                continue
        return found

    def find(self, file: CatalogFile, further: Path | None = None) -> LocalFile | None:
        """Find a file, its unknown size and hash filled in; `further` is one more folder."""
        if further is None and (cached := _find_in_hub_cache(file)) is not None:
            return cached
        if file.bytes is None or file.sha256 is None:
            return None
        extra = [] if further is None else list(weights_under(further))
        same_size = [path for path in extra if path.stat().st_size == file.bytes]
        for path in (*same_size, *self._by_size.get(file.bytes, ())):
            if self.sha256(path) == file.sha256:
                return LocalFile(path, file)
        return None

    def sha256(self, path: Path) -> str:
        """Return a file's hash; one that has not changed since is not read again."""
        size = path.stat().st_size
        if size >= _LARGE and self._hashes.known(path) is None:
            self._notice(f"Comparing {path} ({size / 1e9:.1f} GB) ...")
        return self._hashes.sha256(path, trust=True)


def search_folders() -> list[Path]:
    """List the folders that are searched for weights files; those that exist."""
    comfy = [Path(os.environ["COMFYUI_PATH"])] if os.environ.get("COMFYUI_PATH") else []
    comfy.append(Path.home() / "ComfyUI")
    wangp = [Path(os.environ["WANGP_PATH"])] if os.environ.get("WANGP_PATH") else []
    wangp.append(Path.home() / "Wan2GP")
    folders = [
        files_folder(),
        *(root / "models" for root in comfy),
        *(path for root in comfy for path in read_extra_paths(root / "extra_model_paths.yaml")),
        *(root / "ckpts" for root in wangp),
    ]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def weights_under(root: Path) -> Iterator[Path]:
    """List the weights files under a folder, by path."""
    for folder, subfolders, names in os.walk(root):
        subfolders.sort()
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(SUFFIXES))


def read_extra_paths(path: Path) -> list[Path]:
    """Read the folders in ComfyUI's extra_model_paths.yaml: `key: folder` below a `base_path`.

    Only this form is read: nested two deep, one folder a line, also as a `|` block.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    base = path.parent
    folders: list[Path] = []
    for line in lines:
        match = _YAML_LINE.fullmatch(line.split(" #")[0].rstrip())
        if match is None:
            continue
        value = match["value"].strip().strip("'\"")
        if match["key"] and not match["indent"]:
            base = path.parent
        elif match["key"] == "base_path":
            base = path.parent / Path(value).expanduser()
        elif value not in ("", "|", ">", "true", "false"):
            folders.append(base / Path(value).expanduser())
    return folders


def _find_in_hub_cache(file: CatalogFile) -> LocalFile | None:
    """Find a file in a cache of the Hugging Face hub, without reading it."""
    repository = f"models--{file.repository.replace('/', '--')}"
    for root in _hub_caches():
        for snapshot in sorted((root / repository / "snapshots").glob("*")):
            path = snapshot / file.path
            if not path.exists():
                continue
            sha256 = path.resolve().name
            size = path.stat().st_size
            if (
                _SHA256.fullmatch(sha256)
                and file.sha256 in (None, sha256)
                and file.bytes in (None, size)
                and (file.sha256 is not None or file.revision in (None, snapshot.name))
            ):
                known = replace(file, bytes=size, sha256=sha256, revision=snapshot.name)
                return LocalFile(path, known)
    return None


def _hub_caches() -> list[Path]:
    folders = [os.environ.get("HF_HUB_CACHE"), None, str(Path.home() / ".cache/huggingface/hub")]
    if home := os.environ.get("HF_HOME"):
        folders[1] = str(Path(home) / "hub")
    return [Path(folder) for folder in dict.fromkeys(folders) if folder]
