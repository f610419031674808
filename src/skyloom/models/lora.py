"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) of linear and convolution layers.

An adapter adds `alpha / rank * up(down(x))` to a layer's output. Several adapters with weights may
be attached at once; or they are merged into the layers' weights, which costs no time per call, and
unmerged, which restores the weights' bits. Files of other tools: `models/lora_files.py`.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from skyloom.core.errors import CheckpointError, RequestError
from skyloom.core.files import atomic_path
from skyloom.models.quantized import QuantizedLinear

_DOWN = ".down"
_UP = ".up"
_WEIGHT = "weight"
_HEADER = ("family", "base", "rank", "alpha")
Layer = nn.Linear | nn.Conv2d | QuantizedLinear
Network = TypeVar("Network", bound=nn.Module)


class LowRank(nn.Module):
    """Low-rank change of one layer.

    down: `[rank inputs]` of a linear layer, `[rank inputs/groups kernel kernel]` of a convolution.
    up: `[outputs rank]`. In a grouped convolution every group has its own `rank` rows of `down`,
    so that `down` is `[groups*rank ...]` and `up` of a group reads its rows only. Likewise in a
    linear layer that is several joined along its outputs, such as query, key and value.
    """

    def __init__(self, down: Tensor, up: Tensor, groups: int = 1) -> None:
        super().__init__()
        self.groups = groups
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(up)

    @classmethod
    def start(cls, layer: Layer, rank: int) -> "LowRank":
        """Make a change to be trained, without effect at first."""
        shape = _weight_shape(layer)
        groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        like = layer.scale if isinstance(layer, QuantizedLinear) else layer.weight
        down = like.new_empty(rank * groups, *shape[1:])
        if not down.is_meta:
            nn.init.normal_(down, std=math.prod(shape[1:]) ** -0.5)
        return cls(down, like.new_zeros(shape[0], rank), groups)

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """Return the change of the layer's output, not scaled."""
        down = self.down.to(x.dtype)
        up = self.up.to(x.dtype)
        if isinstance(layer, nn.Conv2d):
            narrow = F.conv2d(
                x,
                down,
                stride=layer.stride,
                padding=layer.padding,
                dilation=layer.dilation,
                groups=self.groups,
            )
            return F.conv2d(narrow, up[:, :, None, None], groups=self.groups)
        narrow = F.linear(x, down)
        if self.groups == 1:
            return F.linear(narrow, up)
        parts = zip(narrow.chunk(self.groups, dim=-1), up.chunk(self.groups), strict=True)
        return torch.cat([F.linear(part, rows) for part, rows in parts], dim=-1)

    def delta(self) -> Tensor:
        """Return the change of the layer's weight, not scaled, in fp32."""
        up = rearrange(self.up.float(), "(g o) r -> g o r", g=self.groups)
        down = rearrange(self.down.float(), "(g r) ... -> g r (...)", g=self.groups)
        return rearrange(up @ down, "g o k -> (g o) k").reshape(-1, *self.down.shape[1:])


