"""LoRA files of other tools: which layouts there are, and what their tensors change.

Read are, for names of the original code and of diffusers alike (`models/lora_targets.py`): PEFT
(`X.lora_A.weight`), ComfyUI (`X.lora_down.weight`, `X.alpha`), kohya and musubi (the same with
`lora_unet_` and underscores) and whole differences (`X.diff`, `X.diff_b`, `X.diff_m`, `X.w_norm`,
`X.b_norm`). Every key must have a place in the network, or be one that may be left out.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skyloom.core.errors import CheckpointError
from skyloom.models.checkpoint import WeightRecipe
from skyloom.models.file_bytes import shown
from skyloom.models.lora import (
    LoraAdapter,
    LowRank,
    adaptable_layers,
    find_tensor,
    is_own_header,
    load_lora,
)
from skyloom.models.lora_targets import LoraTargets, find_targets
from skyloom.models.quantized import QuantizedLayer, dense
from skyloom.models.weight_files import WeightFiles, open_weights

_SUFFIXES = {
    "lora_A.weight": "down",
    "lora_A.default.weight": "down",
    "lora_down.weight": "down",
    "lora.down.weight": "down",
    "lora_B.weight": "up",
    "lora_B.default.weight": "up",
    "lora_up.weight": "up",
    "lora.up.weight": "up",
    "lora_B.bias": "up_bias",
    "lora_B.default.bias": "up_bias",
    "alpha": "alpha",
    "diff": "weight",
    "w_norm": "weight",
    "diff_b": "bias",
    "b_norm": "bias",
    "diff_m": "modulation",
}
_NOT_READ = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "LoCon with a Tucker decomposition",
    "oft_": "OFT",
    "set_weight": "a LoRA that replaces weights (set_weight)",
    "reshape_weight": "a LoRA for a changed network (reshape_weight)",
}
_PEFT_SETTINGS = "lora_adapter_metadata"  # in the header, written by diffusers
_SHOWN = 3
_OTHER_MODEL = "The LoRA was trained on another model."


def load_adapter(path: Path, network: nn.Module, *, family: str, base: str) -> LoraAdapter:
    """Read a LoRA file of skyloom or of another tool for a network of a family.

    base: digest of the model's weights, which files of skyloom name. Raises CheckpointError for
    damaged files and for those of another model.
    """
    with open_weights(path) as source:
        if not is_own_header(source.metadata):
            return read_adapter(path, source, network, find_targets(family, network))
    return load_lora(path, network, family=family, base=base)


def read_adapter(
    path: Path, source: WeightFiles, network: nn.Module, targets: LoraTargets
) -> LoraAdapter:
    """Read an open LoRA file of another tool. Raises CheckpointError.

    The scale of every low-rank change, `alpha / rank`, is part of its matrix `up`; without alpha it
    is 1. Low-rank changes of tensors that are one here are one with groups.
    """
    _refuse_other_kinds(path, source)
    reader = _Reader(path, source, network, targets)
    reader.sort()
    return reader.adapter()


@dataclass
class _Part:
    """What a file has for one stored tensor: keys by kind, and the layer's name in the file."""

    layer: str
    keys: dict[str, str] = field(default_factory=dict[str, str])


