"""Quantized layouts of weight files: which stored tensors make up a weight, and how it is read.

Read are: fp8 without scales; ComfyUI's scaled fp8, old (`X.scale_weight`) and new (`X.weight_scale`
with `X.comfy_quant` or `_quantization_metadata`), and its int8_tensorwise with or without ConvRot;
quanto's int8 and fp8 (`X.weight._data`, `X.weight._scale`); GGUF Q8_0. Anything else is refused by
its name: a wrong guess would give a blurred video and no error.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skyloom.core.errors import CheckpointError
from skyloom.models.file_bytes import FileBytes, StoredTensor, shown
from skyloom.models.gguf_header import BLOCK, BLOCK_BYTES
from skyloom.models.quantized import QuantizedWeight, Weight
from skyloom.models.safetensors_header import as_table, parse_table

PREFIXES = ("model.diffusion_model.", "diffusion_model.")
"""What ComfyUI puts before the names of a transformer."""

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_FP8 = ("F8_E4M3", "F8_E5M2")
_CODES = (*_FP8, "I8")
_SCALES = ("F16", "BF16", "F32")
_MATRIX_AXES = 2
_WEIGHT = ".weight"
_DATA = "._data"
_SCALE_NAMES = (".scale_weight", ".weight_scale")
_MARKER = "scaled_fp8"
_CONFIG = ".comfy_quant"
_INPUT_SCALES = (".scale_input", ".input_scale", ".output_scale")
_FORMAT_CODES = {
    "float8_e4m3fn": ("F8_E4M3",),
    "float8_e5m2": ("F8_E5M2",),
    "int8_tensorwise": ("I8",),
}
_ROTATION = "convrot_groupsize"
_DEFAULT_ROTATION = 256
_MAX_ROTATION = 1024
_HARMLESS = (
    *("format", "convrot", _ROTATION, "per_row", "full_precision_matrix_mult"),
    *("orig_dtype", "orig_shape"),
)
_NOT_READ = {
    ".weight_scale_2": "nvfp4",
    ".weight_scale_inv": "fp8 in blocks",
    ".pre_quant_scale": "awq",
    ".qweight": "gptq or awq",
    ".qzeros": "gptq or awq",
    ".wscales": "svdquant",
    ".weight.absmax": "bitsandbytes",
    ".weight.quant_map": "bitsandbytes",
    ".weight._shift": "quanto with zero points",
    ".weight._zeropoint": "quanto with zero points",
    ".weight._data._data": "quanto int4",
}
_HINT = "Take the file in 16 bits, fp8, int8_tensorwise or GGUF Q8_0."


@dataclass(frozen=True)
class RawTensor:
    """A tensor as it lies in a file."""

    file: FileBytes
    stored: StoredTensor

    @property
    def dtype(self) -> str:
        """Type as the format names it."""
        return self.stored.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Sides."""
        return self.stored.shape

    def bytes(self) -> Tensor:
        """Read the bytes."""
        return self.file.read(self.stored.start, self.stored.stop)

    def read(self, *, copy: bool = False) -> Tensor:
        """Read the tensor, as a view of a mapped file unless `copy`."""
        stored = self.stored
        data = self.file.copy(stored.start, stored.stop) if copy else self.bytes()
        dtype = _DTYPES[self.dtype]
        if data.storage_offset() % dtype.itemsize:
            data = self.file.copy(stored.start, stored.stop)
        return data.view(dtype).view(self.shape)