class LoraAdapter(nn.Module):
    """Changes of a network: low-rank ones by the layers' names, whole ones by tensors' names.

    family: name of the model family. base: digest of the weights of the model that it was trained
    on, as in receipts (generate/receipt.py). notices: sentences for the user about its file.
    """

    def __init__(
        self,
        changes: Mapping[str, LowRank],
        *,
        rank: int = 1,
        alpha: float = 1.0,
        differences: Mapping[str, Tensor] | None = None,
        notices: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.rank = rank
        self.alpha = alpha
        self.family = ""
        self.base = ""
        self.notices = tuple(notices)
        self.names = tuple(changes)
        self.changes = nn.ModuleList(changes.values())
        self._whole_names = tuple(differences or ())
        whole = (differences or {}).values()
        self._whole = nn.ParameterList([nn.Parameter(one, requires_grad=False) for one in whole])

    @classmethod
    def start(
        cls, network: nn.Module, names: Iterable[str], rank: int, alpha: float
    ) -> "LoraAdapter":
        """Make an adapter to be trained. Raises RequestError for what is no adaptable layer."""
        if rank < 1:
            raise RequestError(f"rank must be >= 1, got {rank}.", field="rank")
        changes = {name: LowRank.start(_layer(network, name), rank) for name in names}
        return cls(changes, rank=rank, alpha=alpha)

    @property
    def scale(self) -> float:
        """Factor of every low-rank change."""
        return self.alpha / self.rank

    @property
    def by_name(self) -> dict[str, LowRank]:
        """The low-rank change of every layer."""
        pairs = zip(self.names, self.changes, strict=True)
        return {name: change for name, change in pairs if isinstance(change, LowRank)}

    @property
    def differences(self) -> dict[str, Tensor]:
        """The differences of whole tensors, such as biases and norms, by name."""
        return dict(zip(self._whole_names, self._whole, strict=True))

    def place(self, network: nn.Module, device: torch.device) -> "LoraAdapter":
        """Move to a device for inference; matrices get the precision of their layers."""
        self.to(device)
        for name, change in self.by_name.items():
            layer = _layer(network, name)
            change.to(layer.dtype if isinstance(layer, QuantizedLinear) else layer.weight.dtype)
        return self


def adaptable_layers(network: nn.Module) -> list[str]:
    """Return the names of all linear and convolution layers with ordinary padding."""
    modules: Iterable[tuple[str, nn.Module]] = cast(Any, network).named_modules()
    return [name for name, module in modules if _is_adaptable(module)]


@dataclass
class LoraStack:
    """The adapters of one network: attached, or merged into its weights.

    Attached ones cost time in every call and no memory but their own; merged ones cost no time and
    a copy of the changed weights. Quantized matrices are never changed: their adapters are attached
    in both cases.
    """

    network: nn.Module
    _hooks: list[RemovableHandle] = field(default_factory=list[RemovableHandle])
    _replaced: dict[str, nn.Parameter] = field(default_factory=dict[str, nn.Parameter])
    _originals: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def attach(self, adapters: Iterable[tuple[LoraAdapter, float]]) -> None:
        """Add adapters with weights to the layers' outputs; their matrices can be trained.

        Tensors of which an adapter has whole differences are replaced by changed copies.
        """
        sums: dict[str, Tensor] = {}
        for adapter, weight in adapters:
            for name, change in adapter.by_name.items():
                self._hook(name, partial(_add_change, change, weight * adapter.scale))
            for name, difference in adapter.differences.items():
                sums[name] = sums.get(name, 0) + weight * difference.float()
        for name, difference in sums.items():
            self._replace(name, difference)

    def detach(self) -> None:
        """Remove all attached adapters; replaced tensors come back as they were."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for name, original in self._replaced.items():
            _set_parameter(self.network, name, original)
        self._replaced.clear()

    @torch.no_grad()
    def merge(self, adapters: Iterable[tuple[LoraAdapter, float]]) -> None:
        """Add adapters with weights to the network's weights, in fp32, rounded once.

        Earlier merges stay. The original weights are kept on the CPU for `unmerge`; weights are
        changed one after another, where they are.
        """
        pairs = list(adapters)
        names = [name for adapter, _ in pairs for name in _changed_tensors(adapter)]
        for name in dict.fromkeys(names):
            owner, attribute = find_tensor(self.network, name)
            if isinstance(owner, QuantizedLinear) and attribute == _WEIGHT:
                self.attach((_only(adapter, name), weight) for adapter, weight in pairs)
                continue
            target: Tensor = getattr(owner, attribute)
            total = _sum_changes(pairs, name, target.device)
            self._originals.setdefault(name, target.detach().to("cpu", copy=True))
            target.copy_(target.float() + total)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the weights from before the first merge, bit for bit; detach all adapters."""
        self.detach()
        for name, original in self._originals.items():
            owner, attribute = find_tensor(self.network, name)
            getattr(owner, attribute).copy_(original)
        self._originals.clear()

    def _hook(self, layer: str, hook: Callable[..., Tensor]) -> None:
        self._hooks.append(_layer(self.network, layer).register_forward_hook(hook))

    @torch.no_grad()
    def _replace(self, name: str, difference: Tensor) -> None:
        """Add the difference of a tensor: to a copy, or to the output of a quantized layer."""
        owner, attribute = find_tensor(self.network, name)
        if isinstance(owner, QuantizedLinear) and attribute == _WEIGHT:
            self._hook(name.removesuffix(f".{_WEIGHT}"), partial(_add_difference, difference))
            return
        original: nn.Parameter = getattr(owner, attribute)
        self._replaced.setdefault(name, original)
        changed = (original.to(difference.device).float() + difference).to(original.dtype)
        _set_parameter(self.network, name, nn.Parameter(changed, requires_grad=False))


def with_adapters(network: Network, adapters: Iterable[tuple[LoraAdapter, float]]) -> Network:
    """Return a network with adapters attached that shares all weights with `network`.

    The given network stays as it is, so that both can be used in turn or at the same time.
    """
    view = _shared_copy(network, {})
    LoraStack(view).attach(adapters)
    return view


def _shared_copy(module: Network, copies: dict[int, nn.Module]) -> Network:
    """Copy the tree of modules; parameters and buffers are shared, also after `Module.to`."""
    if id(module) not in copies:
        view = copy(module)  # its tables of parameters and buffers are those of the original
        copies[id(module)] = view
        children: Mapping[str, nn.Module | None] = vars(module)["_modules"]
        vars(view).update(
            _forward_hooks=vars(module)["_forward_hooks"].copy(),
            _modules={
                name: None if child is None else _shared_copy(child, copies)
                for name, child in children.items()
            },
        )
    return cast("Network", copies[id(module)])


def save_lora(path: Path, adapter: LoraAdapter) -> None:
    """Write an adapter as safetensors; the header names family, base weights, rank and alpha."""
    tensors: dict[str, Tensor] = {}
    for name, change in adapter.by_name.items():
        tensors[name + _DOWN] = change.down.detach().cpu().contiguous()
        tensors[name + _UP] = change.up.detach().cpu().contiguous()
    values = (adapter.family, adapter.base, str(adapter.rank), json.dumps(adapter.alpha))
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=dict(zip(_HEADER, values, strict=True)))


