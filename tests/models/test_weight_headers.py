"""Mutated headers of safetensors and GGUF files: one sentence each, never a crash or over-read."""

import json
import random
import struct

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from skyloom.core.errors import CheckpointError
from skyloom.models.file_bytes import FileBytes
from skyloom.models.quantized import dense
from skyloom.models.weight_files import open_weights

MUTANTS = 5000
ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
NUMBERS = (0, 1, -1, 2, 7, 24, 2**31, 2**63 - 1, 2**64, 10**30, True, 1.5, "3", None, [])
DTYPES = ("F32", "F64", "F16", "U8", "I8", "F8_E4M3", "F8_E8M0", "F4", "X9", "", 3, None)


def write(path, header, data):
    overwrite(path, len(header).to_bytes(8, "little") + header + data)


def overwrite(path, content):
    """Write in place: emptying a file first costs milliseconds on ext4."""
    path.touch()
    with path.open("r+b") as file:
        file.write(content)
        file.truncate()


def safetensors_seed(folder):
    path = folder / "seed.safetensors"
    tensors = {
        "a.weight": torch.arange(12.0).view(3, 4),
        "b.weight": torch.zeros(2, 4, dtype=torch.int8),
        "b.weight_scale": torch.ones(2),
        "c": torch.ones(5, dtype=torch.bfloat16),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return content[8 : 8 + length], content[8 + length :]


def gguf_seed(folder):
    path = folder / "seed.gguf"
    writer = gguf.GGUFWriter(path, "wan")
    writer.add_array("words", ["one", "two"])
    writer.add_array("comfy.gguf.orig_shape.b", [2, 2, 16])
    writer.add_float32("number", 1.5)
    kind = gguf.GGMLQuantizationType.Q8_0
    matrix = np.ones((2, 32), np.float32)
    writer.add_tensor("a", matrix)
    writer.add_tensor("b", gguf.quantize(matrix, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def mutated_json(table, rng):
    """Change one field of a parsed header."""
    table = json.loads(json.dumps(table))
    name = rng.choice([key for key in table if key != "__metadata__"])
    row = table[name]
    change = rng.randrange(9)
    if change == 0:
        row["dtype"] = rng.choice(DTYPES)
    elif change == 1:
        row["shape"] = [rng.choice(NUMBERS) for _ in range(rng.randrange(12))]
    elif change == 2:
        row["data_offsets"] = [rng.choice(NUMBERS) for _ in range(rng.randrange(4))]
    elif change == 3:
        row["data_offsets"][rng.randrange(2)] += rng.choice((-9, -1, 1, 4, 2**40))
    elif change == 4:
        del row[rng.choice(list(row))]
    elif change == 5:
        table[name] = rng.choice(NUMBERS)
    elif change == 6:
        other = rng.choice([key for key in table if key != "__metadata__"])
        row["data_offsets"] = table[other]["data_offsets"]
    elif change == 7:
        table["__metadata__"] = rng.choice((*NUMBERS, {"a": 1}, {"_quantization_metadata": "{"}))
    else:
        table[rng.choice(("", "x" * 2000, "b.comfy_quant", "\ud800"))] = table.pop(name)
    return json.dumps(table).encode()


def mutated_bytes(content, rng):
    """Change, delete or insert a few bytes, or cut the end off."""
    content = bytearray(content)
    for _ in range(rng.randrange(1, 4)):
        place = rng.randrange(max(len(content), 1))
        change = rng.randrange(4)
        if change == 0:
            content[place : place + 1] = bytes([rng.randrange(256)])
        elif change == 1:
            del content[place : place + rng.randrange(1, 9)]
        elif change == 2:
            content[place:place] = rng.randbytes(rng.randrange(1, 9))
        else:
            del content[place:]
    return bytes(content)


def opens(path, read):
    """Read all tensors; False if the file is refused in one sentence."""
    try:
        with open_weights(path, read=read) as files:
            for name, shape in files.shapes.items():
                assert tuple(dense(files.read(name)).shape) == shape
    except CheckpointError as error:
        assert error.message.endswith(".")
        assert "\n" not in error.message
        assert len(error.message) < len(str(path)) + 300
        return False
    return True


@pytest.fixture
def watch_reads(monkeypatch):
    """Fail on a request for bytes outside the file or for more than the file holds."""
    read = FileBytes.read

    def checked(self, start, stop):
        result = read(self, start, stop)
        assert 0 <= start <= stop <= self.path.stat().st_size
        assert result.numel() == stop - start
        return result

    monkeypatch.setattr(FileBytes, "read", checked)


@pytest.mark.usefixtures("watch_reads")
@pytest.mark.parametrize("read", ["mmap", "copy"])
def test_mutated_safetensors_headers(tmp_path, read):
    rng = random.Random(f"safetensors {read}")
    header, data = safetensors_seed(tmp_path)
    table = json.loads(header)
    path = tmp_path / "a.safetensors"
    write(path, header, data)
    assert opens(path, read)
    accepted = 0
    for turn in range(MUTANTS):
        if turn % 2:
            write(path, mutated_json(table, rng), data)
        elif turn % 4:
            write(path, mutated_bytes(header, rng), data)
        else:
            overwrite(path, mutated_bytes(len(header).to_bytes(8, "little") + header, rng) + data)
        accepted += opens(path, read)
    assert 0 < accepted < MUTANTS / 4


@pytest.mark.usefixtures("watch_reads")
def test_mutated_gguf_headers(tmp_path):
    rng = random.Random("gguf")
    content = gguf_seed(tmp_path)
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    assert opens(path, "copy")
    header = len(content) - 24 * 32  # the tensors' bytes, padded, are shorter
    accepted = 0
    for _ in range(MUTANTS):
        overwrite(path, b"GGUF" + mutated_bytes(content[4:header], rng) + content[header:])
        accepted += opens(path, "copy")
    assert 0 < accepted < MUTANTS / 2


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (b"[" * 100_000, "not a table in JSON"),
        (b'{"a":' * 50_000, "not a table in JSON"),
        (b'{"x": NaN}', "not a table in JSON"),
        (b'{"x": 1' + b"0" * 5000 + b"}", "not a table in JSON"),
        (b"\xff\xfe{}", "not a table in JSON"),
        (b"[]", "not a table in JSON"),
        (
            json.dumps({"x": ENTRY}).encode()[:-1] + b',"x":' + json.dumps(ENTRY).encode() + b"}",
            "JSON",
        ),
        (json.dumps({"x": {**ENTRY, "shape": [2**40, 2**40]}}).encode(), "another size"),
        (json.dumps({"x": {**ENTRY, "data_offsets": [1, 25]}}).encode(), "has 24 bytes|ends at"),
        (json.dumps({"x": ENTRY, "y": ENTRY}).encode(), '"x" and "y" overlap'),
        (json.dumps({"x": {**ENTRY, "shape": [2, -3]}}).encode(), "no valid shape"),
        (json.dumps({"x": {**ENTRY, "shape": [1] * 9}}).encode(), "no valid shape"),
        (json.dumps({"x": {**ENTRY, "dtype": "F4", "shape": [48]}}).encode(), "quantized as F4"),
        (json.dumps({"x": {**ENTRY, "shape": [2, 2], "data_offsets": [0, 16]}}).encode(), "need"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, header, match):
    path = tmp_path / "a.safetensors"
    write(path, header, bytes(24))
    with pytest.raises(CheckpointError, match=match), open_weights(path):
        pass


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 10**12, 17 * 2**20, 33])
def test_a_header_is_no_longer_than_its_file_or_the_limit(tmp_path, length):
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write(length.to_bytes(8, "little") + b"{}")
        file.truncate(40 if length < 2**20 else 20 * 2**20)
    with pytest.raises(CheckpointError, match=f"its header would have {length} bytes"):
        opens_or_raises(path)


def opens_or_raises(path):
    with open_weights(path) as files:
        return files.shapes


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ((b"GGUF", 1, 0, 0), "version 2 or 3, got 1"),
        ((b"GGUF", 3, 2**60, 0), "would hold 1152921504606846976 tensors"),
        ((b"GGUF", 3, 0, 2**60), "would hold 1152921504606846976 keys"),
        ((b"GGUF", 3, 1, 0), "header would go beyond"),
    ],
)
def test_a_gguf_header_promises_no_more_than_it_has(tmp_path, fields, match):
    path = tmp_path / "a.gguf"
    path.write_bytes(struct.pack("<4sIQQ", *fields))
    with pytest.raises(CheckpointError, match=match):
        opens_or_raises(path)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F32", "I8"])
@pytest.mark.parametrize("shape", [[2**40, 0], [0, 2**40]])
def test_an_empty_tensor_takes_no_memory_whatever_its_other_side(tmp_path, dtype, shape):
    path = tmp_path / "a.safetensors"
    row = {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}
    write(path, json.dumps({"x": row}).encode(), b"")
    assert opens(path, "copy")
    scale = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    write(path, json.dumps({"x.weight": row, "x.weight_scale": scale}).encode(), bytes(4))
    assert not opens(path, "copy")