@dataclass
class _Reader:
    """Sorts the keys of a file by the tensors that they change, and reads them."""

    path: Path
    source: WeightFiles
    network: nn.Module
    targets: LoraTargets
    parts: dict[str, _Part] = field(default_factory=dict[str, _Part])
    skipped: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    def sort(self) -> None:
        """Find the place of every key. Raises CheckpointError for keys that have none."""
        layers: dict[str, dict[str, str]] = {}
        unknown: list[str] = []
        for key in self.source.shapes:
            layer, kind = _split(key)
            layers.setdefault(layer, {})[key] = kind
        for layer, keys in layers.items():
            reason = self._skip_reason(layer, keys)
            if reason is not None:
                self.skipped.setdefault(reason, []).extend(keys)
                continue
            for key, kind in keys.items():
                stored = self._stored_name(layer, kind)
                if stored is None:
                    unknown.append(key)
                else:
                    self._add(stored, layer, kind, key)
        if unknown:
            raise self._error(
                f"has {len(unknown)} of {len(self.source.shapes)} tensors for which "
                f"{type(self.network).__name__} has no place ({_some(unknown)})"
            )
        if not self.parts:
            raise self._error("changes nothing of this model")

    def adapter(self) -> LoraAdapter:
        """Read all tensors."""
        changes: dict[str, LowRank] = {}
        differences: dict[str, Tensor] = {}
        adaptable = {
            name
            for name in adaptable_layers(self.network)
            if getattr(self.network.get_submodule(name), "groups", 1) == 1
        }
        for name, recipe in self.targets.recipes.items():
            parts = [self.parts.get(stored) for stored in recipe.names]
            layer = name.removesuffix(".weight")
            matrices = [_with(part, ("down", "up", "alpha")) for part in parts]
            if any(matrices):
                if layer not in adaptable:
                    raise self._error(f"has matrices for {name}, which is no layer")
                changes[layer] = self._low_rank(name, recipe, matrices)
            whole = [_with(part, ("whole", "up_bias")) for part in parts]
            if any(whole):
                differences[name] = self._difference(name, recipe, whole)
        return LoraAdapter(changes, differences=differences, notices=self._notices())

    def _skip_reason(self, layer: str, keys: Iterable[str]) -> str | None:
        for skip in self.targets.skips:
            shapes = [self.source.shapes[key] for key in keys]
            fits = not skip.channels or any(shape[1:2] == (skip.channels,) for shape in shapes)
            if fits and re.search(skip.pattern, layer):
                return skip.reason
        return None

    def _stored_name(self, layer: str, kind: str) -> str | None:
        """Return the tensor that a key changes, in the layout of the recipes."""
        if kind == "modulation":
            layer += ".modulation"
        found = self.targets.find(layer)
        if found is None or kind not in _SUFFIXES.values():
            return None
        suffix = ".bias" if kind in ("bias", "up_bias") else ".weight"
        if found + suffix in self.targets.tensors:
            return found + suffix
        return found if found in self.targets.tensors and kind in ("weight", "modulation") else None

    def _add(self, stored: str, layer: str, kind: str, key: str) -> None:
        part = self.parts.setdefault(stored, _Part(layer))
        kind = "whole" if kind in ("weight", "bias", "modulation") else kind
        if kind in part.keys:
            raise self._error(f"has {shown(part.keys[kind])} and {shown(key)} for one tensor")
        part.keys[kind] = key

    def _low_rank(self, name: str, recipe: WeightRecipe, parts: Sequence[_Part | None]) -> LowRank:
        """Make the low-rank change of a layer, of which every part may have one."""
        rows, *inputs = self._shape(name)
        rows //= len(parts)
        factors = [part and self._factors(part, rows, math.prod(inputs)) for part in parts]
        rank = max(len(pair[0]) for pair in factors if pair)
        missing = (torch.zeros(0, math.prod(inputs)), torch.zeros(rows, 0))
        pairs = [pair or missing for pair in factors]
        down = torch.cat([F.pad(one, (0, 0, 0, rank - len(one))) for one, _ in pairs])
        up = dense(recipe.convert(*(F.pad(one, (0, rank - one.shape[1])) for _, one in pairs)))
        return LowRank(down.reshape(-1, *inputs), up, groups=len(parts))

    def _factors(self, part: _Part, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Read the matrices of a tensor, the second one scaled, and check their shapes."""
        for kind in ("down", "up"):
            if kind not in part.keys:
                found = next(iter(part.keys.values()))
                raise self._error(f"has {shown(found)}, but no matrix '{kind}' beside it")
        rank = (self.source.shapes[part.keys["down"]] or (0,))[0]
        self._check(part.keys["down"], (max(rank, 1), columns))
        self._check(part.keys["up"], (rows, rank))
        down = self._read(part.keys["down"]).flatten(1)
        up = self._read(part.keys["up"]).flatten(1)
        scale = self._scale(part, rank)
        return down, up if scale == 1 else up.float() * scale

    def _scale(self, part: _Part, rank: int) -> float:
        """Return alpha / rank; without an alpha 1, unless the header has PEFT's settings."""
        key = part.keys.get("alpha")
        if key is None:
            return self._peft.scale(part.layer, rank)
        if math.prod(self.source.shapes[key]) != 1:
            raise self._misshapen(key, (1,))
        alpha = float(self._read(key))
        if not math.isfinite(alpha):
            raise self._error(f"has the alpha {alpha} in {shown(key)}")
        return alpha / rank

    def _difference(self, name: str, recipe: WeightRecipe, parts: Sequence[_Part | None]) -> Tensor:
        """Make the difference of a tensor, of which parts may have none."""
        keys = [part and (part.keys.get("whole") or part.keys["up_bias"]) for part in parts]
        given = [key for key in keys if key]
        for key in given:
            self._check_difference(key, name, recipe)
        values = [self._read(key) if key else None for key in keys]
        for index, part in enumerate(parts):
            value = values[index]
            if part and value is not None and "whole" not in part.keys:
                values[index] = value * self._bias_scale(part)
        zeros = torch.zeros(self.source.shapes[given[0]])
        return dense(recipe.convert(*(zeros if value is None else value for value in values)))

    def _bias_scale(self, part: _Part) -> float:
        """Return the scale of the bias of a matrix `up`: that of the layer's matrices."""
        stored = self.targets.find(part.layer)
        matrices = self.parts.get(f"{stored}.weight")
        if matrices is None or "down" not in matrices.keys:
            raise self._error(f"has {shown(part.keys['up_bias'])}, but no matrices beside it")
        return self._scale(matrices, self.source.shapes[matrices.keys["down"]][0])

    def _check_difference(self, key: str, name: str, recipe: WeightRecipe) -> None:
        """Raise CheckpointError unless a difference makes the tensor's shape."""
        empty = torch.empty(self.source.shapes[key], device="meta")
        expected = self._shape(name)
        try:
            made = tuple(recipe.convert(*[empty] * len(recipe.names)).shape)
        except (RuntimeError, IndexError):
            made = ()
        if made != expected:
            count = len(recipe.names)
            raise self._misshapen(key, (expected[0] // count, *expected[1:]))

    def _check(self, key: str, expected: tuple[int, int]) -> None:
        """Raise CheckpointError unless a matrix, or a convolution like one, has a shape."""
        shape = self.source.shapes[key]
        rows = shape[0] if shape else 0
        if (rows, math.prod(shape[1:])) != expected:
            raise self._misshapen(key, expected)

    def _shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor of the network."""
        owner, attribute = find_tensor(self.network, name)
        if isinstance(owner, QuantizedLayer) and attribute == "weight":
            return owner.quantized.shape
        return tuple(getattr(owner, attribute).shape)

    def _read(self, key: str) -> Tensor:
        """Read a tensor, not as a part of the mapped file."""
        value = dense(self.source.read(key)).clone()
        if not value.is_floating_point():
            value = value.float()
        if not value.isfinite().all():
            raise self._error(f"has numbers that are not finite in {shown(key)}")
        return value

    @cached_property
    def _peft(self) -> "_PeftSettings":
        return _PeftSettings.of_header(self.path, self.source.metadata)

    def _notices(self) -> tuple[str, ...]:
        name = self.path.name
        notices = [
            f"{name}: {len(keys)} tensors are left out ({reason}): {_some(keys)}."
            for reason, keys in self.skipped.items()
        ]
        for pattern, sentence in self.targets.file_notices.items():
            if re.search(pattern, name, re.IGNORECASE):
                notices.append(f"{name}: {sentence}")
        return tuple(notices)

    def _misshapen(self, key: str, expected: tuple[int, ...]) -> CheckpointError:
        return CheckpointError(
            f"{shown(key)} of {self.path} must be {expected}, got {self.source.shapes[key]}.",
            hint=_OTHER_MODEL,
        )

    def _error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} {what}.", hint=_OTHER_MODEL)


@dataclass(frozen=True)
class _PeftSettings:
    """Alpha of layers without a tensor of it, as diffusers writes it into the header."""

    alpha: float | None = None
    alphas: Mapping[str, float] = field(default_factory=dict[str, float])
    by_root: bool = False

    @classmethod
    def of_header(cls, path: Path, metadata: Mapping[str, Any]) -> "_PeftSettings":
        """Read the settings, if there are any. Raises CheckpointError."""
        text = metadata.get(_PEFT_SETTINGS)
        if text is None:
            return cls()
        try:
            table: dict[str, Any] = json.loads(text)
            plain = {name.removeprefix("transformer."): value for name, value in table.items()}
            if plain.get("use_dora"):
                raise _not_read(path, "DoRA", _PEFT_SETTINGS)
            alpha = plain.get("lora_alpha")
            pattern: dict[str, Any] = plain.get("alpha_pattern") or {}
            alphas = {key: float(one) for key, one in pattern.items()}
            by_root = bool(plain.get("use_rslora"))
            return cls(None if alpha is None else float(alpha), alphas, by_root)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} has invalid settings in {_PEFT_SETTINGS}.") from error

    def scale(self, layer: str, rank: int) -> float:
        """Return the scale of a layer's change."""
        own = [alpha for name, alpha in self.alphas.items() if f".{layer}".endswith(f".{name}")]
        alpha = own[0] if own else self.alpha
        if alpha is None:
            return 1.0
        return alpha / (rank**0.5 if self.by_root else rank)


def _split(key: str) -> tuple[str, str]:
    """Divide a key into the layer's name and its kind of tensor, "" if it is of no known kind."""
    for suffix, kind in _SUFFIXES.items():
        if key.endswith(f".{suffix}"):
            return key.removesuffix(f".{suffix}"), kind
    return key, ""


def _with(part: _Part | None, kinds: Sequence[str]) -> _Part | None:
    """Return the keys of some kinds; None if there is none."""
    if part is None:
        return None
    keys = {kind: key for kind, key in part.keys.items() if kind in kinds}
    return _Part(part.layer, keys) if keys else None


def _refuse_other_kinds(path: Path, source: WeightFiles) -> None:
    for key in source.shapes:
        for marker, kind in _NOT_READ.items():
            if f".{marker}" in key:
                raise _not_read(path, kind, key)


def _not_read(path: Path, kind: str, key: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is {kind} ({shown(key)}), which is not read.",
        hint="Take a plain LoRA, or merge it into the model with the tool that made it.",
    )


def _some(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > _SHOWN else ""
    return ", ".join(shown(name) for name in sorted(names)[:_SHOWN]) + more