def load_lora(path: Path, network: nn.Module, *, family: str, base: str) -> LoraAdapter:
    """Read an adapter for a network.

    Raises CheckpointError for a damaged file, another family or other base weights, and for layers
    or shapes that the network does not have.
    """
    header, tensors = _read(path)
    for name, expected in (("family", family), ("base", base)):
        if header[name] != expected:
            raise CheckpointError(
                f"{name} of {path} must be {expected:.16}, got {header[name]:.16}.",
                hint="The adapter was trained on another model.",
            )
    layers = sorted({name.removesuffix(_UP if name.endswith(_UP) else _DOWN) for name in tensors})
    try:
        adapter = LoraAdapter.start(network, layers, int(header["rank"]), float(header["alpha"]))
    except (RequestError, ValueError) as error:
        raise CheckpointError(f"{path} does not fit the network ({error}).") from error
    adapter.family = family
    adapter.base = base
    for name, change in adapter.by_name.items():
        _fill(change, tensors, name, path)
    return adapter


def is_own_header(metadata: Mapping[str, object]) -> bool:
    """Whether a file's header is that of `save_lora`."""
    return "family" in metadata and "base" in metadata


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with cast(Any, safe_open(path, framework="pt")) as file:
            header: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged ({error}).") from error
    missing = [name for name in _HEADER if name not in header]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)} in its header.")
    return header, tensors


@torch.no_grad()
def _fill(change: LowRank, tensors: Mapping[str, Tensor], name: str, path: Path) -> None:
    """Copy the tensors of a layer, strictly."""
    for suffix, parameter in ((_DOWN, change.down), (_UP, change.up)):
        value = tensors.get(name + suffix)
        if value is None or value.shape != parameter.shape:
            found = "none" if value is None else tuple(value.shape)
            raise CheckpointError(
                f"{name + suffix} of {path} must be {tuple(parameter.shape)}, got {found}."
            )
        parameter.copy_(value)


def find_tensor(network: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that has a tensor, and its name there. Raises AttributeError."""
    prefix, _, attribute = name.rpartition(".")
    return network.get_submodule(prefix), attribute


def _set_parameter(network: nn.Module, name: str, value: nn.Parameter) -> None:
    """Set a parameter of this network alone: modules of `with_adapters` share their tables."""
    owner, attribute = find_tensor(network, name)
    own = vars(owner)
    own["_parameters"] = {**own["_parameters"], attribute: value}


def _changed_tensors(adapter: LoraAdapter) -> list[str]:
    return [f"{name}.{_WEIGHT}" for name in adapter.names] + list(adapter.differences)


def _only(adapter: LoraAdapter, name: str) -> LoraAdapter:
    """The part of an adapter that changes one tensor."""
    changes = {k: v for k, v in adapter.by_name.items() if f"{k}.{_WEIGHT}" == name}
    whole = {k: v for k, v in adapter.differences.items() if k == name}
    return LoraAdapter(changes, rank=adapter.rank, alpha=adapter.alpha, differences=whole)


def _sum_changes(
    pairs: Iterable[tuple[LoraAdapter, float]], name: str, device: torch.device
) -> Tensor:
    """Return the sum of the weighted changes of a tensor, in fp32."""
    total = torch.zeros((), device=device)
    for adapter, weight in pairs:
        change = adapter.by_name.get(name.removesuffix(f".{_WEIGHT}"))
        if change is not None:
            total = total + (weight * adapter.scale) * change.delta().to(device)
        difference = adapter.differences.get(name)
        if difference is not None:
            total = total + weight * difference.float().to(device)
    return total


def _layer(network: nn.Module, name: str) -> Layer:
    """Return a layer by name. Raises RequestError if it does not exist or cannot be adapted."""
    try:
        layer = network.get_submodule(name)
    except AttributeError as error:
        raise RequestError(f"{name} is no layer of {type(network).__name__}.") from error
    if isinstance(layer, Layer) and _is_adaptable(layer):
        return layer
    raise RequestError(
        f"{name} must be a linear layer or a convolution with zero padding, "
        f"got {type(layer).__name__}."
    )


def _is_adaptable(layer: nn.Module) -> bool:
    zero_padded = not isinstance(layer, nn.Conv2d) or layer.padding_mode == "zeros"
    return isinstance(layer, Layer) and zero_padded


def _weight_shape(layer: Layer) -> tuple[int, ...]:
    quantized = isinstance(layer, QuantizedLinear)
    return layer.quantized.shape if quantized else tuple(layer.weight.shape)


def _add_change(
    change: LowRank, scale: float, layer: Layer, inputs: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    """Forward hook: add an adapter's scaled change to a layer's output."""
    return torch.add(output, change(inputs[0], layer).to(output.dtype), alpha=scale)


def _add_difference(
    difference: Tensor, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    """Forward hook: add the effect of a weight's difference to a linear layer's output."""
    return output + F.linear(inputs[0], difference.to(inputs[0].dtype)).to(output.dtype)
