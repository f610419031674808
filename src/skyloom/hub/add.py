"""Add a model from files that are on this machine; they are used where they lie."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skyloom.core.errors import CheckpointError, RequestError
from skyloom.core.hash_cache import HashCache
from skyloom.core.paths import models_folder
from skyloom.hub.catalog import Catalog, CatalogFile, CatalogModel
from skyloom.hub.library import PartFile, check_name, lock_library, write_model
from skyloom.hub.local_files import SUFFIXES, LocalFiles, weights_under
from skyloom.models.detect import DetectedModel, detect
from skyloom.models.registry import MANIFEST_FILE

_PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle")
_TOKENIZERS = ("tokenizer.json", "spiece.model")
_REQUIRED = ("transformer", "text_encoder", "autoencoder")


@dataclass(frozen=True)
class AddedModel:
    """A model to add: its parts, and which files are the catalogue's (`known`, by path)."""

    family: str
    variant: str
    parts: Mapping[str, tuple[Path, ...]]
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    known: Mapping[Path, CatalogFile] = field(default_factory=dict[Path, CatalogFile])
    model: CatalogModel | None = None


def add_model(
    paths: Sequence[Path],
    catalog: Catalog,
    *,
    name: str | None = None,
    notice: Callable[[str], None] = lambda text: None,
) -> tuple[str, AddedModel]:
    """Add a model from folders and files; return its name and what was found.

    Raises RequestError for paths without weights and for names that are taken, CheckpointError for
    pickles, damaged files and incomplete or unknown models.
    """
    files = _collect(paths, catalog)
    hashes = HashCache()
    local_files = LocalFiles(hashes, notice)
    try:
        found = _identify(files, catalog, local_files)
        name = name or _choose_name(found, paths)
        check_name(name)
        if (models_folder() / name / MANIFEST_FILE).exists():
            raise RequestError(
                f"name must be new, got {name!r}, which is installed.",
                hint=f"Choose another --name, or run: skyloom models remove {name}.",
                field="name",
            )
        parts = {
            part: [
                PartFile(path, local_files.sha256(path), provenance=_provenance(found, path))
                for path in part_paths
            ]
            for part, part_paths in found.parts.items()
        }
    finally:
        hashes.save()
    with lock_library(f"models add {name}", notice):
        write_model(name, _values(found), parts)
    return name, found


def _collect(paths: Sequence[Path], catalog: Catalog) -> list[Path]:
    """List the weights and tokenizer files of the paths. Raises RequestError, CheckpointError."""
    files: dict[Path, None] = {}
    pickles: list[Path] = []
    for path in (path.expanduser().absolute() for path in paths):
        if not path.exists():
            raise RequestError(f"path must exist, got {path}.", field="path")
        if (path / MANIFEST_FILE).exists():
            raise RequestError(
                f"{path} is a model of skyloom already.",
                hint=f"Use it with --model {path}, or list its parent folder in "
                "SKYLOOM_MODEL_PATH.",
                field="path",
            )
        listed = sorted(path.rglob("*")) if path.is_dir() else [path]
        pickles += [one for one in listed if one.suffix in _PICKLES]
        tokenizers = [one for one in listed if one.name in _TOKENIZERS]
        weights = list(weights_under(path)) if path.is_dir() else [path]
        files |= dict.fromkeys(
            [*(one for one in weights if one.suffix in SUFFIXES), *tokenizers], None
        )
    if pickles and not any(path.suffix in SUFFIXES for path in files):
        raise _pickle_error(pickles[0], catalog)
    if not files:
        names = ", ".join(str(path) for path in paths)
        raise RequestError(
            f"path must hold weights in {' or '.join(SUFFIXES)}, got {names}.", field="path"
        )
    return list(files)


def _pickle_error(path: Path, catalog: Catalog) -> CheckpointError:
    """Refuse a pickle, which can run any program; name the safetensors file to use."""
    twin = catalog.replacement(path.name)
    use = (
        "Use the same weights in safetensors."
        if twin is None
        else f"Use {twin.name} of huggingface.co/{twin.repository}; `skyloom pull` fetches it."
    )
    return CheckpointError(f"{path} is a pickle, which is never opened.", hint=use)


