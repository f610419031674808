"""Pull a model of the catalogue: plan what is here and what is missing, then fetch the rest."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from skyloom.core.errors import CheckpointError, DiskFullError, DownloadError
from skyloom.core.files import write_atomically
from skyloom.core.hash_cache import HashCache
from skyloom.core.paths import models_folder
from skyloom.hub.catalog import CatalogFile, CatalogModel
from skyloom.hub.download import Transfer, ask, download, part_size
from skyloom.hub.library import PartFile, lock_library, users_of, write_model
from skyloom.hub.local_files import LocalFiles, files_folder
from skyloom.hub.sources import Source
from skyloom.models.detect import detect

PINS_FILE = "pins.json"
_PINNED = ("revision", "bytes", "sha256")


@dataclass(frozen=True)
class PlannedFile:
    """A file to fetch, or one that is here (`local`). started: bytes of an unfinished download."""

    file: CatalogFile
    parts: tuple[str, ...]
    target: Path
    local: Path | None
    started: int

    @property
    def missing(self) -> int:
        """Bytes to fetch."""
        return 0 if self.local is not None else max(self.file.size - self.started, 0)


@dataclass(frozen=True)
class PullPlan:
    """What a pull will do. free_disk: bytes where it writes."""

    model: CatalogModel
    source: Source
    files: tuple[PlannedFile, ...]
    folder: Path
    free_disk: int

    @property
    def missing(self) -> int:
        """Bytes to fetch in all."""
        return sum(one.missing for one in self.files)

    def check_disk(self) -> None:
        """Raise DiskFullError if what is missing does not fit."""
        if self.missing > self.free_disk:
            raise DiskFullError(
                f"{self.model.name} needs {self.missing / 1e9:.1f} GB in {self.folder}, where "
                f"{self.free_disk / 1e9:.1f} GB are free.",
                hint="Free some space, set SKYLOOM_MODELS to a folder on another disk, or choose "
                "a smaller --variant.",
            )


def make_plan(
    model: CatalogModel,
    source: Source,
    *,
    variant: str | None = None,
    transfer: Transfer | None = None,
    notice: Callable[[str], None] = lambda text: None,
) -> PullPlan:
    """Plan a pull. Without `transfer` nothing is asked over the network.

    Raises RequestError for an unknown variant, DownloadError if sizes and hashes that the
    catalogue lacks cannot be had, or a folder as source lacks a file.
    """
    parts: dict[CatalogFile, list[str]] = {}
    for part, file in model.choose_files(variant).items():
        parts.setdefault(file, []).append(part)
    hashes = HashCache()
    local_files = LocalFiles(hashes, notice)
    try:
        files = tuple(
            _plan_file(file, tuple(names), local_files, source, transfer)
            for file, names in parts.items()
        )
    finally:
        hashes.save()
    return PullPlan(model, source, files, models_folder(), _free_disk(models_folder()))


def _plan_file(
    file: CatalogFile,
    parts: tuple[str, ...],
    local_files: LocalFiles,
    source: Source,
    transfer: Transfer | None,
) -> PlannedFile:
    pins = read_pins().get(file.key, {})
    unknown = {name: value for name, value in pins.items() if getattr(file, name) is None}
    file = replace(file, **unknown)
    local = local_files.find(file)
    if local is None and source.folder is not None:
        known = _in_folder(file, source.folder, local_files)
        return PlannedFile(known[0], parts, known[1], known[1], 0)
    if local is None and transfer is not None:
        file = ask(transfer, file)
        local = local_files.find(file)
    if local is not None:
        return PlannedFile(local.file, parts, local.path, local.path, 0)
    target = _target(file, local_files)
    return PlannedFile(file, parts, target, None, part_size(target))


def _in_folder(file: CatalogFile, folder: Path, files: LocalFiles) -> tuple[CatalogFile, Path]:
    """Find a file by its name in the folder that --from names. Raises DownloadError."""
    path = next(iter(sorted(folder.rglob(file.name))), None)
    if path is None:
        raise DownloadError(f"{file.name} is not in {folder}.", hint="Put it there by this name.")
    sha256 = files.sha256(path)
    size = path.stat().st_size
    if file.sha256 not in (None, sha256) or file.bytes not in (None, size):
        raise DownloadError(
            f"{path} is not the file of the catalogue: it has {size:,} bytes and SHA-256 {sha256}, "
            f"the catalogue has {file.sha256}.",
            hint="It is damaged or another version; fetch it again.",
        )
    return replace(file, bytes=size, sha256=sha256), path


def _target(file: CatalogFile, local_files: LocalFiles) -> Path:
    """Choose where to write; another version of the file, which a model uses, is left alone."""
    target = files_folder() / file.name
    if file.sha256 is None or not target.exists():
        return target
    if users_of(target) and local_files.sha256(target) != file.sha256:
        return target.with_name(f"{target.stem}-{file.sha256[:8]}{target.suffix}")
    return target


def _free_disk(folder: Path) -> int:
    """Return the free bytes where a folder is or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def carry_out(plan: PullPlan, transfer: Transfer, accepted: str | None = None) -> Path:
    """Fetch what is missing and write the manifest; return the model's folder.

    accepted: how the licence was accepted, for the manifest. Raises DownloadError; what was
    fetched is kept.
    """
    plan.check_disk()
    with lock_library(f"pull {plan.model.name}", transfer.notice):
        parts: dict[str, list[PartFile]] = {}
        for planned in plan.files:
            used = _obtain(planned, plan, transfer)
            for part in planned.parts:
                parts.setdefault(part, []).append(used)
        detected = _detected_settings(plan.model, parts)
        values = {**_model_values(plan, accepted), **detected}
        return write_model(plan.model.name, values, parts)


