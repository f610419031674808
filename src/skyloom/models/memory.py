"""Plan where the parts of a model lie so that every phase of a video fits in memory, without torch.

The peaks of text encoding, picture encoding, denoising and decoding are computed from the sizes of
the weights and of the request, for the device and for the host. Of all ways to place the parts, the
fastest one that fits is chosen; decoding in tiles, whose seams may be seen, comes last. Latent
frames are always decoded one at a time, and weights in 8 bits stay in 8 bits.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

from skyloom.core.errors import CapacityError

PartName = Literal["text_encoder", "autoencoder", "transformer"]
Phase = Literal["text", "encode", "denoise", "decode"]
Rung = Literal["resident", "swapped", "streamed", "host", "tiled"]

RUNGS: Mapping[PartName, Mapping[Rung, str]] = {
    "text_encoder": {
        "resident": "stays on the device",
        "swapped": "on the device while prompts are encoded, then freed",
        "streamed": "layer by layer from its files through the device",
        "host": "runs on the CPU",
    },
    "transformer": {
        "resident": "stays on the device",
        "swapped": "in host memory while another part runs",
        "streamed": "block by block from host memory, one ahead",
    },
    "autoencoder": {
        "resident": "stays on the device",
        "swapped": "in host memory while another part runs",
        "tiled": "as swapped, and decodes in tiles, whose seams may be seen",
    },
}
"""Ways to place each part, in words; the fastest first."""
PHASE_PARTS: Mapping[Phase, PartName] = {
    "text": "text_encoder",
    "encode": "autoencoder",
    "denoise": "transformer",
    "decode": "autoencoder",
}
SLAB_BYTES = 2**30
"""Size of a piece of pinned host memory that holds streamed blocks."""
WORKSPACE_BYTES = 512 * 2**20  # workspaces of kernels, and gaps in the allocator
HOST_BYTES = 2**30  # libraries of the device, frames on their way into the file
_DEQUANTIZED_BYTES = 2**26  # pieces in fp32 while a matrix is multiplied out
_HALF = 2  # bytes
_EIGHT_BITS = {"F8_E4M3": 1.0, "F8_E5M2": 1.0, "I8": 1.0, "Q8_0": 1.0 + 2 / 32}
"""Bytes per element of types that stay in 8 bits, scales per block included."""
_BLOCK = re.compile(r"(?:\w+\.)*?(?:blocks?|blk|layers)\.\d+\.")
# assumptions about speed, from which ways that fit are ranked
_DISK = 2e9  # bytes per second
_BUS = 1.2e10
_HOST_TEXT_SECONDS = 60.0
_NEW_PROMPTS = 0.1  # share of videos whose prompts are not in the cache of embeddings
_ON_DEVICE: tuple[Rung, ...] = ("resident",)


@dataclass(frozen=True)
class Weights:
    """Sizes of weights. elements: in the precision that computes; fixed_bytes: of all others.

    The others are matrices in 8 bits and layers that keep fp32.
    """

    elements: int = 0
    fixed_bytes: int = 0

    def bytes(self, itemsize: int) -> int:
        """Bytes with `itemsize` bytes per element."""
        return self.elements * itemsize + self.fixed_bytes

    def plus(self, other: "Weights") -> "Weights":
        """Return the sum of both."""
        return Weights(self.elements + other.elements, self.fixed_bytes + other.fixed_bytes)


@dataclass(frozen=True)
class PartMemory:
    """Weights of a part and of its largest block.

    dequantized: elements of the largest matrix in 8 bits, which is multiplied out when it is used.
    """

    weights: Weights
    block: Weights = field(default_factory=Weights)
    blocks: int = 0
    dequantized: int = 0

    def streamed(self, itemsize: int) -> int:
        """Bytes on the device when blocks are streamed: two of them, and what is in none."""
        rest = self.weights.bytes(itemsize) - self.blocks * self.block.bytes(itemsize)
        return max(0, rest) + 2 * self.block.bytes(itemsize)

    def pinned(self, itemsize: int) -> int:
        """Bytes of host memory for streamed blocks, in whole slabs.

        A matrix does not cross the border of a slab: at most an eighth of it stays empty.
        """
        size = math.ceil(self.blocks * self.block.bytes(itemsize) * 9 / 8)
        return math.ceil(size / SLAB_BYTES) * SLAB_BYTES

    def multiplied_out(self, itemsize: int) -> int:
        """Bytes while a matrix in 8 bits is used."""
        return self.dequantized * itemsize + _DEQUANTIZED_BYTES if self.dequantized else 0


def part_memory(
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
    *,
    in_fp32: Sequence[str] = (),
) -> PartMemory:
    """Add up the tensors of a part's files (`weight_files.WeightFiles`).

    in_fp32: beginnings of the names of tensors that compute in fp32 whatever the others do. Tensors
    of bytes, such as a tokenizer, are no weights.
    """
    whole = Weights()
    blocks: dict[str, Weights] = defaultdict(Weights)
    dequantized = 0
    for name, shape in shapes.items():
        if dtypes[name] == "U8":
            continue
        size = math.prod(shape)
        if dtypes[name] in _EIGHT_BITS:
            dequantized = max(dequantized, size)
            weights = Weights(fixed_bytes=math.ceil(size * _EIGHT_BITS[dtypes[name]]))
        elif name.startswith(tuple(in_fp32)):
            weights = Weights(fixed_bytes=4 * size)
        else:
            weights = Weights(size)
        whole = whole.plus(weights)
        block = _BLOCK.match(name)
        if block is not None:
            blocks[block[0]] = blocks[block[0]].plus(weights)
    largest = max(blocks.values(), key=lambda one: one.bytes(_HALF), default=Weights())
    return PartMemory(whole, largest, len(blocks), dequantized)


@dataclass(frozen=True)
class ModelMemory:
    """Memory that the parts of a model take; activations for 2 bytes per element.

    text_bytes: activations of the text encoder for the longest prompt. condition_bytes: keys and
    values of a prompt for all layers. token_bytes: activations of the transformer per token.
    cached_token_bytes: keys and values of a token in all layers of a KvCache. decode_bytes,
    encode_bytes: live bytes of the autoencoder per pixel of a frame; decoder_cache_bytes: those
    between two calls. encode_bytes are in fp32. tile_pixels: of a tile.
    """

    parts: Mapping[PartName, PartMemory]
    text_bytes: int
    condition_bytes: int
    token_bytes: int
    cached_token_bytes: int
    decode_bytes: int
    decoder_cache_bytes: int
    encode_bytes: int
    tile_pixels: int


@dataclass(frozen=True)
class Demand:
    """What a request needs. itemsize: bytes per element in which the model computes.

    pixels: of a frame. frames: of the video. tokens: of the largest window; cached_tokens: of a
    full KvCache, 0 without one. branches: 2 with guidance. parallel: branches that run at once.
    calls: of the transformer. pictures: whether frames are encoded.
    """

    pixels: int
    frames: int
    tokens: int
    cached_tokens: int
    branches: int
    parallel: int
    calls: int
    windows: int
    pictures: bool
    itemsize: int = _HALF


@dataclass(frozen=True)
class FreeMemory:
    """Free bytes; device: None if the model runs on the CPU, in host memory."""

    host: int
    device: int | None = None


@dataclass(frozen=True)
class MemoryPlan:
    """Where the parts lie, and the peak bytes of every phase. seconds: expected cost of moving."""

    rungs: Mapping[PartName, Rung]
    device: Mapping[Phase, int]
    host: Mapping[Phase, int]
    free: FreeMemory
    seconds: float

    @property
    def device_peak(self) -> int:
        """Largest number of bytes on the device; 0 on a CPU."""
        return max(self.device.values())

    @property
    def host_peak(self) -> int:
        """Largest number of bytes in host memory."""
        return max(self.host.values())

    @property
    def fits(self) -> bool:
        """Whether no phase needs more than is free."""
        return self.lacking == 0

    @property
    def lacking(self) -> int:
        """Bytes that are missing on device and host together."""
        device = 0 if self.free.device is None else self.device_peak - self.free.device
        return max(0, device) + max(0, self.host_peak - self.free.host)

    def check(self) -> None:
        """Raise CapacityError, with needed and free bytes, if it does not fit."""
        if self.fits:
            return
        free = self.free.device
        on_device = free is not None and self.device_peak > free
        where = "GPU" if on_device else "host"
        peaks = self.device if on_device else self.host
        phase = max(peaks, key=lambda one: peaks[one])
        have = free if on_device and free is not None else self.free.host
        raise CapacityError(
            f"Free {where} memory must be at least {gibibytes(peaks[phase])} "
            f"({PHASE_NAMES[phase]}), got {gibibytes(have)}.",
            hint=MEMORY_HINT,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: bytes, and whether it fits."""
        return {
            "rungs": dict(self.rungs),
            "device_bytes": dict(self.device),
            "host_bytes": dict(self.host),
            "free_device_bytes": self.free.device,
            "free_host_bytes": self.free.host,
            "fits": self.fits,
        }

    def describe(self) -> Iterator[str]:
        """Yield a line for each part and, for each memory, the largest peak."""
        if self.free.device is not None:
            for part, rung in self.rungs.items():
                yield f"{part.replace('_', ' ')}: {RUNGS[part][rung]}"
            yield f"GPU: {self._peak(self.device)}, {gibibytes(self.free.device)} free"
        yield f"host: {self._peak(self.host)}, {gibibytes(self.free.host)} free"

    @staticmethod
    def _peak(peaks: Mapping[Phase, int]) -> str:
        phase = max(peaks, key=lambda one: peaks[one])
        return f"{gibibytes(peaks[phase])} at most ({PHASE_NAMES[phase]})"


