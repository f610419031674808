"""Weights kept in 8 bits, and the layers that dequantize them at every call.

A matrix is stored as int8 or fp8 codes and scales; a layer holds both and multiplies them out in
fp32 when it is called, which is exact to the file. Codes may be those of a rotated matrix, as in
ConvRot: the columns are multiplied in groups by a Hadamard matrix, which spreads outliers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

_CHUNK = 2**22  # elements dequantized at once: bounds the temporary tensors in fp32
_HADAMARD_4 = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))


@dataclass(frozen=True)
class QuantizedWeight:
    """Matrix in 8 bits: the value is `codes * scale`, then rotated back if `rotation` is set.

    codes: int8 or fp8 `[rows columns]`. scale: floats `[rows blocks]`, each for `columns / blocks`
    neighbouring columns; one block is a scale per row. rotation: number of columns that were
    rotated together, a power of 4; 0 means none.
    """

    codes: Tensor
    scale: Tensor
    rotation: int = 0

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        scaled_rows, blocks = self.scale.shape
        if scaled_rows != rows or columns % max(blocks, 1) or (columns and not blocks):
            raise ValueError(f"Scales {self.scale.shape} do not fit codes {self.codes.shape}.")
        if self.rotation and columns % self.rotation:
            raise ValueError(f"{columns} columns are no multiple of rotation {self.rotation}.")

    @property
    def shape(self) -> tuple[int, int]:
        """Rows (outputs) and columns (inputs)."""
        return (self.codes.shape[0], self.codes.shape[1])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "rows columns"]:
        """Compute the matrix in fp32 and round it once to `dtype`."""
        rows, columns = self.shape
        result = torch.empty(rows, columns, dtype=dtype, device=self.codes.device)
        step = max(1, _CHUNK // max(columns, 1))
        for start in range(0, rows, step):
            chosen = slice(start, start + step)
            result[chosen] = self._values(chosen)
        return result

    def select(self, index: Int[Tensor, " n"]) -> "QuantizedWeight":
        """Return the rows of an index, in its order."""
        codes = self.codes.view(torch.int8)[index].view(self.codes.dtype)
        return replace(self, codes=codes, scale=self.scale[index])

    def to(self, device: torch.device) -> "QuantizedWeight":
        """Return the weight on a device."""
        return replace(self, codes=self.codes.to(device), scale=self.scale.to(device))

    def _values(self, rows: slice) -> Tensor:
        scale = self.scale[rows].float()
        width = self.shape[1] // max(scale.shape[1], 1)
        blocks = self.codes[rows].float().view(*scale.shape, width)
        values = blocks.mul_(scale[:, :, None]).flatten(1)
        if not self.rotation:
            return values
        groups = values.view(len(values), self.shape[1] // self.rotation, self.rotation)
        return (groups @ hadamard(self.rotation, values.device)).flatten(1)


Weight = Tensor | QuantizedWeight


def dense(weight: Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a quantized matrix multiplied out to `dtype`, or a tensor as it is."""
    return weight.dequantize(dtype) if isinstance(weight, QuantizedWeight) else weight


