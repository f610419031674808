"""Model names of the API, and the sizes and lengths that they imply.

Clients of Sora request sora-2 at 720x1280 and cannot request a smaller size. An alias of the
settings therefore maps a size to the nearest one that its model supports, and the response has a
notice. Installed names map nothing.
"""

from dataclasses import dataclass
from typing import Literal

from skyloom.generate.request import parse_size
from skyloom.models.registry import ModelInfo, find_model, list_models
from skyloom.serve.api.errors import invalid
from skyloom.serve.settings import Settings

SORA_SIZE = "720x1280"
SORA_SECONDS = 4.0
MAX_EXTENSIONS = 6
MAX_TOTAL_SECONDS = 120


@dataclass(frozen=True)
class ModelAlias:
    """A model under one of its names; `mapped` for a name of the settings, as sora-2."""

    name: str
    info: ModelInfo
    mapped: bool
    sizes: Literal["nearest", "strict"] = "nearest"

    def requested_size(self, size: str | None) -> str:
        """Return the size of a request, or the default of this name."""
        return size or (SORA_SIZE if self.mapped else self.info.default_size)

    def output_size(self, requested: str) -> str:
        """Return the size to generate.

        For a mapped name it is the nearest supported size. Raises RequestError for a malformed
        size.
        """
        width, height = parse_size(requested)
        if not self.mapped or self.sizes == "strict" or min(width, height) < 1:
            return requested
        return self.nearest_size(requested)

    def nearest_size(self, size: str) -> str:
        """Return the model's size nearest to another one, as that of an edit's source."""
        width, height = self.info.size_rule.nearest(*parse_size(size))
        return f"{width}x{height}"

    def output_seconds(self, requested: float | None) -> float | None:
        """Return the length to generate; None is the model's default."""
        return requested or (SORA_SECONDS if self.mapped else None)

    def check_extension(self, extensions: int, seconds: float) -> None:
        """Enforce Sora's limits on extended videos for a mapped name. Raises ApiError.

        `extensions` and `seconds` are the totals after the extension.
        """
        if self.mapped and extensions > MAX_EXTENSIONS:
            message = f"A video can be extended at most {MAX_EXTENSIONS} times."
            raise invalid("video", message, "too_many_extensions")
        if self.mapped and seconds > MAX_TOTAL_SECONDS:
            limit = f"<= {MAX_TOTAL_SECONDS} seconds in total"
            message = f"An extended video must be {limit}, got {seconds:g}."
            raise invalid("seconds", message, "too_long")


def list_model_aliases(settings: Settings) -> dict[str, ModelAlias]:
    """Return all available names: first those of the settings, then the installed models."""
    installed = {model.name: model for model in list_models()}
    mapped = {
        name: ModelAlias(
            name, installed.get(base) or find_model(base), mapped=True, sizes=settings.sora_sizes
        )
        for name, base in settings.models.items()
    }
    own_names = {
        name: ModelAlias(name, info, mapped=False)
        for name, info in installed.items()
        if name not in mapped
    }
    return {**mapped, **own_names}


def find_model_alias(settings: Settings, name: str | None) -> ModelAlias:
    """Look up a model by name; None is the first of `list_model_aliases`. Raises ApiError."""
    aliases = list_model_aliases(settings)
    name = name or next(iter(aliases))
    if name not in aliases:
        message = f"model must be one of {', '.join(aliases)}, got {name!r:.100}."
        raise invalid("model", message, "model_not_found")
    return aliases[name]
