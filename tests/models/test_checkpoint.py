"""Model files: strict loading, splitting of large parts, errors that name the damage."""

import os
import time
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from skyloom.core import hash_cache
from skyloom.core.errors import CheckpointError
from skyloom.core.hash_cache import HASHES_FILE
from skyloom.models.checkpoint import (
    build,
    from_int8,
    load_into,
    load_part,
    open_part,
    read_config,
    save_part,
    to_int8,
    verify_manifest,
    write_manifest,
)
from skyloom.models.diorama.v1.autoencoder import Vae, VaeConfig

STATE = {name: torch.randn(1000) for name in ("a", "b", "c")}


def test_large_parts_are_split_and_come_back_whole(tmp_path):
    paths = save_part(tmp_path, "dit", VaeConfig(), STATE, max_bytes=5000, metadata={"step": "7"})
    assert [path.name for path in paths] == [f"dit-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    config, state, metadata = load_part(tmp_path, "dit", VaeConfig)
    assert config == VaeConfig()
    assert metadata["step"] == "7"
    assert all(torch.equal(state[name], value) for name, value in STATE.items())
    paths[1].unlink()
    with pytest.raises(CheckpointError, match="must hold 3 files"):
        load_part(tmp_path, "dit", VaeConfig)


def test_saving_again_leaves_no_old_shards(tmp_path):
    save_part(tmp_path, "dit", VaeConfig(), STATE, max_bytes=5000)
    save_part(tmp_path, "dit", VaeConfig(), {"a": STATE["a"]})
    assert [path.name for path in tmp_path.iterdir()] == ["dit.safetensors"]


def test_missing_and_truncated_parts_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no weights for 'vae'"):
        load_part(tmp_path, "vae", VaeConfig)
    (path,) = save_part(tmp_path, "vae", VaeConfig(), STATE)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"vae\.safetensors is damaged"):
        load_part(tmp_path, "vae", VaeConfig)


def test_weights_must_fit(tmp_path):
    module = torch.nn.Linear(2, 3)
    with pytest.raises(CheckpointError, match="1 missing, 1 extra, 1 misshapen"):
        load_into(module, {"weight": torch.zeros(2, 2), "other": torch.zeros(1)})


def test_a_changed_file_is_found_by_its_hash(tmp_path):
    (path,) = save_part(tmp_path, "vae", VaeConfig(), STATE)
    write_manifest(tmp_path, {"name": "x"})
    assert verify_manifest(tmp_path)["name"] == "x"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is corrupt"):
        verify_manifest(tmp_path)


def test_int8_keeps_weights_to_half_a_step_of_each_row():
    torch.manual_seed(0)
    state = {
        "conv.weight": torch.randn(8, 3, 3, 3) * torch.logspace(-3, 1, 8)[:, None, None, None],
        "bias": torch.randn(8),
    }
    stored = to_int8(state)
    assert stored["conv.weight"].dtype == torch.int8
    back = from_int8(stored)
    steps = state["conv.weight"].flatten(1).abs().amax(1) / 127
    error = (back["conv.weight"] - state["conv.weight"]).flatten(1).abs().amax(1)
    assert (error <= 0.52 * steps).all()
    torch.testing.assert_close(back["bias"], state["bias"], rtol=1e-3, atol=1e-3)
    assert from_int8(state)["conv.weight"].dtype == torch.float32


