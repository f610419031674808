"""Headers of GGUF files, read without trusting them.

The format is described in the repository ggml-org/ggml, in its page on GGUF.

Sides of a shape are stored from the fastest to the slowest; here they are in torch's order.
ComfyUI's converter flattens tensors of more than four axes and stores their shape in
`comfy.gguf.orig_shape.NAME`.
"""

import math
import struct
from typing import Any, cast

from skyloom.core.errors import CheckpointError
from skyloom.models.file_bytes import (
    MAX_NAME,
    FileBytes,
    Header,
    StoredTensor,
    check_ranges,
    shown,
)

MAGIC = b"GGUF"
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
BLOCK = 32
"""Number of weights in a block of Q8_0, which has one scale."""

BLOCK_BYTES = 2 + BLOCK
"""Bytes of a block: the scale in fp16, then the weights in int8."""

_VERSIONS = (2, 3)
_READ_AHEAD = 2**18
_MAX_HEADER_BYTES = 2**25
_MAX_COUNT = 100_000
_MAX_TEXT = 2**24
_MAX_ITEMS = 2**22
_MAX_AXES = 4
_MAX_SIDE = 2**40
_STRING = 8
_ARRAY = 9
_SCALARS = {
    **{0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i"},
    **{6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"},
}
_READ = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 8: ("Q8_0", BLOCK, BLOCK_BYTES), 30: ("BF16", 1, 2)}
_NOT_READ = {
    **{2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K"},
    **{13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS"},
    **{19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16"},
    **{26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"},
}


class _Cursor:
    """Reads values one after the other; every read is checked against the file's size."""

    def __init__(self, file: FileBytes) -> None:
        self.file = file
        self.position = 0
        self._buffer = b""
        self._begin = 0

    def take(self, count: int) -> bytes:
        stop = self.position + count
        if stop > min(self.file.size, _MAX_HEADER_BYTES):
            raise self.file.damaged(f"its header would go beyond byte {stop - 1}")
        if stop > self._begin + len(self._buffer):
            self._begin = self.position
            ahead = min(self._begin + _READ_AHEAD, self.file.size)
            self._buffer = self.file.head(self._begin, max(stop, ahead))
        value = self._buffer[self.position - self._begin : stop - self._begin]
        self.position = stop
        return value

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]

    def count(self, limit: int, what: str) -> int:
        value: int = self.number("Q")
        if value > limit:
            raise self.file.damaged(f"it would hold {value} {what}")
        return value

    def text(self, limit: int = _MAX_TEXT) -> str:
        try:
            return self.take(self.count(limit, "bytes in a text")).decode()
        except UnicodeDecodeError as error:
            raise self.file.damaged("a text is not UTF-8") from error

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise self.file.damaged(f"a value has the unknown type {kind}")
        return self.number(_SCALARS[kind])

    def _array(self) -> list[Any]:
        kind: int = self.number("I")
        count = self.count(_MAX_ITEMS, "values in an array")
        if kind == _ARRAY:
            raise self.file.damaged("an array holds arrays")
        if kind not in _SCALARS:
            return [self.value(kind) for _ in range(count)]
        code = _SCALARS[kind]
        return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(code))))


def read_gguf_header(file: FileBytes) -> Header:
    """Read and check a header. Raises CheckpointError, also for a type that is not read."""
    cursor = _Cursor(file)
    if cursor.take(len(MAGIC)) != MAGIC:
        raise file.damaged("it does not begin as a GGUF file")
    version: int = cursor.number("I")
    if version not in _VERSIONS:
        raise CheckpointError(f"{file.path} must be GGUF version 2 or 3, got {version}.")
    tensor_count = cursor.count(_MAX_COUNT, "tensors")
    metadata: dict[str, Any] = {}
    for _ in range(cursor.count(_MAX_COUNT, "keys")):
        key = cursor.text(MAX_NAME)
        metadata[key] = cursor.value(cursor.number("I"))
    rows = [_row(cursor) for _ in range(tensor_count)]
    if len({row[0] for row in rows}) != len(rows):
        raise file.damaged("a tensor's name is repeated")
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 2**20 or alignment % 8:
        raise file.damaged(f"its alignment is {shown(alignment)}")
    begin = -(-cursor.position // alignment) * alignment
    tensors = {
        name: StoredTensor(dtype, _shape(file, name, shape, metadata), *_range(begin, offset, size))
        for name, dtype, shape, offset, size in rows
    }
    check_ranges(file, tensors)
    return Header(tensors, metadata)


def _row(cursor: _Cursor) -> tuple[str, str, tuple[int, ...], int, int]:
    """Read a tensor's name, dtype, shape, offset and number of bytes."""
    file = cursor.file
    name = cursor.text(MAX_NAME)
    axes: int = cursor.number("I")
    if axes > _MAX_AXES:
        raise file.damaged(f"its tensor {shown(name)} has {axes} axes")
    sides = [cursor.count(_MAX_SIDE, "weights in a row") for _ in range(axes)]
    kind: int = cursor.number("I")
    offset: int = cursor.number("Q")
    if kind in _NOT_READ:
        raise CheckpointError(
            f"{file.path} is quantized as GGUF {_NOT_READ[kind]} (tensor {shown(name)}), "
            "which is not read.",
            hint="Take the file in Q8_0, F16 or BF16, or a safetensors file.",
        )
    if kind not in _READ:
        raise file.damaged(f"its tensor {shown(name)} has the unknown type {kind}")
    dtype, block, block_bytes = _READ[kind]
    count = math.prod(sides)
    if (sides[0] if sides else 1) % block:
        raise file.damaged(f"rows of its tensor {shown(name)} are no multiple of {block}")
    return name, dtype, tuple(reversed(sides)), offset, count // block * block_bytes


def _range(begin: int, offset: int, size: int) -> tuple[int, int]:
    return begin + offset, begin + offset + size


def _shape(
    file: FileBytes, name: str, shape: tuple[int, ...], metadata: dict[str, Any]
) -> tuple[int, ...]:
    """Return the shape before ComfyUI's converter flattened it."""
    original = metadata.get(ORIGINAL_SHAPE + name)
    if original is None:
        return shape
    sides = cast(list[Any], original) if isinstance(original, list) else []
    valid = all(type(side) is int and side >= 0 for side in sides)
    if not valid or math.prod(sides) != math.prod(shape):
        raise file.damaged(f"the original shape of its tensor {shown(name)} does not fit")
    return tuple(sides)
