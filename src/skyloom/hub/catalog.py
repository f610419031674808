"""The catalogue of `skyloom pull` (catalog.json): files, hashes, licences and memory of models.

A size, hash, revision or precision that was not verified is null, and other unverified fields are
named in `unverified`. A download takes what is null from the hub's headers and pins it on this
machine.
"""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from skyloom.core.config import from_table
from skyloom.core.errors import RequestError

CATALOG_FILE = Path(__file__).with_name("catalog.json")
_NULLABLE = ("revision", "bytes", "sha256", "dtype")


@dataclass(frozen=True)
class Licence:
    """Licence of weights. With `acceptance`, users accept it before the first byte."""

    title: str
    url: str
    acceptance: bool
    conditions: tuple[str, ...]
    id: str = ""


@dataclass(frozen=True)
class CatalogFile:
    """A weights file in a repository of a hub.

    revision: commit; None is the newest. about_bytes: rounded size where `bytes` is None.
    replaces: names of pickle files that hold the same weights.
    """

    repository: str
    path: str
    about_bytes: int
    revision: str | None = None
    bytes: int | None = None
    sha256: str | None = None
    dtype: str | None = None
    unverified: tuple[str, ...] = ()
    replaces: tuple[str, ...] = ()
    key: str = ""

    @property
    def name(self) -> str:
        """File name without folders."""
        return PurePosixPath(self.path).name

    @property
    def size(self) -> int:
        """Size in bytes, rounded if it is not verified."""
        return self.about_bytes if self.bytes is None else self.bytes


@dataclass(frozen=True)
class CatalogModel:
    """A model of the catalogue.

    parts: alternatives for every part, the default first. gpu_memory_gb: GPU memory in GB with and
    without offloading.
    """

    name: str
    family: str
    variant: str
    description: str
    licence: Licence
    source: str
    parameters: int
    gpu_memory_gb: tuple[int, int]
    parts: Mapping[str, tuple[CatalogFile, ...]]
    unverified: tuple[str, ...] = ()

    @property
    def variants(self) -> tuple[str, ...]:
        """Values of --variant: the precisions that some part has."""
        every = [file.dtype for files in self.parts.values() for file in files]
        return tuple(sorted({dtype for dtype in every if dtype is not None}))

    def choose_files(self, variant: str | None = None) -> dict[str, CatalogFile]:
        """Choose a file for every part; `variant` is a precision, for the parts that have it.

        Raises RequestError for an unknown variant.
        """
        if variant is not None and variant not in self.variants:
            raise RequestError(
                f"variant must be one of {', '.join(self.variants)} for {self.name}, "
                f"got {variant!r}.",
                field="variant",
            )
        return {
            part: next((file for file in files if file.dtype == variant), files[0])
            for part, files in self.parts.items()
        }


@dataclass(frozen=True)
class Catalog:
    """All models and files by name."""

    models: Mapping[str, CatalogModel]
    files: Mapping[str, CatalogFile] = field(repr=False)

    def find(self, name: str) -> CatalogModel:
        """Find a model by name. Raises RequestError with the nearest names."""
        if name in self.models:
            return self.models[name]
        near = difflib.get_close_matches(name.lower(), self.models, n=2, cutoff=0.4)
        raise RequestError(
            f"model must be a name of the catalogue, got {name!r}.",
            hint=f"Did you mean {' or '.join(near)}?"
            if near
            else f"Available: {', '.join(self.models)}.",
            field="model",
        )

    def replacement(self, pickle: str) -> CatalogFile | None:
        """Find the safetensors file with the weights of a pickle, by its file name."""
        return next((file for file in self.files.values() if pickle in file.replaces), None)

    def unverified_fields(self) -> list[str]:
        """List every unverified field as "KIND/NAME/FIELD", sorted."""
        fields = [
            f"files/{key}/{name}"
            for key, file in self.files.items()
            for name in (
                *file.unverified,
                *(one for one in _NULLABLE if getattr(file, one) is None),
            )
        ]
        models = [
            f"models/{key}/{name}" for key, one in self.models.items() for name in one.unverified
        ]
        return sorted(fields + models)


def load_catalog(path: Path | None = None) -> Catalog:
    """Read the catalogue. Raises ConfigError for a wrong field."""
    path = path or CATALOG_FILE
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    licences = {
        key: from_table({**row, "id": key}, Licence, str(path))
        for key, row in table["licences"].items()
    }
    files = {
        key: from_table({**_without_nulls(row), "key": key}, CatalogFile, str(path))
        for key, row in table["files"].items()
    }
    models = {
        name: CatalogModel(
            **{
                **row,
                "name": name,
                "licence": licences[row["licence"]],
                "parts": _parts(row["parts"], files),
                "gpu_memory_gb": tuple(row["gpu_memory_gb"]),
                "unverified": tuple(row.get("unverified", ())),
            }
        )
        for name, row in table["models"].items()
    }
    return Catalog(models, files)


def _parts(
    table: Mapping[str, Any], files: Mapping[str, CatalogFile]
) -> dict[str, tuple[CatalogFile, ...]]:
    """Resolve the keys of files; a part that is the name of another part lies in its file."""
    return {
        part: tuple(files[key] for key in (table[keys] if isinstance(keys, str) else keys))
        for part, keys in table.items()
    }


def _without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value is not None}