def test_a_config_is_read_without_weights(tmp_path):
    save_part(tmp_path, "vae", VaeConfig(latent_channels=7), STATE, max_bytes=5000)
    assert read_config(tmp_path, "vae", VaeConfig).latent_channels == 7
    (tmp_path / "dit.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"dit\.safetensors is damaged"):
        read_config(tmp_path, "dit", VaeConfig)


class CountingSource:
    """Random tensors in fp32; counts the bytes of those that are still referenced."""

    def __init__(self, shapes):
        self.shapes = shapes
        self.live = 0
        self.peak = 0

    def read(self, name):
        value = torch.full(self.shapes[name], float(len(name)))
        size = value.nbytes
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(value, self.release, size)
        return value

    def release(self, size):
        self.live -= size


def test_building_holds_the_network_and_one_tensor_read():
    """Tensors are cast and assigned one by one: at most one tensor as stored is alive."""
    sizes = {"0": (300, 200), "1": (100, 300), "2": (50, 100)}
    shapes = {}
    for name, (rows, columns) in sizes.items():
        shapes[f"{name}.weight"] = (rows, columns)
        shapes[f"{name}.bias"] = (rows,)

    class Network(nn.Sequential):
        def place(self, device, dtype):
            self.to(device, dtype)

    source = CountingSource(shapes)
    network = build(
        lambda: Network(*(nn.Linear(columns, rows) for rows, columns in sizes.values())),
        source,
        torch.device("cpu"),
        torch.bfloat16,
    )
    assert source.peak == 4 * 300 * 200
    assert source.live == 0
    assert {value.dtype for value in network.state_dict().values()} == {torch.bfloat16}
    assert all((value == len(name)).all() for name, value in network.state_dict().items())
    assert not network.training


def test_a_built_network_equals_a_loaded_one(tmp_path):
    """Precision, memory format and values are those of `place` on a loaded network."""
    torch.manual_seed(0)
    config = VaeConfig(latent_channels=4, decoder_widths=(8, 8, 8, 8))
    loaded = Vae(config)
    for parameter in loaded.parameters():
        nn.init.normal_(parameter)
    save_part(tmp_path, "vae", config, loaded.state_dict())
    loaded.place(torch.device("cpu"), torch.bfloat16)
    with open_part(tmp_path, "vae") as reader:
        built = build(lambda: Vae(config), reader, torch.device("cpu"), torch.bfloat16)
    expected = loaded.state_dict()
    for name, value in built.state_dict().items():
        assert torch.equal(value, expected[name])
        assert (value.dtype, value.stride()) == (expected[name].dtype, expected[name].stride())


def test_building_is_strict(tmp_path):
    source = CountingSource({"weight": (2, 2), "other": (1,)})
    with pytest.raises(CheckpointError, match="1 missing, 1 extra, 1 misshapen"):
        build(lambda: nn.Linear(2, 3), source, torch.device("cpu"))
    assert source.peak == 0


def test_a_part_in_int8_is_dequantized_while_it_is_read(tmp_path):
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 8, 3)
    stored = to_int8(layer.state_dict())
    save_part(tmp_path, "unet", VaeConfig(), stored, max_bytes=100)
    with open_part(tmp_path, "unet") as reader:
        built = build(lambda: nn.Conv2d(3, 8, 3), reader, torch.device("cpu"))
    expected = from_int8(stored)
    assert set(expected) == set(built.state_dict())
    assert all(torch.equal(value, expected[name]) for name, value in built.state_dict().items())


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """Names of the files that were hashed."""
    names: list[str] = []
    real = hash_cache.sha256_file

    def count(path):
        names.append(path.name)
        return real(path)

    monkeypatch.setattr(hash_cache, "sha256_file", count)
    return names


@pytest.fixture
def settled_model(tmp_path) -> Path:
    """A model folder whose only file was written an hour ago."""
    folder = tmp_path / "model"
    (path,) = save_part(folder, "vae", VaeConfig(), STATE)
    write_manifest(folder, {"name": "x"})
    set_age(path, 3600)
    return folder


def set_age(path: Path, seconds: int) -> None:
    then = time.time_ns() - seconds * 10**9
    os.utime(path, ns=(then, then))


def cache_file() -> Path:
    return Path(os.environ["SKYLOOM_CACHE"]) / HASHES_FILE


def test_an_unchanged_file_is_hashed_once(settled_model, hashed):
    hashed.clear()
    for _ in range(3):
        verify_manifest(settled_model, trust_cache=True)
    assert hashed == ["vae.safetensors"]
    verify_manifest(settled_model)
    assert hashed == ["vae.safetensors"] * 2
    assert [path.name for path in cache_file().parent.iterdir()] == [HASHES_FILE]


@pytest.mark.parametrize("change", ["content", "inode", "size"])
def test_a_changed_file_is_hashed_again(settled_model, hashed, change):
    verify_manifest(settled_model, trust_cache=True)
    path = settled_model / "vae.safetensors"
    before = path.stat()
    content = path.read_bytes()
    if change == "inode":
        (settled_model / "copy").write_bytes(content[:-1] + b"\xff")
        (settled_model / "copy").replace(path)
        os.utime(path, ns=(before.st_mtime_ns, before.st_mtime_ns))
    elif change == "size":
        path.write_bytes(content + b"\0")
        os.utime(path, ns=(before.st_mtime_ns, before.st_mtime_ns))
    else:
        path.write_bytes(content[:-1] + b"\xff")
        set_age(path, 60)
    with pytest.raises(CheckpointError, match="is corrupt"):
        verify_manifest(settled_model, trust_cache=True)


def test_a_file_that_may_still_change_is_not_remembered(settled_model, hashed):
    """Two writes within one tick of the clock have the same mtime."""
    set_age(settled_model / "vae.safetensors", -3600)
    hashed.clear()
    for _ in range(2):
        verify_manifest(settled_model, trust_cache=True)
    assert len(hashed) == 2
    assert not cache_file().exists()


@pytest.mark.parametrize("content", ["not JSON", "[1, 2]", '{"%s": 5}', '{"%s": [1, 2, 3, null]}'])
def test_an_unreadable_cache_is_replaced(settled_model, hashed, content):
    cache_file().parent.mkdir(parents=True, exist_ok=True)
    path = (settled_model / "vae.safetensors").resolve()
    cache_file().write_text(content.replace("%s", str(path)))
    hashed.clear()
    for _ in range(2):
        verify_manifest(settled_model, trust_cache=True)
    assert len(hashed) == 1


def test_an_unwritable_cache_means_hashing(settled_model, hashed, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    hashed.clear()
    for folder in (str(tmp_path / "file" / "cache"), "off"):
        monkeypatch.setenv("SKYLOOM_CACHE", folder)
        for _ in range(2):
            verify_manifest(settled_model, trust_cache=True)
    assert len(hashed) == 4
