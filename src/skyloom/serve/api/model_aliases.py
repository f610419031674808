"""The names that clients ask for, and what a size and a length mean under them.

Clients of Sora ask for sora-2 at 720x1280 and cannot ask for less. Under such a mapped name the size becomes the
nearest that the model makes, and the answer says so; under a model's own name nothing is bent.
"""

from dataclasses import dataclass
from typing import Literal

from skyloom.generate.request import parse_size
from skyloom.models.registry import ModelInfo, find_model, list_models
from skyloom.serve.api.errors import invalid
from skyloom.serve.settings import Settings

SORA_SIZE, SORA_SECONDS = "720x1280", 4.0
MAX_EXTENSIONS, MAX_TOTAL_SECONDS = 6, 120


@dataclass(frozen=True)
class Named:
    """A model under the name that it was asked by; `mapped` if that is a name of the settings."""

    name: str
    info: ModelInfo
    mapped: bool
    sizes: Literal["nearest", "strict"] = "nearest"

    def asked_size(self, size: str | None) -> str:
        """What a call asks for, if it says nothing too."""
        return size or (SORA_SIZE if self.mapped else self.info.sizes[0])

    def made_size(self, asked: str) -> str:
        """The size to make: under a mapped name the one nearest in shape, then in pixels. Raises RequestError."""
        width, height = parse_size(asked)
        if not self.mapped or self.sizes == "strict" or min(width, height) < 1:
            return asked

        def distance(size: str) -> tuple[float, int]:
            wide, high = parse_size(size)
            return round(abs(wide / high - width / height), 3), abs(wide * high - width * height)

        return min(self.info.sizes, key=distance)

    def seconds(self, asked: float | None) -> float | None:
        """The length to make; None is the model's own."""
        return asked or (SORA_SECONDS if self.mapped else None)

    def check_extension(self, times: int, seconds: float) -> None:
        """Hold extensions to Sora's limits under a mapped name. Raises ApiError."""
        if self.mapped and times > MAX_EXTENSIONS:
            raise invalid(
                "video", f"A video can be extended {MAX_EXTENSIONS} times.", "too_many_extensions"
            )
        if self.mapped and seconds > MAX_TOTAL_SECONDS:
            message = (
                f"It would last {seconds:g} s; extended videos last {MAX_TOTAL_SECONDS} s at most."
            )
            raise invalid("seconds", message, "too_long")


def list_named(settings: Settings) -> dict[str, Named]:
    """Every name that can be asked for: the mapped ones first, then the installed ones."""
    installed = {model.name: model for model in list_models()}
    named = {
        name: Named(
            name, installed.get(base) or find_model(base), mapped=True, sizes=settings.sora_sizes
        )
        for name, base in settings.models.items()
    }
    return {
        **named,
        **{
            name: Named(name, info, mapped=False)
            for name, info in installed.items()
            if name not in named
        },
    }


def find_named(settings: Settings, name: str | None) -> Named:
    """A model by the name that a call asks for; the first of all if it asks for none. Raises ApiError."""
    names = list_named(settings)
    asked = name or next(iter(names))
    if asked not in names:
        raise invalid(
            "model",
            f"There is no model {asked!r:.100}. There is: {', '.join(names)}.",
            "model_not_found",
        )
    return names[asked]
