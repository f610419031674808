"""Headers of safetensors files, read without trusting them.

A file is the length of the header in 8 bytes, the header in JSON, and the tensors without gaps
(https://github.com/huggingface/safetensors#format).
"""

import json
import math
from typing import Any, cast

from skyloom.models.file_bytes import (
    MAX_NAME,
    FileBytes,
    Header,
    StoredTensor,
    check_ranges,
    shown,
)

MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 100_000

_LENGTH_BYTES = 8
_MAX_AXES = 8
_MAX_SIDE = 2**40
_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


def read_safetensors_header(file: FileBytes) -> Header:
    """Read and check a header. Raises CheckpointError for anything out of order."""
    if file.size < _LENGTH_BYTES:
        raise file.damaged(f"it has {file.size} bytes")
    length = int.from_bytes(file.head(0, _LENGTH_BYTES), "little")
    begin = _LENGTH_BYTES + length
    if length > MAX_HEADER_BYTES or begin > file.size:
        raise file.damaged(f"its header would have {length} bytes")
    table = _parse(file, file.head(_LENGTH_BYTES, begin))
    given = table.pop("__metadata__", {})
    metadata = as_table(given)
    if metadata != given or not all(isinstance(value, str) for value in metadata.values()):
        raise file.damaged("its metadata must be a table of texts")
    if len(table) > MAX_TENSORS:
        raise file.damaged(f"it would hold {len(table)} tensors")
    tensors = {name: _tensor(file, name, row, begin) for name, row in table.items()}
    check_ranges(file, tensors)
    stored = sum(tensor.stop - tensor.start for tensor in tensors.values())
    if begin + stored != file.size:
        raise file.damaged(f"it has {file.size} bytes, and its tensors need {begin + stored}")
    return Header(tensors, metadata)


def parse_table(text: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises ValueError for anything else, repeated names included."""
    try:
        table = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(table, dict):
        raise ValueError("not a table")
    return as_table(table)


def as_table(value: Any) -> dict[str, Any]:
    """Return a parsed JSON object; an empty one for any other value."""
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}


def _parse(file: FileBytes, text: bytes) -> dict[str, Any]:
    try:
        return parse_table(text)
    except ValueError as error:  # JSON and UTF-8 errors are ValueErrors
        raise file.damaged("its header is not a table in JSON") from error


def _tensor(file: FileBytes, name: str, row: Any, begin: int) -> StoredTensor:
    if not name or len(name) > MAX_NAME:
        raise file.damaged(f"a tensor has the name {shown(name)}")
    fields = as_table(row)
    dtype = fields.get("dtype")
    shape = _counts(fields.get("shape"))
    offsets = _counts(fields.get("data_offsets"))
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise file.damaged(f"its tensor {shown(name)} has the unknown dtype {shown(dtype)}")
    if shape is None or len(shape) > _MAX_AXES:
        raise file.damaged(f"its tensor {shown(name)} has no valid shape")
    if offsets is None or len(offsets) != len(("start", "stop")):
        raise file.damaged(f"its tensor {shown(name)} has no valid offsets")
    start, stop = offsets
    if math.prod(shape) * _BITS[dtype] != 8 * (stop - start):
        raise file.damaged(f"its tensor {shown(name)} has another size than its shape and dtype")
    return StoredTensor(dtype, tuple(shape), begin + start, begin + stop)


def _counts(values: Any) -> list[int] | None:
    """Return a list of sides or offsets; None for anything else."""
    if not isinstance(values, list):
        return None
    items = cast(list[Any], values)
    valid = all(type(item) is int and 0 <= item <= _MAX_SIDE for item in items)
    return items if valid else None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name is repeated")
    return table


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
