"""Peak bytes of the tensors that a call makes, at real sizes and without memory, on `meta`.

Every storage that an operation makes is counted until it is freed. Attention counts as a fused
kernel, which keeps no scores; workspaces of other kernels are not seen.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class _Tracker(TorchDispatchMode):
    """Counts live storages that are made while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, Any] = {}

    def watch(self, value: Any) -> None:
        """Ignore the storages of tensors that existed before."""
        for tensor in _tensors(value):
            storage = tensor.untyped_storage()
            self._known.setdefault(storage._cdata, storage)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.watch(args)
        self.watch(kwargs or {})
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            out = _channels_last(out)
        for tensor in _tensors(out):
            self._count(tensor)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = None
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.live -= size
        del self._known[key]


def _tensors(value: Any) -> list[Tensor]:
    return [one for one in tree_flatten(value)[0] if isinstance(one, Tensor)]


def _channels_last(out: Tensor) -> Tensor:
    """Have channels last, as kernels of devices do for such inputs; `meta` loses the strides."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return torch.empty_like(out, memory_format=formats[out.ndim])


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Have attention make its result only."""
    before = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda query, key, value, **_: torch.empty_like(query)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before


@torch.no_grad()
def peak_bytes(call: Callable[[], object]) -> int:
    """Run a call on tensors on `meta` and return the peak of bytes that it made."""
    tracker = _Tracker()
    with _fused_attention(), tracker:
        result = call()
    del result
    return tracker.peak
