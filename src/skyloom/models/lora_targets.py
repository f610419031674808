"""Names under which LoRA files know the tensors of a network. Families give theirs in `lora`.

Files name layers as in the original code or as in diffusers, with a prefix of the tool that wrote
them, and some tools write underscores for points.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

from torch import Tensor, nn

from skyloom.models.checkpoint import WeightRecipe
from skyloom.models.lora import adaptable_layers
from skyloom.models.registry import family_module

_PREFIXES = (
    *("", "transformer.", "diffusion_model.", "model.diffusion_model.", "base_model.model."),
    "base_model.model.diffusion_model.",
)
_UNDERSCORE_PREFIXES = ("lora_unet_", "lora_unet__", "lora_transformer_", "lycoris_")


@dataclass(frozen=True)
class LoraSkip:
    """Layers that files of a related model have and this one lacks; they are left out.

    pattern: of their names, as a regular expression. reason: what they are. channels: only those
    whose tensors have this number of input channels; 0 for any.
    """

    pattern: str
    reason: str
    channels: int = 0


@dataclass(frozen=True)
class LoraTargets:
    """Names under which LoRA files of a family know the tensors of a network.

    recipes: how the network's tensors are made of those of another layout. aliases: names of layers
    and tensors in further layouts, with those of the recipes, without ".weight" and ".bias". skips:
    what may be left out. file_notices: sentences for the user, by a pattern of the file's name.
    """

    recipes: Mapping[str, WeightRecipe]
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    skips: Sequence[LoraSkip] = ()
    file_notices: Mapping[str, str] = field(default_factory=dict[str, str])

    @classmethod
    def of_own_names(cls, network: nn.Module) -> "LoraTargets":
        """The targets of a network whose LoRA files use its own names."""
        names = [name for name, _ in cast(Any, network).named_parameters()]
        names += [f"{name}.weight" for name in adaptable_layers(network)]
        return cls({name: WeightRecipe((name,), _same) for name in names})

    @cached_property
    def tensors(self) -> frozenset[str]:
        """Names of all tensors in the layout of the recipes."""
        return frozenset(name for recipe in self.recipes.values() for name in recipe.names)

    @cached_property
    def _modules(self) -> dict[str, str]:
        """Names in any layout by themselves and with underscores for points."""
        known = {name: name for name in self.tensors}
        known |= {name.rpartition(".")[0]: name.rpartition(".")[0] for name in self.tensors}
        return known | dict(self.aliases)

    @cached_property
    def _underscored(self) -> dict[str, str]:
        return {name.replace(".", "_"): stored for name, stored in self._modules.items()}

    def find(self, name: str) -> str | None:
        """Return a layer's name in the layout of the recipes; None if there is none."""
        for prefix in _PREFIXES:
            found = self._modules.get(name.removeprefix(prefix))
            if name.startswith(prefix) and found is not None:
                return found
        for prefix in _UNDERSCORE_PREFIXES:
            found = self._underscored.get(name.removeprefix(prefix))
            if name.startswith(prefix) and found is not None:
                return found
        return None


def find_targets(family: str, network: nn.Module) -> LoraTargets:
    """Return the names of a family's LoRA files: of its module `lora`, else the network's own."""
    try:
        module = family_module(family, "lora")
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.endswith(".lora"):
            raise
        return LoraTargets.of_own_names(network)
    targets: LoraTargets = module.lora_targets(network)
    return targets


def _same(weight: Tensor) -> Tensor:
    return weight