@dataclass(frozen=True)
class Entry:
    """A weight of a file; dtype: of the stored codes. read: reads it."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Weight]


def strip_prefix(name: str) -> str:
    """Return a tensor's name without ComfyUI's prefix."""
    found = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
    return name[len(found) :]


def weights_of(
    tensors: Mapping[str, RawTensor], metadata: Mapping[str, Any], path: Path
) -> dict[str, Entry]:
    """Return the weights that stored tensors make up, by name.

    path: named in errors. Raises CheckpointError for a layout that is not read.
    """
    configs = _layer_configs(tensors, metadata, path)
    _refuse_other_layouts(tensors, path)
    entries: dict[str, Entry] = {}
    used: set[str] = {_MARKER} if _MARKER in tensors else set()
    for name, tensor in tensors.items():
        if name.endswith(_WEIGHT + _DATA):
            entry, parts = _quanto(tensors, name, path)
            entries[name.removesuffix(_DATA)] = entry
            used.update(parts)
        elif name.endswith(_WEIGHT):
            base = name.removesuffix(_WEIGHT)
            entry, parts = _layer(tensors, base, configs.get(base), path)
            entries[name] = entry
            used.update(parts)
        elif not name.endswith(_CONFIG):
            entries[name] = _plain(tensor, name, path)
    for name in used:
        entries.pop(name, None)
    unused = sorted(configs.keys() - {name.removesuffix(_WEIGHT) for name in entries})
    if unused:
        raise CheckpointError(
            f"{path} describes {len(unused)} quantized layers whose weights it lacks "
            f"({shown(unused[0])})."
        )
    return entries


def _layer(
    tensors: Mapping[str, RawTensor], base: str, config: dict[str, Any] | None, path: Path
) -> tuple[Entry, list[str]]:
    """Return a layer's weight and the names of the tensors that belong to it."""
    tensor = tensors[base + _WEIGHT]
    parts = [
        base + suffix for suffix in (*_SCALE_NAMES, *_INPUT_SCALES) if base + suffix in tensors
    ]
    scales = [name for name in parts if name.endswith(_SCALE_NAMES)]
    if config is not None:
        _check_config(config, tensor.dtype, base, path)
        if not scales:
            raise CheckpointError(f"{path} lacks the scale of layer {shown(base)}.")
    if not scales:
        return _plain(tensor, base + _WEIGHT, path), []
    if len(scales) > 1:
        raise CheckpointError(f"{path} has two scales for layer {shown(base)}.")
    rotation = 0
    if config is not None and config.get("convrot"):
        rotation = config.get(_ROTATION, _DEFAULT_ROTATION)
    return _scaled(tensor, tensors[scales[0]], base, path, rotation=rotation), parts


def _quanto(tensors: Mapping[str, RawTensor], name: str, path: Path) -> tuple[Entry, list[str]]:
    base = name.removesuffix(_WEIGHT + _DATA)
    scale = f"{base}{_WEIGHT}._scale"
    if scale not in tensors:
        raise CheckpointError(f"{path} lacks the scale of layer {shown(base)}.")
    inputs = [base + suffix for suffix in _INPUT_SCALES if base + suffix in tensors]
    entry = _scaled(tensors[name], tensors[scale], base, path, rotation=0)
    return entry, [scale, *inputs]


def _scaled(codes: RawTensor, scale: RawTensor, base: str, path: Path, *, rotation: int) -> Entry:
    """Return the weight of codes with a scale for all or one per row."""
    rows = codes.shape[0] if codes.shape else 1
    if codes.dtype not in _CODES or scale.dtype not in _SCALES:
        raise _not_read(path, f"{codes.dtype} with scales in {scale.dtype}", base)
    if _is_empty(codes):
        raise _not_read(path, f"{codes.dtype} of shape {codes.shape}", base)
    if math.prod(scale.shape) != 1 and scale.shape not in ((rows,), (rows, 1)):
        raise _not_read(path, f"{codes.dtype} with scales of shape {scale.shape}", base)
    if rotation and (len(codes.shape) != _MATRIX_AXES or codes.shape[1] % rotation):
        raise _not_read(path, f"ConvRot of {rotation} columns at shape {codes.shape}", base)
    return Entry(codes.shape, codes.dtype, partial(_read_scaled, codes, scale, rotation))


def _plain(tensor: RawTensor, name: str, path: Path) -> Entry:
    if tensor.dtype in _FP8 and not _is_empty(tensor):
        return Entry(tensor.shape, tensor.dtype, partial(_read_scaled, tensor, None, 0))
    if tensor.dtype == "Q8_0":
        return Entry(tensor.shape, tensor.dtype, partial(_read_q8_0, tensor))
    if tensor.dtype not in _DTYPES:
        raise _not_read(path, tensor.dtype, name)
    if tensor.dtype in ("I8", "U8") and name.endswith(_WEIGHT):
        raise _not_read(path, f"{tensor.dtype} without scales", name)
    return Entry(tensor.shape, tensor.dtype, tensor.read)


