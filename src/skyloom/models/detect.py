"""Tell what model some files hold: family, variant and the part that each file is.

A family whose models can be made of other tools' files has a module `detect` with a function
`detect(paths)`, which reads headers only. It returns None for files of another family and raises
CheckpointError for a variant that is not supported.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skyloom.models.registry import FAMILIES, family_module


@dataclass(frozen=True)
class DetectedModel:
    """What files hold.

    parts: files by part: "transformer", "text_encoder", "tokenizer", "autoencoder"; a file may be
    in several. settings: values of the variant for the manifest, such as `sizes` and `fps`.
    """

    family: str
    variant: str
    parts: Mapping[str, tuple[Path, ...]]
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])


Detector = Callable[[Sequence[Path]], DetectedModel | None]
"""The function `detect` of a family's module `detect`."""


def detect(paths: Sequence[Path]) -> DetectedModel | None:
    """Ask every family; None if none knows the files. Raises CheckpointError."""
    for family in FAMILIES:
        try:
            module = family_module(family, "detect")
        except ModuleNotFoundError as error:
            if error.name is None or not error.name.endswith(".detect"):
                raise
            continue
        detect_files: Detector | None = getattr(module, "detect", None)
        found = None if detect_files is None else detect_files(paths)
        if found is not None:
            return found
    return None
