"""Models that were pulled or added: folders with a manifest of files that lie anywhere.

The manifest has `parts`: for each part its files with path, size, SHA-256 and identity (size, mtime
and inode when it was hashed). Paths below SKYLOOM_MODELS are relative, so that the folder can move.
"""

import json
import os
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from skyloom.core.errors import CheckpointError, RequestError
from skyloom.core.files import atomic_path
from skyloom.core.hash_cache import file_identity
from skyloom.core.paths import models_folder
from skyloom.hub.catalog import Catalog
from skyloom.hub.download import part_path
from skyloom.hub.local_files import files_folder
from skyloom.models.registry import (
    BUNDLED,
    MANIFEST_FILE,
    find_model,
    model_roots,
    read_manifest,
    weight_files,
)

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_RESERVED = ("files",)


@dataclass(frozen=True)
class PartFile:
    """A file of a part. provenance: further values of its row, such as repository and commit.

    fetched: pull wrote it, and remove may delete it.
    """

    path: Path
    sha256: str
    fetched: bool = False
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any])


def check_name(name: str) -> None:
    """Raise RequestError unless a name can be a folder's."""
    if not _NAME.fullmatch(name) or name in _RESERVED:
        raise RequestError(
            "name must be lower-case letters, digits, '.', '_' and '-', and not 'files', "
            f"got {name!r}.",
            field="name",
        )


def write_model(
    name: str, values: Mapping[str, Any], parts: Mapping[str, Sequence[PartFile]]
) -> Path:
    """Write the manifest of a model that uses files in place; return its folder."""
    folder = models_folder() / name
    folder.mkdir(parents=True, exist_ok=True)
    rows = {part: [_row(folder, file) for file in files] for part, files in parts.items()}
    manifest = {"name": name, **values, "parts": rows}
    with atomic_path(folder / MANIFEST_FILE) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return folder


def _row(folder: Path, file: PartFile) -> dict[str, Any]:
    path = file.path.absolute()
    stat = path.stat()
    inside = path.is_relative_to(models_folder().absolute())
    return {
        "path": os.path.relpath(path, folder.absolute()) if inside else str(path),
        "bytes": stat.st_size,
        "sha256": file.sha256,
        "identity": file_identity(stat),
        "fetched": file.fetched,
        **file.provenance,
    }


@contextmanager
def lock_library(purpose: str, notice: Callable[[str], None]) -> Generator[None]:
    """Let one process at a time change SKYLOOM_MODELS; others say who does and wait."""
    folder = models_folder()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    holder = folder / ".lock.json"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        notice(f"Waiting for {_describe_holder(holder)}. Ctrl-C stops waiting.")
        lock.acquire()
    try:
        holder.write_text(json.dumps({"process": os.getpid(), "purpose": purpose}))
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _describe_holder(path: Path) -> str:
    try:
        values = json.loads(path.read_text())
        return f"`skyloom {values['purpose']}` (process {values['process']}) to end"
    except (OSError, ValueError, KeyError):
        return "another skyloom process that changes the models to end"


def users_of(path: Path) -> list[str]:
    """Name the models that use a file, of all folders of models."""
    wanted = path.resolve()
    names: list[str] = []
    for root in model_roots():
        for manifest_path in sorted(root.glob(f"*/{MANIFEST_FILE}")):
            folder = manifest_path.parent
            try:
                files = weight_files(folder, read_manifest(folder))
            except (CheckpointError, KeyError, TypeError):
                continue
            if any(file.path.resolve() == wanted for file in files):
                names.append(folder.name)
    return names


@dataclass(frozen=True)
class Removal:
    """What removing a model deletes, and what stays with the reason."""

    name: str
    deleted: tuple[Path, ...]
    kept: Mapping[Path, str]

    @property
    def size(self) -> int:
        """Bytes that it frees."""
        return sum(path.stat().st_size for path in self.deleted)

    def carry_out(self) -> None:
        """Delete the files."""
        for path in self.deleted:
            path.unlink(missing_ok=True)
        folder = models_folder() / self.name
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def plan_removal(name: str, catalog: Catalog) -> Removal:
    """Plan what to delete of a model, or of a pull that was not finished.

    Raises RequestError for a model that is bundled, unknown or in a folder that is only read.
    """
    folder = models_folder() / name
    if not (folder / MANIFEST_FILE).exists():
        return _plan_leftovers(name, catalog)
    deleted = [folder / MANIFEST_FILE]
    kept: dict[Path, str] = {}
    manifest = read_manifest(folder)
    fetched = {
        (folder / row["path"]).resolve()
        for rows in manifest.get("parts", {}).values()
        for row in rows
        if row.get("fetched")
    }
    for file in weight_files(folder, manifest):
        path = file.path.resolve()
        others = [user for user in users_of(path) if user != name]
        if others:
            kept[path] = f"used by {', '.join(others)}"
        elif path not in fetched or not path.is_relative_to(files_folder().resolve()):
            kept[path] = "not downloaded by skyloom"
        elif path.exists():
            deleted.append(path)
    return Removal(name, tuple(deleted), kept)


def _plan_leftovers(name: str, catalog: Catalog) -> Removal:
    """Plan to delete what an unfinished pull left."""
    model = catalog.models.get(name)
    files = [] if model is None else [file for part in model.parts.values() for file in part]
    found: dict[Path, None] = {}
    for file in files:
        target = files_folder() / file.name
        part = part_path(target)
        for path in (part, part.with_name(f"{part.name}.json")):
            if path.exists():
                found[path] = None
        if target.exists() and not users_of(target):
            found[target] = None
    if found:
        return Removal(name, tuple(found), {})
    folder = find_model(name).folder
    where = "comes with skyloom" if folder.parent == BUNDLED else f"lies in {folder}"
    raise RequestError(
        f"{name} cannot be removed: it {where}, and only {models_folder()} is written to.",
        field="model",
    )