def cat_rows(weights: Sequence[Weight]) -> Weight:
    """Join matrices (or vectors) along their first axis.

    The result is quantized if all are, in the same way; otherwise the quantized ones are
    multiplied out to the precision of the others, or to fp32.
    """
    tensors = [weight for weight in weights if isinstance(weight, Tensor)]
    quantized = [weight for weight in weights if isinstance(weight, QuantizedWeight)]
    kinds = {(weight.codes.dtype, weight.rotation) for weight in quantized}
    if tensors or len(kinds) != 1:
        dtype = tensors[0].dtype if tensors else torch.float32
        return torch.cat([dense(weight, dtype) for weight in weights])
    blocks = max(weight.scale.shape[1] for weight in quantized)
    if any(blocks % weight.scale.shape[1] for weight in quantized):
        return torch.cat([weight.dequantize() for weight in quantized])
    codes = torch.cat([weight.codes.view(torch.int8) for weight in quantized])
    scales = [w.scale.repeat_interleave(blocks // w.scale.shape[1], dim=1) for w in quantized]
    first = quantized[0]
    return replace(first, codes=codes.view(first.codes.dtype), scale=torch.cat(scales))


def permute_rows(weight: Weight, index: Int[Tensor, " n"]) -> Weight:
    """Return the rows of an index, in its order."""
    return weight.select(index) if isinstance(weight, QuantizedWeight) else weight[index]


@lru_cache(maxsize=8)
def hadamard(size: int, device: torch.device) -> Float[Tensor, "n n"]:
    """Return the symmetric orthonormal Hadamard matrix of ConvRot; size: a power of 4.

    It is the Kronecker power of a matrix of 4 rows with equal sums, not Sylvester's.
    """
    base = torch.tensor(_HADAMARD_4, dtype=torch.float32)
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, base)
    if len(matrix) != size:
        raise ValueError(f"size must be a power of 4, got {size}.")
    return (matrix / size**0.5).to(device)


class QuantizedLayer(nn.Module):
    """Base class of layers whose weight is quantized.

    `.to(dtype)` changes the precision of the dequantized weight, never codes and scales.
    """

    codes: Tensor
    scale: Tensor
    _like: Tensor

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__()
        self.rotation = weight.rotation
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scale", weight.scale)
        like = torch.empty(0, dtype=dtype, device=weight.codes.device)
        self.register_buffer("_like", like, persistent=False)

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight as it is stored."""
        return QuantizedWeight(self.codes, self.scale, self.rotation)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the dequantized weight."""
        return self._like.dtype

    @property
    def weight(self) -> Tensor:
        """The weight multiplied out: a new tensor at every access; writing to it has no effect."""
        return self.quantized.dequantize(self._like.dtype)

    def replace_weight(self, weight: QuantizedWeight) -> None:
        """Replace the stored weight by one of the same shape."""
        if weight.shape != self.quantized.shape:
            raise ValueError(f"weight must be {self.quantized.shape}, got {weight.shape}.")
        self.codes = weight.codes
        self.scale = weight.scale
        self.rotation = weight.rotation

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move codes and scales as bytes, so that casts to another precision pass them by."""
        stored = {name: self._buffers.pop(name) for name in ("codes", "scale")}
        result = cast(Any, super())._apply(fn, recurse)
        for name, value in stored.items():
            if value is not None:
                self._buffers[name] = fn(value.view(torch.uint8)).view(value.dtype)
        return result


class QuantizedLinear(QuantizedLayer):
    """Linear layer with a quantized weight, dequantized at every call to the input's precision."""

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Float[Tensor, " outputs"] | None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(weight, dtype)
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Float[Tensor, "... inputs"]) -> Float[Tensor, "... outputs"]:
        """Multiply by the dequantized weight and add the bias."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.quantized.dequantize(x.dtype), bias)


class QuantizedEmbedding(QuantizedLayer):
    """Embedding with a quantized table, of which only the rows looked up are dequantized."""

    def forward(self, ids: Int[Tensor, "..."]) -> Float[Tensor, "... width"]:
        """Look up the rows of ids."""
        rows = self.quantized.select(ids.flatten()).dequantize(self._like.dtype)
        return rows.view(*ids.shape, -1)


def can_quantize(layer: nn.Module, name: str) -> bool:
    """Whether a layer's tensor may be quantized: the weight of a plain linear layer or table."""
    return name == "weight" and type(layer) in (nn.Linear, nn.Embedding)


def quantized_layer(
    layer: nn.Module, weight: QuantizedWeight
) -> QuantizedLinear | QuantizedEmbedding:
    """Make the quantized form of a linear layer or embedding, with its bias and precision."""
    if isinstance(layer, nn.Embedding):
        return QuantizedEmbedding(weight, layer.weight.dtype)
    linear = cast(nn.Linear, layer)
    return QuantizedLinear(weight, cast(Any, linear.bias), linear.weight.dtype)