def _identify(files: Sequence[Path], catalog: Catalog, local_files: LocalFiles) -> AddedModel:
    """Tell model and parts: by names and shapes of the tensors, else by the catalogue's hashes.

    Raises CheckpointError.
    """
    detected = detect(files)
    if detected is not None:
        used = dict.fromkeys(path for paths in detected.parts.values() for path in paths)
        known = _compare(list(used), catalog, local_files)
        return _complete(_of_detected(detected, known, catalog))
    weights = [path for path in files if path.suffix in SUFFIXES]
    known = _compare(weights, catalog, local_files, likely_only=True)
    model = _model_of_files(known, catalog)
    if model is None:
        raise CheckpointError(
            f"No model family of this version knows {', '.join(path.name for path in files[:3])}.",
            hint="`skyloom models list --available` lists what can be used.",
        )
    parts = {
        part: tuple(path for path, file in known.items() if file in alternatives)[:1]
        for part, alternatives in model.parts.items()
    }
    found = AddedModel(model.family, model.variant, parts, known=known, model=model)
    return _complete(found)


def _of_detected(
    detected: DetectedModel, known: Mapping[Path, CatalogFile], catalog: Catalog
) -> AddedModel:
    model = next(
        (
            one
            for one in catalog.models.values()
            if (one.family, one.variant) == (detected.family, detected.variant)
        ),
        None,
    )
    return AddedModel(
        detected.family,
        detected.variant,
        detected.parts,
        detected.settings,
        known,
        model if _model_of_files(known, catalog) == model else None,
    )


def _complete(found: AddedModel) -> AddedModel:
    """Return the model unless it lacks a part. Raises CheckpointError."""
    missing = [part for part in _REQUIRED if not found.parts.get(part)]
    if not missing:
        return found
    names = ", ".join(part.replace("_", " ") for part in missing)
    hint = "Name the folder or all files: skyloom models add TRANSFORMER TEXT_ENCODER AUTOENCODER."
    if found.model is not None:
        hint += f" `skyloom pull {found.model.name}` uses these files and fetches the rest."
    raise CheckpointError(f"The model lacks its {names}.", hint=hint)


def _compare(
    paths: Sequence[Path],
    catalog: Catalog,
    local_files: LocalFiles,
    *,
    likely_only: bool = False,
) -> dict[Path, CatalogFile]:
    """Find the catalogue's entry of each file by its hash; `likely_only` skips other sizes.

    Raises CheckpointError for a file with a catalogue's name and size, and another hash.
    """
    known: dict[Path, CatalogFile] = {}
    for path in paths:
        size = path.stat().st_size
        same_size = [one for one in catalog.files.values() if one.bytes in (size, None)]
        if not same_size and likely_only:
            continue
        sha256 = local_files.sha256(path)
        match = next((one for one in catalog.files.values() if one.sha256 == sha256), None)
        if match is not None:
            known[path] = match
            continue
        twin = next((one for one in same_size if one.name == path.name and one.sha256), None)
        if twin is not None and twin.bytes == size:
            raise CheckpointError(
                f"{path} is damaged: its SHA-256 is {sha256}, that of the catalogue is "
                f"{twin.sha256}.",
                hint="Fetch it again.",
            )
    return known


def _model_of_files(known: Mapping[Path, CatalogFile], catalog: Catalog) -> CatalogModel | None:
    """Return the model whose transformer is among the files; None if none or several are."""
    models = [
        model
        for model in catalog.models.values()
        if set(known.values()) & set(model.parts["transformer"])
    ]
    return models[0] if len(models) == 1 else None


def _choose_name(found: AddedModel, paths: Sequence[Path]) -> str:
    """Name a model after the catalogue's, else after its folder or transformer file."""
    if found.model is not None:
        return found.model.name
    first = paths[0].expanduser().absolute()
    source = first if first.is_dir() else found.parts["transformer"][0]
    return source.name.removesuffix(source.suffix if source.is_file() else "").lower()


def _provenance(found: AddedModel, path: Path) -> dict[str, Any]:
    entry = found.known.get(path)
    return {} if entry is None else {"repository": entry.repository, "catalog": entry.key}


def _values(found: AddedModel) -> dict[str, Any]:
    values: dict[str, Any] = {"family": found.family, "variant": found.variant}
    if found.model is not None:
        values["licence"] = found.model.licence.id
        values["description"] = found.model.description
        values["parameters"] = found.model.parameters
    return {**values, **found.settings}
