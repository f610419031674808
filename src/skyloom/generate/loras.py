"""LoRAs of a request: names and weights, their files, and a transformer with them attached.

torch is imported on first use: the server reads requests without it.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from skyloom.core.errors import CheckpointError, RequestError
from skyloom.core.files import sha256_file
from skyloom.core.paths import data_folder

if TYPE_CHECKING:
    import torch

    from skyloom.models.base import Transformer

MAX_LORAS = 8
MAX_LORA_WEIGHT = 10.0
LORA_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Lora:
    """A LoRA of a request. Raises RequestError for values of the wrong type or range.

    name: of a file in the data folder's `loras` or of a worker's setting `loras`, or a path.
    weight: factor of its effect, from -MAX_LORA_WEIGHT to MAX_LORA_WEIGHT.
    """

    name: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        name = cast(object, self.name)
        weight = cast(Any, self.weight)
        if not isinstance(name, str) or not name:
            raise _invalid(f"name of a LoRA must be text, got {name!r:.80}.")
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not is_number or not math.isfinite(weight) or abs(weight) > MAX_LORA_WEIGHT:
            limits = f"a number from {-MAX_LORA_WEIGHT:g} to {MAX_LORA_WEIGHT:g}"
            raise _invalid(f"weight of LoRA {name!r:.80} must be {limits}, got {weight!r:.40}.")
        object.__setattr__(self, "weight", float(weight))

    @classmethod
    def parse(cls, value: object) -> "Lora":
        """Convert "NAME", "NAME:WEIGHT", a path or a table of the fields. Raises RequestError."""
        if isinstance(value, Lora):
            return value
        if isinstance(value, Path):
            return cls(str(value))
        if isinstance(value, str):
            name, colon, weight = value.rpartition(":")
            with suppress(ValueError):
                return cls(name, float(weight)) if colon else cls(value)
            return cls(value)
        if isinstance(value, Mapping):
            with suppress(TypeError):  # an unknown key, or no name
                return cls(**cast("Mapping[str, Any]", value))
        raise _invalid(f"loras must be NAME or NAME:WEIGHT, got {value!r:.80}.")


@dataclass(frozen=True)
class LoraFile:
    """The file of a LoRA with its sha256."""

    lora: Lora
    path: Path
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the receipt: name, weight and sha256."""
        return {**asdict(self.lora), "sha256": self.sha256}


def parse_loras(values: object) -> tuple[Lora, ...]:
    """Convert the `loras` of a request. Raises RequestError."""
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise _invalid(f"loras must be a list of NAME or NAME:WEIGHT, got {values!r:.80}.")
    loras = tuple(Lora.parse(value) for value in cast("Sequence[object]", values))
    if len(loras) > MAX_LORAS:
        raise _invalid(f"loras must be at most {MAX_LORAS}, got {len(loras)}.")
    names = [lora.name for lora in loras]
    for name in names:
        if names.count(name) > 1:
            raise _invalid(f"loras must differ, got {name!r:.80} twice.")
    return loras


def find_loras(loras: Sequence[Lora], files: Mapping[str, str] | None) -> tuple[LoraFile, ...]:
    """Find and hash the files of LoRAs. Raises RequestError for one that is missing.

    files: the paths of all LoRAs that may be used, by name. None stands for any path, and the
    files in the data folder's `loras` by their names without the suffix.
    """
    return tuple(_find_lora(lora, files) for lora in loras)


def _find_lora(lora: Lora, files: Mapping[str, str] | None) -> LoraFile:
    folder = data_folder() / "loras"
    if files is None:
        names = sorted(path.stem for path in folder.glob(f"*{LORA_SUFFIX}"))
        path = Path(lora.name)
        if not path.is_file():
            path = folder / f"{path.name}{LORA_SUFFIX}" if path.name == lora.name else path
    else:
        names = sorted(files)
        path = Path(files.get(lora.name, ""))
    try:
        return LoraFile(lora, path, sha256_file(path))
    except OSError as error:
        place = f" Names are files in {folder}." if files is None else ""
        raise _invalid(
            f"loras must name files that exist, got {lora.name!r:.200}.",
            hint=f"Available: {', '.join(names) or 'none'}.{place}",
        ) from error


def attach_loras(
    transformer: "Transformer",
    loras: Sequence[LoraFile],
    *,
    family: str,
    base: str,
    device: "torch.device",
) -> tuple["Transformer", tuple[str, ...]]:
    """Return a transformer with LoRAs attached, and notices about their files.

    It shares the weights of the given one, which stays as it is. base: digest of the model's
    weights, as in receipts. Raises RequestError, with the first wrong tensor, for a file that does
    not fit the model.
    """
    from skyloom.models.lora import with_adapters
    from skyloom.models.lora_files import load_adapter

    network: Any = transformer
    try:
        adapters = [
            load_adapter(one.path, network, family=family, base=base).place(network, device)
            for one in loras
        ]
    except CheckpointError as error:
        raise _invalid(error.message, hint=error.hint) from error
    weights = [one.lora.weight for one in loras]
    attached: Transformer = with_adapters(network, zip(adapters, weights, strict=True))
    return attached, tuple(notice for adapter in adapters for notice in adapter.notices)


def _invalid(message: str, hint: str | None = None) -> RequestError:
    return RequestError(message, hint=hint, field="loras")
