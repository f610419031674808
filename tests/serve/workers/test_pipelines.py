"""Models of a worker: what it announces, and which stay loaded."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from skyloom.core.errors import CheckpointError
from skyloom.models.diorama import load as loader
from skyloom.models.memory import WORKSPACE_BYTES, ModelMemory, PartMemory, Weights
from skyloom.models.registry import BUNDLED, estimate_memory, find_model, find_models, read_model
from skyloom.serve.settings import Settings, load_settings
from skyloom.serve.workers.pipelines import (
    PipelineCache,
    find_capabilities,
    free_device_memory,
    needed_memory,
)
from skyloom.serve.workers.processes import remote_environment, worker_environment

CPU = torch.device("cpu")


def make_model(folder: Path, name: str, size: int) -> Path:
    """A model folder with one file of `size` bytes and the bundled model's manifest."""
    manifest = json.loads((BUNDLED / "diorama/manifest.json").read_text())
    folder.mkdir()
    (folder / "dit.safetensors").write_bytes(bytes(size))
    manifest.update(name=name, files={"dit.safetensors": ""})
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def models(tmp_path):
    """Models "a", "b" and "c" that take 150, 300 and 450 bytes of memory."""
    folders = {name: tmp_path / name for name in "abc"}
    for index, (name, folder) in enumerate(folders.items(), start=1):
        make_model(folder, name, 100 * index)
    return {name: read_model(folder) for name, folder in folders.items()}


@pytest.fixture
def make_cache(models):
    """Make caches whose pipelines are names of folders."""

    def make(memory_bytes):
        def load(folder, device, loras):
            return SimpleNamespace(name=Path(folder).name, device=device, loras=loras)

        return PipelineCache("cpu", models, memory_bytes, load=load)

    return make


def test_memory_is_estimated_from_the_files(models):
    assert [estimate_memory(model) for model in models.values()] == [150, 300, 450]
    files = list((BUNDLED / "diorama").glob("*.safetensors"))
    bundled = estimate_memory(find_model("diorama"))
    assert bundled == 1.5 * sum(file.stat().st_size for file in files)
    (models["a"].folder / "dit.safetensors").unlink()
    with pytest.raises(CheckpointError, match="a lacks"):
        estimate_memory(models["a"])


def test_the_least_recently_used_models_are_evicted_until_the_next_fits(make_cache):
    cache = make_cache(600)
    first = cache.get("a")
    assert (first.name, first.device) == ("a", "cpu")
    cache.get("b")
    assert cache.get("a") is first
    assert cache.names == ["b", "a"]
    cache.get("c")
    assert cache.names == ["a", "c"], "b was used before a, and c fits without it"
    cache.get("b")
    assert cache.names == ["b"], "a and c had to go"
    assert cache.get("a") is not first


def test_a_model_larger_than_the_memory_is_loaded_alone(make_cache):
    cache = make_cache(200)
    for name in "abc":
        cache.get(name)
        assert cache.names == [name]


def test_without_a_limit_every_model_stays_loaded(make_cache):
    cache = make_cache(None)
    loaded = [cache.get(name) for name in "abc"]
    assert [cache.get(name) for name in "abc"] == loaded


def test_a_job_that_failed_gets_the_whole_memory(make_cache):
    cache = make_cache(10_000)
    for name in "ab":
        cache.get(name)
    kept = cache.get("a", alone=True)
    assert cache.names == ["a"]
    cache.get("b")
    cache.get("c", alone=True)
    assert cache.names == ["c"]
    assert cache.get("a") is not kept


def test_a_worker_announces_the_models_and_loras_on_its_host(models, tmp_path, caplog):
    (tmp_path / "felt.safetensors").write_bytes(b"x")
    (models["b"].folder / "dit.safetensors").unlink()
    settings = Settings(
        data=tmp_path,
        models={name: str(model.folder) for name, model in models.items()} | {"d": "missing"},
        loras={"felt": str(tmp_path / "felt.safetensors"), "ink": str(tmp_path / "ink")},
        worker_memory_bytes=200,
    )
    with caplog.at_level(logging.INFO, logger="skyloom"):
        found = find_capabilities(settings, "cpu")
    bundled = estimate_memory(find_model("diorama"))
    assert found.models == {"diorama": bundled, "a": 150, "c": 450}
    assert (found.loras, found.memory_bytes) == (("felt",), 200)
    assert found.usable_models == ["a"]
    messages = [record.getMessage() for record in caplog.records]
    assert sorted(messages) == [
        "model does not fit into the memory",
        "model does not fit into the memory",
        "model left out",
        "worker started",
    ]


def test_the_default_memory_is_what_the_device_has_free(tmp_path, monkeypatch):
    monkeypatch.setattr("skyloom.serve.workers.pipelines.free_memory", lambda: 12_345)
    assert free_device_memory("cpu") == 12_345
    assert find_capabilities(Settings(data=tmp_path), "cpu").memory_bytes == 12_345


def test_models_are_found_by_the_names_of_their_manifests(models, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    shutil.copytree(models["a"].folder, root / "a")
    (root / "broken").mkdir()
    (root / "broken/manifest.json").write_text("{}")
    moved = models["b"].folder.rename(tmp_path / "moved")
    found = find_models(["a", str(moved), "missing"], root)
    assert {name: model.folder for name, model in found.items()} == {
        "a": root / "a",
        "b": moved,
    }


def test_a_worker_process_gets_the_models_of_the_servers_settings(tmp_path, monkeypatch):
    settings = Settings(
        data=tmp_path, models={"größe": 'a "b"'}, loras={"x": "y"}, worker_memory_bytes=5
    )
    loaded = load_settings(environment=worker_environment(settings))
    assert loaded.models == {"sora-2": "diorama", "sora-2-pro": "diorama", "größe": 'a "b"'}
    assert (loaded.loras, loaded.worker_memory_bytes) == ({"x": "y"}, 5)
    elsewhere = remote_environment(settings, with_data=False)
    assert not {"SKYLOOM_MODELS", "SKYLOOM_LORAS"} & elsewhere.keys(), "paths of this host"


def test_a_large_model_needs_what_its_smallest_plan_takes(models, monkeypatch):
    info = find_model("diorama")
    cost = loader.read_network_cost(info)
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert needed_memory(info, CPU) == needed_memory(info, cuda) == estimate_memory(info)
    parts = {
        "text_encoder": PartMemory(Weights(10**9), Weights(10**7), 24),
        "transformer": PartMemory(Weights(8 * 10**9), Weights(10**8), 40),
        "autoencoder": PartMemory(Weights(10**8)),
    }
    memory = ModelMemory(
        parts,
        text_bytes=0,
        condition_bytes=0,
        token_bytes=0,
        cached_token_bytes=0,
        decode_bytes=0,
        decoder_cache_bytes=0,
        encode_bytes=0,
        tile_pixels=1,
    )
    monkeypatch.setattr(loader, "read_network_cost", lambda _: replace(cost, memory=memory))
    rest = 4 * 10**9
    streamed = 2 * (rest + 2 * 10**8) + WORKSPACE_BYTES
    decoder = 2 * 10**8
    assert needed_memory(info, cuda) == streamed + decoder
    assert needed_memory(info, CPU) == estimate_memory(info)
