"""Files of other tools: the same weights from every layout, and what is refused by its name."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from skyloom.core.errors import CheckpointError
from skyloom.models import file_bytes
from skyloom.models.file_bytes import maps_well
from skyloom.models.quantized import QuantizedWeight, dense
from skyloom.models.weight_files import open_weights

torch.manual_seed(0)
STATE = {
    "patch_embedding.weight": torch.randn(32, 4, 1, 2, 2),
    "patch_embedding.bias": torch.randn(32),
    "blocks.0.q.weight": torch.randn(48, 256),
    "blocks.0.q.bias": torch.randn(48),
    "blocks.0.norm.weight": torch.randn(32).bfloat16(),
    "blocks.0.table": torch.randn(1, 6, 32).half(),
    "scale": torch.tensor(2.5),
}
LAYER = "blocks.0.q"
MATRIX = STATE[f"{LAYER}.weight"]
PREFIX = "model.diffusion_model."
REST = {name: value for name, value in STATE.items() if name != f"{LAYER}.weight"}
READS = ("mmap", "copy")


def read_all(path, **options):
    with open_weights(path, **options) as files:
        assert files.shapes.keys() == files.dtypes.keys()
        weights = {name: files.read(name) for name in files.shapes}
        for name, weight in weights.items():
            assert tuple(weight.shape) == files.shapes[name]
        return weights


def assert_same(weights, expected=STATE):
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert weights[name].dtype == value.dtype
        assert torch.equal(weights[name], value)


def save_sharded(folder, stem="diffusion_pytorch_model", index=True):
    names = [list(STATE)[i::3] for i in range(3)]
    where = {}
    for number, chosen in enumerate(names, 1):
        file = f"{stem}-{number:05d}-of-00003.safetensors"
        save_file({name: STATE[name] for name in chosen}, folder / file)
        where |= dict.fromkeys(chosen, file)
    if index:
        text = json.dumps({"metadata": {"total_size": 1}, "weight_map": where})
        (folder / f"{stem}.safetensors.index.json").write_text(text)
    return where


def refused(path, match, **options):
    """Assert that a path is refused in one sentence and a hint."""
    with pytest.raises(CheckpointError, match=match) as caught:
        read_all(path, **options)
    assert "\n" not in caught.value.message
    return caught.value


# 16 and 32 bits


@pytest.mark.parametrize("read", READS)
def test_a_single_file_is_exact(tmp_path, read):
    path = tmp_path / "wan.safetensors"
    save_file(STATE, path, metadata={"format": "pt"})
    assert_same(read_all(path, read=read))
    with open_weights(path, read=read) as files:
        assert files.metadata == {"format": "pt"}
        assert files.dtypes["blocks.0.norm.weight"] == "BF16"
        kept = files.read("scale")
    assert kept == 2.5


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("index", [True, False])
def test_shards_are_exact_from_folder_index_and_any_shard(tmp_path, read, index):
    save_sharded(tmp_path, index=index)
    (tmp_path / "config.json").write_text("{}")
    paths = [tmp_path, *sorted(tmp_path.glob("*.safetensors*"))]
    assert len(paths) == 4 + index
    for path in paths:
        assert_same(read_all(path, read=read))


def test_several_files_are_one_source(tmp_path):
    save_file({name: STATE[name] for name in list(STATE)[:3]}, tmp_path / "a.safetensors")
    save_file({name: STATE[name] for name in list(STATE)[3:]}, tmp_path / "b.safetensors")
    assert_same(read_all([tmp_path / "a.safetensors", tmp_path / "b.safetensors"]))


@pytest.mark.parametrize("prefix", [PREFIX, "diffusion_model."])
def test_prefixes_of_comfyui_are_stripped(tmp_path, prefix):
    save_file({prefix + name: value for name, value in STATE.items()}, tmp_path / "a.safetensors")
    assert_same(read_all(tmp_path))


def test_writing_to_a_mapped_tensor_leaves_the_file_alone(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(STATE, path)
    before = path.read_bytes()
    with open_weights(path, read="mmap") as files:
        files.read("scale").fill_(0)
    assert path.read_bytes() == before


def test_tensors_that_are_not_aligned_are_read(tmp_path):
    """The format allows any header length; PyTorch wants aligned numbers."""
    rows = {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    header = json.dumps(rows).encode()
    header += b" " * ((1 - len(header)) % 4)
    path = tmp_path / "a.safetensors"
    values = torch.tensor([1.5, -2.0])
    path.write_bytes(len(header).to_bytes(8, "little") + header + values.numpy().tobytes())
    for read in READS:
        assert torch.equal(read_all(path, read=read)["x"], values)


def test_the_usual_file_of_a_folder_is_taken(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "model.fp16.safetensors")
    assert_same(read_all(tmp_path))


def test_links_of_the_hugging_face_cache_are_followed(tmp_path):
    repository = tmp_path / "models--Wan-AI--Wan"
    folder = repository / "snapshots" / "abc" / "transformer"
    folder.mkdir(parents=True)
    (repository / "blobs").mkdir()
    save_sharded(folder)
    for path in list(folder.iterdir()):
        blob = path.rename(repository / "blobs" / f"hash-of-{path.name}")
        path.symlink_to(blob)
    assert_same(read_all(folder))


# 8 bits


def fp8(dtype, scale):
    return (MATRIX / scale).to(dtype)


def rotate(matrix):
    base = torch.ones(4, 4) - 2 * torch.eye(4).flip(1)
    rotation = torch.kron(torch.kron(base, base), torch.kron(base, base)) / 16
    return (matrix.view(-1, 256) @ rotation).view(matrix.shape)


def config_tensor(**config):
    return torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)


def assert_quantized(path, expected, *, tolerance, codes):
    """The layer stays in 8 bits, equals `expected` exactly and the 32-bit weight about."""
    for read in READS:
        weights = read_all(path, read=read)
        weight = weights.pop(f"{LAYER}.weight")
        assert isinstance(weight, QuantizedWeight)
        assert weight.codes.dtype == codes
        assert torch.equal(weight.dequantize(), expected)
        assert (weight.dequantize() - MATRIX).abs().max() < tolerance
        assert_same(weights, REST)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_scaled_fp8_of_the_old_layout(tmp_path, dtype, prefix):
    scale = torch.tensor([0.02])
    codes = fp8(dtype, scale)
    tensors = {
        **REST,
        "scaled_fp8": torch.empty(0, dtype=dtype),
        f"{LAYER}.weight": codes,
        f"{LAYER}.scale_weight": scale,
        f"{LAYER}.scale_input": torch.ones(1),
    }
    save_file({prefix + name: value for name, value in tensors.items()}, tmp_path / "a.safetensors")
    assert_quantized(tmp_path, codes.float() * scale, tolerance=0.5, codes=dtype)


@pytest.mark.parametrize("place", ["metadata", "tensor"])
@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_scaled_fp8_of_the_new_layout(tmp_path, place, prefix):
    scale = torch.tensor(0.02)
    codes = fp8(torch.float8_e4m3fn, scale)
    config = {"format": "float8_e4m3fn", "full_precision_matrix_mult": False}
    tensors = {
        **REST,
        f"{LAYER}.weight": codes,
        f"{LAYER}.weight_scale": scale,
        f"{LAYER}.input_scale": torch.ones(1),
    }
    metadata = None
    if place == "metadata":
        layers = {"format_version": "1.0", "layers": {prefix + LAYER: config}}
        metadata = {"_quantization_metadata": json.dumps(layers)}
    else:
        tensors[f"{LAYER}.comfy_quant"] = config_tensor(**config)
    stored = {prefix + name: value for name, value in tensors.items()}
    save_file(stored, tmp_path / "a.safetensors", metadata=metadata)
    assert_quantized(tmp_path, codes.float() * scale, tolerance=0.5, codes=codes.dtype)


@pytest.mark.parametrize("shape", [(), (48,), (48, 1)])
def test_int8_tensorwise(tmp_path, shape):
    scale = torch.full(shape, 4.5 / 127)
    codes = (MATRIX / scale.reshape(-1, 1)).round().clamp(-127, 127).to(torch.int8)
    tensors = {
        **REST,
        f"{LAYER}.weight": codes,
        f"{LAYER}.weight_scale": scale,
        f"{LAYER}.comfy_quant": config_tensor(format="int8_tensorwise", per_row=bool(shape)),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    expected = codes.float() * scale.reshape(-1, 1)
    assert_quantized(tmp_path, expected, tolerance=0.1, codes=torch.int8)


def test_int8_tensorwise_with_convrot(tmp_path):
    rotated = rotate(MATRIX)
    scale = rotated.abs().amax(1, keepdim=True) / 127
    codes = (rotated / scale).round().to(torch.int8)
    config = config_tensor(format="int8_tensorwise", convrot=True, convrot_groupsize=256)
    tensors = {
        **REST,
        f"{LAYER}.weight": codes,
        f"{LAYER}.weight_scale": scale,
        f"{LAYER}.comfy_quant": config,
    }
    save_file(tensors, tmp_path / "a.safetensors")
    weight = read_all(tmp_path)[f"{LAYER}.weight"]
    assert weight.rotation == 256
    torch.testing.assert_close(weight.dequantize(), rotate(codes.float() * scale))
    assert (weight.dequantize() - MATRIX).abs().max() < 0.1


def test_plain_fp8(tmp_path):
    state = {name: value.to(torch.float8_e4m3fn) for name, value in STATE.items()}
    save_file(state, tmp_path / "a.safetensors")
    weights = read_all(tmp_path)
    assert isinstance(weights[f"{LAYER}.weight"], QuantizedWeight)
    for name, value in state.items():
        assert torch.equal(dense(weights[name]), value.float())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quanto(tmp_path, dtype):
    scale = (MATRIX.abs().amax(1, keepdim=True) / 127).bfloat16()
    codes = (MATRIX / scale.float()).round().clamp(-127, 127).to(dtype)
    tensors = {
        **REST,
        f"{LAYER}.weight._data": codes,
        f"{LAYER}.weight._scale": scale,
        f"{LAYER}.input_scale": torch.ones(()),
        f"{LAYER}.output_scale": torch.ones(()),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    expected = codes.float() * scale.float()
    assert_quantized(tmp_path, expected, tolerance=0.5, codes=dtype)


def test_scaled_convolutions_are_dequantized(tmp_path):
    name = "patch_embedding"
    codes = STATE[f"{name}.weight"].to(torch.float8_e4m3fn)
    scale = torch.rand(32)
    save_file({f"{name}.weight": codes, f"{name}.weight_scale": scale}, tmp_path / "a.safetensors")
    expected = codes.float() * scale.view(-1, 1, 1, 1, 1)
    assert torch.equal(read_all(tmp_path)[f"{name}.weight"], expected)


# GGUF


def save_gguf(path, state, kinds, original=()):
    writer = gguf.GGUFWriter(path, "wan")
    writer.add_array("some.words", ["one", "two"])
    for name in original:
        shape = [int(side) for side in state[name].shape]
        writer.add_array(f"comfy.gguf.orig_shape.{name}", shape)
    for name, value in state.items():
        numbers = value.float().numpy()
        if name in original:
            numbers = numbers.reshape(len(numbers), -1)
        kind = kinds.get(name, gguf.GGMLQuantizationType.F32)
        writer.add_tensor(name, gguf.quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("read", READS)
def test_gguf_equals_its_own_package(tmp_path, read):
    kinds = {
        f"{LAYER}.weight": gguf.GGMLQuantizationType.Q8_0,
        f"{LAYER}.bias": gguf.GGMLQuantizationType.F16,
        "blocks.0.norm.weight": gguf.GGMLQuantizationType.BF16,
        "patch_embedding.weight": gguf.GGMLQuantizationType.F16,
    }
    path = tmp_path / "wan.gguf"
    state = {name: value for name, value in STATE.items() if value.ndim}
    save_gguf(path, state, kinds, original=["patch_embedding.weight"])
    weights = read_all(path, read=read)
    assert weights.keys() == state.keys()
    for tensor in gguf.GGUFReader(path).tensors:
        expected = gguf.dequantize(np.array(tensor.data), tensor.tensor_type)
        shape = state[tensor.name].shape
        assert torch.equal(
            dense(weights[tensor.name]).float(), torch.from_numpy(expected.copy()).view(shape)
        )
    assert isinstance(weights[f"{LAYER}.weight"], QuantizedWeight)
    assert weights["blocks.0.norm.weight"].dtype == torch.bfloat16
    with open_weights(path, read=read) as files:
        assert files.dtypes[f"{LAYER}.weight"] == "Q8_0"
        assert files.metadata["some.words"] == ["one", "two"]
        assert files.metadata["general.architecture"] == "wan"


def test_quantized_gguf_tensors_of_more_than_two_axes_are_dequantized(tmp_path):
    state = {"conv": torch.randn(8, 4, 2, 2, 2), "cube": torch.randn(2, 3, 64)}
    kinds = dict.fromkeys(state, gguf.GGMLQuantizationType.Q8_0)
    save_gguf(tmp_path / "a.gguf", state, kinds, original=["conv"])
    weights = read_all(tmp_path)
    for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors:
        expected = gguf.dequantize(np.array(tensor.data), tensor.tensor_type)
        shape = state[tensor.name].shape
        assert torch.equal(weights[tensor.name], torch.from_numpy(expected.copy()).view(shape))


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q6_K", "Q4_K", "IQ4_XS"])
def test_other_gguf_types_are_refused_by_name(tmp_path, kind):
    numeric = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[numeric]
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "wan")
    writer.add_tensor("x", np.zeros((4, size * 256 // block), np.uint8), raw_dtype=numeric)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(tmp_path, f"GGUF {kind}")


# Refused


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp8", "convrot_w4a4", "asym_w4a8_int8", None])
def test_formats_of_comfyui_are_an_allow_list(tmp_path, kind):
    tensors = {
        f"{LAYER}.weight": torch.zeros(48, 128, dtype=torch.uint8),
        f"{LAYER}.weight_scale": torch.ones(48, 16).to(torch.float8_e4m3fn),
        f"{LAYER}.comfy_quant": config_tensor(format=kind),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    assert "GGUF Q8_0" in refused(tmp_path, f'quantized as "{kind}"').hint


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        (".weight_scale_2", "nvfp4"),
        (".pre_quant_scale", "awq"),
        (".qweight", "gptq or awq"),
        (".weight.absmax", "bitsandbytes"),
        (".weight_scale_inv", "fp8 in blocks"),
        (".weight._shift", "quanto with zero points"),
    ],
)
def test_other_layouts_are_refused_by_name(tmp_path, suffix, kind):
    save_file({**REST, LAYER + suffix: torch.ones(4)}, tmp_path / "a.safetensors")
    refused(tmp_path, f"quantized as {kind}")


INT8 = torch.zeros(48, 256, dtype=torch.int8)
CONFIG = {"format": "int8_tensorwise"}


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({".weight": INT8}, "I8 without scales"),
        ({".weight": INT8, ".weight_scale": torch.ones(48, 8)}, "scales of shape"),
        ({".weight": INT8, ".weight_scale": torch.ones(256)}, "scales of shape"),
        ({".weight": MATRIX, ".scale_weight": torch.ones(1)}, "F32 with scales"),
        ({".weight": INT8, ".comfy_quant": config_tensor(**CONFIG)}, "lacks the scale"),
        ({".comfy_quant": config_tensor(**CONFIG)}, "whose weights it lacks"),
        ({".comfy_quant": torch.zeros(4, dtype=torch.uint8)}, "no valid JSON"),
        ({".weight._data": INT8}, "lacks the scale"),
        (
            {".weight": INT8, ".weight_scale": torch.ones(1), ".scale_weight": torch.ones(1)},
            "two scales",
        ),
    ],
)
def test_contradicting_parts_are_refused(tmp_path, tensors, match):
    save_file(
        {LAYER + suffix: value for suffix, value in tensors.items()}, tmp_path / "a.safetensors"
    )
    refused(tmp_path, match)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"convrot": True, "convrot_groupsize": 128}, "convrot_groupsize"),
        ({"convrot": True, "convrot_groupsize": "256"}, "convrot_groupsize"),
        ({"convrot": True, "convrot_groupsize": 4**20}, "convrot_groupsize"),
        ({"convrot": True, "convrot_groupsize": 1024}, "ConvRot of 1024 columns"),
        ({"group_size": 64}, "group_size"),
        ({"format": "float8_e4m3fn"}, "stored as I8"),
    ],
)
def test_descriptions_that_are_not_understood_are_refused(tmp_path, config, match):
    tensors = {
        f"{LAYER}.weight": INT8,
        f"{LAYER}.weight_scale": torch.ones(1),
        f"{LAYER}.comfy_quant": config_tensor(**{**CONFIG, **config}),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    refused(tmp_path, match)


def test_pickles_are_refused_and_the_safetensors_file_is_named(tmp_path):
    path = tmp_path / "Wan2.1_VAE.pth"
    torch.save({"x": torch.zeros(1)}, path)
    error = refused(path, "is a pickle", twin={"Wan2.1_VAE.pth": "wan_2.1_vae.safetensors"}.get)
    assert "wan_2.1_vae.safetensors" in error.hint
    assert "safetensors" in refused(tmp_path, "is a pickle").hint
    disguised = path.rename(tmp_path / "vae.safetensors")
    refused(disguised, "is a pickle")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
        (b"<!doctype html><html>", "a web page"),
        (b"", "it has 0 bytes"),
    ],
)
def test_what_downloads_leave_behind_is_named(tmp_path, content, match):
    (tmp_path / "a.safetensors").write_bytes(content)
    refused(tmp_path, match)


def test_folders_without_one_set_of_weights_are_refused(tmp_path):
    refused(tmp_path / "absent.safetensors", "must be an existing file")
    refused(tmp_path, "holds no weights")
    save_file(STATE, tmp_path / "a.safetensors")
    save_file(STATE, tmp_path / "b.safetensors")
    refused(tmp_path, r"2 sets of weights \(a.safetensors, b.safetensors\)")
    refused([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], "is also in a.safetensors")
    refused([], "at least one file")


# Shards and their index


@pytest.mark.parametrize("index", [True, False])
def test_missing_and_truncated_shards_are_named(tmp_path, index):
    save_sharded(tmp_path, index=index)
    shard = tmp_path / "diffusion_pytorch_model-00002-of-00003.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    refused(tmp_path, r"00002-of-00003.safetensors is damaged: it has \d+ bytes")
    shard.unlink()
    error = refused(tmp_path, "lacks 1 of 3 files")
    assert "00002-of-00003" in error.message


def rewrite_index(folder, change):
    path = folder / "diffusion_pytorch_model.safetensors.index.json"
    where = json.loads(path.read_text())["weight_map"]
    change(where)
    path.write_text(json.dumps({"weight_map": where}))


@pytest.mark.parametrize(
    "file",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "sub/a.safetensors",
        "..",
        "a\\b.safetensors",
        "",
        7,
        None,
    ],
)
def test_an_index_names_only_files_beside_it(tmp_path, file):
    folder = tmp_path / "transformer"
    folder.mkdir()
    save_sharded(folder)
    save_file({"scale": STATE["scale"]}, tmp_path / "secret.safetensors")
    rewrite_index(folder, lambda where: where.update(scale=file))
    refused(folder, "no safetensors file beside it")


def test_an_index_follows_no_link_to_outside(tmp_path):
    folder = tmp_path / "transformer"
    folder.mkdir()
    save_sharded(folder)
    shard = folder / "diffusion_pytorch_model-00001-of-00003.safetensors"
    outside = shard.rename(tmp_path / "elsewhere.safetensors")
    shard.symlink_to(outside)
    refused(folder, "a link to outside of its folder")


def test_an_index_agrees_with_its_files(tmp_path):
    save_sharded(tmp_path)
    rewrite_index(tmp_path, lambda where: where.pop("scale"))
    refused(tmp_path, "and its index differ in 1 tensors")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}', "{"])
def test_an_index_is_a_table(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refused(tmp_path, "is no valid index")


# File systems


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("ext4", True), ("overlay", True), ("nfs4", False), ("9p", False), ("fuse.sshfs", False)],
)
def test_network_drives_are_copied(tmp_path, monkeypatch, kind, expected):
    mounts = tmp_path / "mounts"
    drive = tmp_path / "my drive"
    escaped = str(drive).replace(" ", r"\040")
    mounts.write_text(f"/dev/vda / ext4 rw 0 0\nserver:/x {escaped} {kind} rw 0 0\n")
    monkeypatch.setattr(file_bytes, "_MOUNTS", mounts)
    assert maps_well(drive / "folder" / "a.safetensors") is expected
    assert maps_well(Path("/a.safetensors"))


def test_a_file_that_shrinks_while_it_is_open_is_an_error(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(STATE, path)
    for read in READS:
        content = path.read_bytes()
        with open_weights(path, read=read) as files:
            path.write_bytes(content[:-4])
            with pytest.raises(CheckpointError, match="changed while it was read"):
                files.read("scale")
        path.write_bytes(content)
    assert_same(load_file(path))