def _read_scaled(codes: RawTensor, scale: RawTensor | None, rotation: int) -> Weight:
    values = codes.read(copy=True)
    rows = codes.shape[0] if codes.shape else 1
    factors = torch.ones(1) if scale is None else scale.read(copy=True)
    factors = factors.reshape(-1, 1).expand(rows, 1).contiguous()
    values = values.reshape(rows, values.numel() // max(rows, 1))
    weight = QuantizedWeight(values, factors, rotation)
    is_matrix = len(codes.shape) == _MATRIX_AXES
    return weight if is_matrix else weight.dequantize().view(codes.shape)


def _read_q8_0(tensor: RawTensor) -> Weight:
    """Split blocks into scales and codes; rows of other than matrices are blocks here."""
    blocks = tensor.bytes().view(-1, BLOCK_BYTES)
    is_matrix = len(tensor.shape) == _MATRIX_AXES and tensor.shape[1] % BLOCK == 0
    is_matrix = is_matrix and not _is_empty(tensor)
    rows = tensor.shape[0] if is_matrix else len(blocks)
    scale = blocks[:, : BLOCK_BYTES - BLOCK].contiguous().view(torch.float16)
    codes = blocks[:, BLOCK_BYTES - BLOCK :].contiguous().view(torch.int8)
    per_row = len(blocks) // max(rows, 1)
    weight = QuantizedWeight(codes.view(rows, per_row * BLOCK), scale.view(rows, per_row))
    return weight if is_matrix else weight.dequantize().view(tensor.shape)


def _layer_configs(
    tensors: Mapping[str, RawTensor], metadata: Mapping[str, Any], path: Path
) -> dict[str, dict[str, Any]]:
    """Return ComfyUI's description of every quantized layer, by the layer's name."""
    configs: dict[str, dict[str, Any]] = {}
    text = metadata.get("_quantization_metadata")
    if text is not None:
        table = _parsed(str(text).encode(), "_quantization_metadata", path)
        layers = as_table(table.get("layers"))
        configs.update({strip_prefix(name): as_table(layer) for name, layer in layers.items()})
    for name, tensor in tensors.items():
        if name.endswith(_CONFIG):
            content = tensor.bytes().numpy().tobytes()
            configs[name.removesuffix(_CONFIG)] = _parsed(content, name, path)
    for base, config in configs.items():
        if config.get("format") not in _FORMAT_CODES:
            raise _not_read(path, shown(config.get("format")), base)
    return configs


def _check_config(config: dict[str, Any], dtype: str, base: str, path: Path) -> None:
    """Raise CheckpointError unless a layer's description is wholly understood."""
    kind = config["format"]
    unknown = [key for key, value in config.items() if value and key not in _HARMLESS]
    if unknown:
        raise _not_read(path, f"{kind} with {shown(unknown[0])}", base)
    if dtype not in _FORMAT_CODES[kind]:
        raise _not_read(path, f"{kind} stored as {dtype}", base)
    size = config.get(_ROTATION, _DEFAULT_ROTATION)
    if config.get("convrot") and not (
        type(size) is int and size <= _MAX_ROTATION and _is_power_of_4(size)
    ):
        raise _not_read(path, f"{kind} with {_ROTATION} {shown(size)}", base)


def _refuse_other_layouts(tensors: Mapping[str, RawTensor], path: Path) -> None:
    for name, tensor in tensors.items():
        for suffix, kind in _NOT_READ.items():
            if name.endswith(suffix):
                raise _not_read(path, kind, name.removesuffix(suffix))
        if tensor.dtype == "F8_E8M0":
            raise _not_read(path, "mxfp8 or mxfp4", name)


def _parsed(text: bytes, name: str, path: Path) -> dict[str, Any]:
    try:
        return parse_table(text)
    except ValueError as error:
        raise CheckpointError(f"{path} has no valid JSON in {shown(name)}.") from error


def _is_power_of_4(size: int) -> bool:
    return size > 0 and size.bit_count() == 1 and size.bit_length() % 2 == 1


def _is_empty(tensor: RawTensor) -> bool:
    """Whether a tensor has no elements: its other sides may then be of any size."""
    return 0 in tensor.shape


def _not_read(path: Path, kind: str, name: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is quantized as {kind} ({shown(name)}), which is not read.", hint=_HINT
    )
