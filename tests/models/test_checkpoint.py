"""Model files: strict loading, splitting of large parts, errors that name the damage."""

import pytest
import torch

from skyloom.core.errors import CheckpointError
from skyloom.models.checkpoint import (
    from_int8,
    load_into,
    load_part,
    save_part,
    to_int8,
    verify_manifest,
    write_manifest,
)
from skyloom.models.diorama.v1.autoencoder import VaeConfig

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