def _obtain(planned: PlannedFile, plan: PullPlan, transfer: Transfer) -> PartFile:
    """Use a file that is here, or one that another pull has fetched meanwhile, or download it."""
    file, path = planned.file, planned.local
    if path is None:
        hashes = HashCache()
        found = LocalFiles(hashes, transfer.notice).find(file)
        hashes.save()
        if found is not None:
            file, path = found.file, found.path
    if path is None:
        path = planned.target
        file = download(transfer, file, path)
    _pin(file)
    if file.sha256 is None:
        raise DownloadError(f"{path} has no hash.", hint="Run the command again.")
    provenance: dict[str, Any] = {"repository": file.repository, "revision": file.revision}
    if planned.local is None:
        provenance["url"] = plan.source.url(file)
    fetched = path.absolute().is_relative_to(files_folder().absolute())
    return PartFile(path, file.sha256, fetched, provenance)


def _detected_settings(
    model: CatalogModel, parts: Mapping[str, list[PartFile]]
) -> Mapping[str, Any]:
    """Compare names and shapes of the tensors with the catalogue; return the variant's settings.

    Raises CheckpointError if the files hold another model.
    """
    paths = dict.fromkeys(file.path for files in parts.values() for file in files)
    found = detect(list(paths))
    if found is None:
        return {}
    if (found.family, found.variant) != (model.family, model.variant):
        raise CheckpointError(
            f"The files of {model.name} hold {found.family} {found.variant}, the catalogue says "
            f"{model.family} {model.variant}.",
            hint="Take another source with --from, or a newer skyloom.",
        )
    return found.settings


def _model_values(plan: PullPlan, accepted: str | None) -> dict[str, Any]:
    model = plan.model
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "family": model.family,
        "variant": model.variant,
        "licence": model.licence.id,
        "description": model.description,
        "parameters": model.parameters,
        "licence_acceptance": {
            "licence": model.licence.id,
            "url": model.licence.url,
            "required": model.licence.acceptance,
            "how": accepted or "not required",
            "date": now,
        },
        "source": {"page": model.source, "from": plan.source.name, "date": now},
    }


def read_pins() -> dict[str, dict[str, Any]]:
    """Read commits, sizes and hashes that were pinned on this machine, by key of the file."""
    try:
        pins: dict[str, dict[str, Any]] = json.loads((models_folder() / PINS_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return pins


def _pin(file: CatalogFile) -> None:
    """Remember what the catalogue did not know, so that later pulls get the same file."""
    values = {name: value for name, value in asdict(file).items() if name in _PINNED and value}
    pins = read_pins()
    if pins.get(file.key) != values:
        pins[file.key] = values
        write_atomically(models_folder() / PINS_FILE, json.dumps(pins, indent=1).encode())
