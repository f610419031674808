"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) of linear and convolution layers.

An adapter adds `alpha / rank * up(down(x))` to a layer's output. Several adapters with weights may
be attached at once; or they are merged into the layers' weights, which costs no time per call, and
unmerged, which restores the weights' bits.
"""

import json
from collections.abc import Iterable, Mapping
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

_DOWN = ".down"
_UP = ".up"
_HEADER = ("family", "base", "rank", "alpha")
Network = TypeVar("Network", bound=nn.Module)


class LowRank(nn.Module):
    """Low-rank change of one layer.

    down: `[rank inputs]` of a linear layer, `[rank inputs/groups kernel kernel]` of a convolution.
    up: `[outputs rank]`. In a grouped convolution every group has its own `rank` rows of `down`,
    so that `down` is `[groups*rank ...]` and `up` of a group reads its rows only.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int) -> None:
        super().__init__()
        weight = layer.weight
        self.groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        rows = rank * self.groups
        self.down = nn.Parameter(weight.new_empty(rows, *weight.shape[1:]))
        self.up = nn.Parameter(weight.new_zeros(len(weight), rank))
        if not weight.is_meta:
            nn.init.normal_(self.down, std=weight[0].numel() ** -0.5)

    def forward(self, x: Tensor, layer: nn.Linear | nn.Conv2d) -> Tensor:
        """Return the change of the layer's output, not scaled."""
        down = self.down.to(x.dtype)
        up = self.up.to(x.dtype)
        if isinstance(layer, nn.Linear):
            return F.linear(F.linear(x, down), up)
        narrow = F.conv2d(
            x,
            down,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=self.groups,
        )
        return F.conv2d(narrow, up[:, :, None, None], groups=self.groups)

    def delta(self) -> Tensor:
        """Return the change of the layer's weight, not scaled, in fp32."""
        up = rearrange(self.up.float(), "(g o) r -> g o r", g=self.groups)
        down = rearrange(self.down.float(), "(g r) ... -> g r (...)", g=self.groups)
        return rearrange(up @ down, "g o k -> (g o) k").reshape(-1, *self.down.shape[1:])


class LoraAdapter(nn.Module):
    """Low-rank changes of a network's layers, by the layers' names.

    family: name of the model family. base: digest of the weights of the model that it was trained
    on, as in receipts (generate/receipt.py).
    """

    def __init__(self, network: nn.Module, names: Iterable[str], rank: int, alpha: float) -> None:
        super().__init__()
        if rank < 1:
            raise RequestError(f"rank must be >= 1, got {rank}.", field="rank")
        self.rank = rank
        self.alpha = alpha
        self.family = ""
        self.base = ""
        self.names = tuple(names)
        self.changes = nn.ModuleList(LowRank(_layer(network, name), rank) for name in self.names)

    @property
    def scale(self) -> float:
        """Factor of every change."""
        return self.alpha / self.rank

    @property
    def by_name(self) -> dict[str, LowRank]:
        """The change of every layer."""
        pairs = zip(self.names, self.changes, strict=True)
        return {name: change for name, change in pairs if isinstance(change, LowRank)}


def adaptable_layers(network: nn.Module) -> list[str]:
    """Return the names of all linear and convolution layers with ordinary padding."""
    modules: Iterable[tuple[str, nn.Module]] = cast(Any, network).named_modules()
    return [name for name, module in modules if _is_adaptable(module)]


@dataclass
class LoraStack:
    """The adapters of one network: attached as hooks, or merged into its weights."""

    network: nn.Module
    _hooks: list[RemovableHandle] = field(default_factory=list[RemovableHandle])
    _originals: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def attach(self, adapters: Iterable[tuple[LoraAdapter, float]]) -> None:
        """Add adapters with weights to the layers' outputs; their parameters can be trained."""
        for adapter, weight in adapters:
            for name, change in adapter.by_name.items():
                hook = partial(_add_change, change, weight * adapter.scale)
                self._hooks.append(_layer(self.network, name).register_forward_hook(hook))

    def detach(self) -> None:
        """Remove all attached adapters."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @torch.no_grad()
    def merge(self, adapters: Iterable[tuple[LoraAdapter, float]]) -> None:
        """Add adapters with weights to the layers' weights; earlier merges stay.

        The original weights are kept on the CPU for `unmerge`.
        """
        sums: dict[str, Tensor] = {}
        for adapter, weight in adapters:
            for name, change in adapter.by_name.items():
                delta = change.delta() * (weight * adapter.scale)
                sums[name] = sums[name] + delta if name in sums else delta
        for name, delta in sums.items():
            target = _layer(self.network, name).weight
            self._originals.setdefault(name, target.detach().to("cpu", copy=True))
            target.copy_(target.float() + delta.to(target.device))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the weights from before the first merge, bit for bit."""
        for name, original in self._originals.items():
            _layer(self.network, name).weight.copy_(original)
        self._originals.clear()


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
        view = copy(module)
        copies[id(module)] = view
        view._forward_hooks = module._forward_hooks.copy()
        view._modules = {
            name: None if child is None else _shared_copy(child, copies)
            for name, child in module._modules.items()
        }
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
        adapter = LoraAdapter(network, layers, int(header["rank"]), float(header["alpha"]))
    except (RequestError, ValueError) as error:
        raise CheckpointError(f"{path} does not fit the network ({error}).") from error
    adapter.family = family
    adapter.base = base
    for name, change in adapter.by_name.items():
        _fill(change, tensors, name, path)
    return adapter


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


def _layer(network: nn.Module, name: str) -> nn.Linear | nn.Conv2d:
    """Return a layer by name. Raises RequestError if it does not exist or cannot be adapted."""
    try:
        layer = network.get_submodule(name)
    except AttributeError as error:
        raise RequestError(f"{name} is no layer of {type(network).__name__}.") from error
    if isinstance(layer, nn.Linear | nn.Conv2d) and _is_adaptable(layer):
        return layer
    raise RequestError(
        f"{name} must be a linear layer or a convolution with zero padding, "
        f"got {type(layer).__name__}."
    )


def _is_adaptable(layer: nn.Module) -> bool:
    zero_padded = not isinstance(layer, nn.Conv2d) or layer.padding_mode == "zeros"
    return isinstance(layer, nn.Linear | nn.Conv2d) and zero_padded


def _add_change(
    change: LowRank,
    scale: float,
    layer: nn.Linear | nn.Conv2d,
    inputs: tuple[Tensor, ...],
    output: Tensor,
) -> Tensor:
    """Forward hook: add an adapter's scaled change to a layer's output."""
    return output + scale * change(inputs[0], layer).to(output.dtype)
