"""Stream the blocks of a network through a device: their weights lie in host memory.

Two buffers on the device take turns: while a block runs in one, the next block is copied into the
other, on a stream of its own on CUDA, where the host memory is pinned. After the last block follows
the first one, for the next call. The bits are those of a resident network.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from skyloom.models.memory import SLAB_BYTES

_ALIGNMENT = 256  # bytes
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class _Weight:
    """A parameter or buffer of a block, its weights in host memory, its place in a buffer."""

    owner: Tensor
    host: Tensor
    offset: int

    def view(self, buffer: Tensor) -> Tensor:
        """Return the part of a buffer in bytes that takes the weight, with its shape and strides.

        The weight is dense: it covers as many bytes as it has.
        """
        size = self.host.numel() * self.host.element_size()
        values = buffer[self.offset : self.offset + size].view(self.host.dtype)
        return values.as_strided(self.host.shape, self.host.stride())


class _Slot:
    """A buffer on the device, the number of the block in it, and events on CUDA."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self.block: int | None = None
        self.copied: torch.Event | None = None
        self.used: torch.Event | None = None


class BlockStreamer(Generic[M]):
    """Iterates over the blocks of a network; the weights of the current one are on the device.

    One pass at a time: a pass that was not finished is given up when the next one begins. Weights
    must not be replaced or changed meanwhile. `close` ends it: they are in pageable host memory.
    """

    def __init__(self, blocks: Sequence[M], device: torch.device) -> None:
        self._blocks = tuple(blocks)
        self._device = device
        self._on_cuda = device.type == "cuda"
        with torch.no_grad():
            self._weights = _in_host_memory(self._blocks, pinned=self._on_cuda)
        size = max(_size(weights) for weights in self._weights)
        self._slots = (_Slot(size, device), _Slot(size, device))
        self._copies = torch.cuda.Stream(device) if self._on_cuda else None
        if self._copies is not None:  # what ran in the memory of the buffers before has to end
            self._copies.wait_stream(torch.cuda.current_stream(device))
        self._current: int | None = None

    @property
    def device(self) -> torch.device:
        """Where the blocks run."""
        return self._device

    @property
    def device_bytes(self) -> int:
        """Bytes of both buffers."""
        return sum(slot.buffer.numel() for slot in self._slots)

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[M]:
        return self._run()

    def close(self) -> None:
        """Give the blocks weights in pageable host memory, and free the buffers."""
        self._leave()
        if self._copies is not None:
            self._copies.synchronize()
        for slot in self._slots:
            slot.buffer = torch.empty(0, dtype=torch.uint8, device=self._device)
            slot.block = None
        if self._on_cuda:
            for weight in _all(self._weights):
                weight.owner.data = _clone(weight.host)
        self._weights = ()

    @torch.no_grad()
    def _run(self) -> Generator[M]:
        self._leave()
        for index, block in enumerate(self._blocks):
            slot = self._fetch(index, None)
            following = (index + 1) % len(self._blocks)
            if following != index:
                self._fetch(following, slot)
            if slot.copied is not None:
                torch.cuda.current_stream(self._device).wait_event(slot.copied)
            for weight in self._weights[index]:
                weight.owner.data = weight.view(slot.buffer)
            self._current = index
            yield block
            self._leave()

    def _fetch(self, index: int, busy: _Slot | None) -> _Slot:
        """Copy a block into a buffer that is not `busy`, unless it is in one."""
        for slot in self._slots:
            if slot.block == index:
                return slot
        slot = next(slot for slot in self._slots if slot is not busy)
        slot.block = index
        if self._copies is None:
            self._copy(index, slot)
            return slot
        if slot.used is not None:
            self._copies.wait_event(slot.used)
        with torch.cuda.stream(self._copies):
            self._copy(index, slot)
            slot.copied = self._copies.record_event()
        return slot

    def _copy(self, index: int, slot: _Slot) -> None:
        for weight in self._weights[index]:
            weight.view(slot.buffer).copy_(weight.host, non_blocking=True)

    def _leave(self) -> None:
        """Point the block that ran last at its host memory; its buffer may be overwritten."""
        if self._current is None:
            return
        for weight in self._weights[self._current]:
            weight.owner.data = weight.host
        if self._on_cuda:
            slot = next(slot for slot in self._slots if slot.block == self._current)
            slot.used = torch.cuda.current_stream(self._device).record_event()
        self._current = None


def _in_host_memory(
    blocks: Iterable[nn.Module], *, pinned: bool
) -> tuple[tuple[_Weight, ...], ...]:
    """Lay the weights of blocks out in host memory, pinned in slabs.

    Slabs, because the allocator of pinned memory rounds every size up to a power of two.
    """
    laid: list[tuple[_Weight, ...]] = []
    slab = torch.empty(0, dtype=torch.uint8)
    taken = 0
    for block in blocks:
        weights: list[_Weight] = []
        offset = 0
        for owner in (*block.parameters(), *block.buffers()):
            dense = owner.data if _is_dense(owner) else owner.data.contiguous()
            size = _aligned(dense.numel() * dense.element_size())
            if pinned and taken + size > slab.numel():
                length = max(size, SLAB_BYTES)
                slab = torch.empty(length, dtype=torch.uint8, pin_memory=True)
                taken = 0
            host = dense.to("cpu")
            if pinned:
                host = _Weight(owner, dense, taken).view(slab).copy_(dense)
                taken += size
            owner.data = host
            weights.append(_Weight(owner, host, offset))
            offset += size
        laid.append(tuple(weights))
    return tuple(laid)


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor covers its bytes without gaps and overlaps, in any order of axes."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def _clone(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor)


def _all(weights: Iterable[Iterable[_Weight]]) -> Iterator[_Weight]:
    return (one for block in weights for one in block)


def _size(weights: Sequence[_Weight]) -> int:
    last = weights[-1]
    return last.offset + _aligned(last.host.numel() * last.host.element_size())


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