PHASE_NAMES: Mapping[Phase, str] = {
    "text": "text encoding",
    "encode": "picture encoding",
    "denoise": "denoising",
    "decode": "decoding",
}
MEMORY_HINT = (
    "Choose a smaller size or fewer frames, close other programs, or use weights in 8 bits "
    "(`skyloom models info NAME` lists the files of a model)."
)


class MemoryPlanner:
    """Plans of one request on one machine."""

    def __init__(self, memory: ModelMemory, demand: Demand, free: FreeMemory) -> None:
        self._memory = memory
        self._demand = demand
        self._free = free

    def choose(self) -> MemoryPlan:
        """Return the fastest plan that fits; if none does, the one that lacks least."""
        return min(self.plans(), key=lambda plan: (plan.lacking, *_preference(plan)))

    def step_down(self, plan: MemoryPlan, phase: Phase) -> MemoryPlan | None:
        """Return the next plan after memory ran out in a phase; None after the last one.

        It takes less memory of the device in the phase; tiles are not given up.
        """
        tiled = plan.rungs["autoencoder"] == "tiled"
        smaller = [
            other
            for other in self.plans()
            if other.device[phase] < plan.device[phase]
            and other.host_peak <= max(self._free.host, plan.host_peak)
            and (other.rungs["autoencoder"] == "tiled" or not tiled)
        ]
        return min(smaller, key=_preference, default=None)

    def plans(self) -> Iterator[MemoryPlan]:
        """Yield every way to place the parts."""
        on_cpu = self._free.device is None
        allowed: dict[PartName, tuple[Rung, ...]] = {
            "text_encoder": ("resident", "swapped", "streamed")
            if on_cpu
            else _rungs_of("text_encoder"),
            "transformer": _ON_DEVICE if on_cpu else _rungs_of("transformer"),
            "autoencoder": ("resident", "tiled") if on_cpu else _rungs_of("autoencoder"),
        }
        for text, transformer, autoencoder in product(*allowed.values()):
            yield self._plan(
                {"text_encoder": text, "transformer": transformer, "autoencoder": autoencoder}
            )

    def _plan(self, rungs: Mapping[PartName, Rung]) -> MemoryPlan:
        """Add up the peaks of a way to place the parts."""
        used: list[Phase] = ["text", "denoise", "decode"]
        if self._demand.pictures:
            used.insert(1, "encode")
        device: dict[Phase, int] = {one: self._device_bytes(rungs, one) for one in used}
        host: dict[Phase, int] = {one: self._host_bytes(rungs, one) for one in used}
        if self._free.device is None:
            for one in used:
                host[one] += device[one]
                device[one] = 0
        return MemoryPlan(rungs, device, host, self._free, self._seconds(rungs))

    def _device_bytes(self, rungs: Mapping[PartName, Rung], phase: Phase) -> int:
        weights = sum(self._weights(part, rung, phase) for part, rung in rungs.items())
        activations = self._activations(rungs, phase)
        return weights + activations + WORKSPACE_BYTES

    def _weights(self, part: PartName, rung: Rung, phase: Phase) -> int:
        """Bytes of a part's weights on the device during a phase."""
        memory = self._memory.parts[part]
        size = self._demand.itemsize
        if rung == "resident" or (rung in ("swapped", "tiled") and PHASE_PARTS[phase] == part):
            return memory.weights.bytes(size)
        if rung != "streamed":
            return 0
        if part == "text_encoder":  # a layer is read while the one before is still there
            return 2 * memory.block.bytes(size) if phase == "text" else 0
        return memory.streamed(size)

    def _activations(self, rungs: Mapping[PartName, Rung], phase: Phase) -> int:
        """Bytes on the device beside weights during a phase, with what is kept between phases."""
        memory = self._memory
        demand = self._demand
        scale = demand.itemsize / _HALF
        part = PHASE_PARTS[phase]
        multiplied = memory.parts[part].multiplied_out(demand.itemsize)
        if phase == "text":
            return 0 if rungs[part] == "host" else round(memory.text_bytes * scale) + multiplied
        if phase == "encode":
            return memory.encode_bytes * demand.pixels
        kept = demand.branches * (
            memory.condition_bytes + memory.cached_token_bytes * demand.cached_tokens
        )
        tiled = rungs["autoencoder"] == "tiled"
        cache = 0 if tiled else memory.decoder_cache_bytes * demand.pixels
        if phase == "denoise":
            run = demand.parallel * (memory.token_bytes * demand.tokens)
            waiting = cache if demand.windows > 1 else 0
            return round((kept + run + waiting) * scale) + demand.parallel * multiplied
        pixels = min(memory.tile_pixels, demand.pixels) if tiled else demand.pixels
        own_cache = memory.decoder_cache_bytes * pixels
        return round((kept + own_cache + memory.decode_bytes * pixels) * scale)

    def _host_bytes(self, rungs: Mapping[PartName, Rung], phase: Phase) -> int:
        """Bytes in host memory that a phase adds to the process."""
        if self._free.device is None:
            return 3 * self._demand.frames * self._demand.pixels
        memory = self._memory
        size = self._demand.itemsize
        total = HOST_BYTES + 3 * self._demand.frames * self._demand.pixels
        movable: tuple[PartName, ...] = ("transformer", "autoencoder")
        for part in movable:
            if rungs[part] in ("swapped", "tiled") and PHASE_PARTS[phase] != part:
                total += memory.parts[part].weights.bytes(size)
        if rungs["transformer"] == "streamed":
            total += memory.parts["transformer"].pinned(size)
        if rungs["text_encoder"] == "host" and phase == "text":
            text = memory.parts["text_encoder"]
            total += text.weights.bytes(size) + text.multiplied_out(size) + memory.text_bytes
        if rungs["autoencoder"] == "tiled" and phase == "decode":
            overlap = 2  # cells in two tiles and more
            total += overlap * memory.decoder_cache_bytes * self._demand.pixels
        return total

    def _seconds(self, rungs: Mapping[PartName, Rung]) -> float:
        """Estimate what moving the parts costs."""
        demand = self._demand
        sizes: dict[PartName, int] = {
            part: one.weights.bytes(demand.itemsize) for part, one in self._memory.parts.items()
        }
        read = sizes["text_encoder"] / _DISK
        text: Mapping[Rung, float] = {
            "resident": 0.0,
            "swapped": read,
            "streamed": 1.2 * read,
            "host": read + _HOST_TEXT_SECONDS,
        }
        seconds = _NEW_PROMPTS * text[rungs["text_encoder"]]
        if rungs["transformer"] == "streamed":
            seconds += demand.calls * sizes["transformer"] / _BUS
        elif rungs["transformer"] == "swapped":
            seconds += 2 * demand.windows * sizes["transformer"] / _BUS
        if rungs["autoencoder"] != "resident":
            seconds += 2 * demand.windows * sizes["autoencoder"] / _BUS
        return seconds


def _rungs_of(part: PartName) -> tuple[Rung, ...]:
    return tuple(RUNGS[part])


def _preference(plan: MemoryPlan) -> tuple[bool, float]:
    """Order of plans: without tiles first, then by speed."""
    return plan.rungs["autoencoder"] == "tiled", plan.seconds


def gibibytes(size: int) -> str:
    """Write a number of bytes."""
    return f"{size / 2**30:.1f} GiB"
